"""From a command line as vLLM's users write it to the words that argparse reads.

Flags may have underscores, lists may go on over several words, a key of a JSON setting may stand in the flag
(``--limit-mm-per-prompt.image 2``), and flags that vLLM alone has are answered here.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from opsin import vllm_settings
from opsin.errors import ConfigError

_FLAG = re.compile(r"--?[A-Za-z][^\s=]*(=.*)?", re.DOTALL)  # as argparse: with a blank in it, it is text
_DASHES = re.compile(r"^--\w[\w-]*")
_LEVEL = re.compile(r"(-O)(?:=?(\d)|(\..*))")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

SHORT = {
    "-O": "--optimization-level",
    "-q": "--quantization",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-asc": "--api-server-count",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-sc": "--speculative-config",
    "-n": "--nnodes",
    "-r": "--node-rank",
}
"""vLLM's short spellings; a command that has one of its own keeps that."""


class Rewritten(NamedTuple):
    """What argparse is to read, and what is to be told."""

    words: list[str]
    notices: list[str]


class _Part(NamedTuple):
    """A flag as it was written, with the words behind it that are its own; or, with no flag, a word that is free."""

    flag: str
    words: list[str]


class Kinds(NamedTuple):
    """How the values of special flags are known.

    Attributes:
        lists: converters (argparse's ``type``) of one word to a tuple.
        mappings: converters of one word to a dict.
    """

    lists: tuple[Callable[[str], Any], ...]
    mappings: tuple[Callable[[str], Any], ...]


def rewrite(
    words: Sequence[str], command: argparse.ArgumentParser, kinds: Kinds, *, has_model: bool = False
) -> Rewritten:
    """Rewrite the words behind a command.

    Args:
        words: as ``spelt`` has them.
        command: its parser. Where it takes one MODEL at most, that may come behind a list.
        has_model: the model is named elsewhere.

    Raises:
        ConfigError: a flag of vLLM's that would change what clients get, or a MODEL that cannot be told from a list.
        SystemExit: a flag that nobody knows.
    """
    return _Rewriting(command, kinds).run(words, has_model)


def spelt(words: Sequence[str]) -> list[str]:
    """Words whose flags have dashes for underscores, but for the keys behind a dot; text stays as it is."""
    end = words.index("--") if "--" in words else len(words)
    return [*(_spelt(word) if _FLAG.fullmatch(word) else word for word in words[:end]), *words[end:]]


def _spelt(flag: str) -> str:
    return _DASHES.sub(lambda name: name[0].replace("_", "-"), flag)


class _Rewriting:
    def __init__(self, command: argparse.ArgumentParser, kinds: Kinds) -> None:
        self._command = command
        self._kinds = kinds
        self._known = command._option_string_actions
        self._takes_model = [action.nargs for action in command._actions if not action.option_strings] == ["?"]
        self._notices: list[str] = []

    def run(self, words: Sequence[str], has_model: bool) -> Rewritten:
        parts = list(self._parts(words))
        if self._takes_model and not has_model:
            self._free_model(parts)
        lists: dict[str, list[str]] = {}
        result: list[str] = []
        for part in parts:
            action = self._known.get(part.flag)
            if not part.flag:
                result += part.words
            elif action is None:
                result += (
                    self._foreign(part) if (keyed := self._action(part.flag)) is None else self._keyed(part, keyed)
                )
            elif self._is_list(action):
                lists.setdefault(_long(action), []).extend(part.words)
            elif not part.words:  # where one is missing, it is argparse's to say
                result.append(part.flag)
            else:
                result.append(f"{part.flag if action.nargs == 0 else _long(action)}={part.words[0]}")
        return Rewritten([*(self._joined(*item) for item in lists.items()), *result], self._notices)

    # ------------------------------------------------------------------------------------------------ which is whose

    def _parts(self, words: Sequence[str]) -> Iterator[_Part]:
        rest = iter(words)
        ahead = next(rest, None)

        def take(most: int) -> list[str]:
            nonlocal ahead
            taken: list[str] = []
            while ahead is not None and not _FLAG.fullmatch(ahead) and ahead != "--" and len(taken) < most:
                taken.append(ahead)
                ahead = next(rest, None)
            return taken

        while ahead is not None:
            word, ahead = ahead, next(rest, None)
            if word == "--":
                yield _Part("", [word, *([ahead] if ahead is not None else []), *rest])
                return
            if not _FLAG.fullmatch(word):
                yield _Part("", [word])
                continue
            if level := _LEVEL.fullmatch(word):  # -O3, -O.mode=3
                word = f"{level[1]}={level[2] or level[3]}"
            flag, sign, value = word.partition("=")
            flag = flag if flag in self._known else SHORT.get(flag, flag)
            most = self._num_values(flag)
            if sign:
                yield _Part(flag, [value])
            elif most == 0:  # older versions of vLLM took a word here
                is_foreign = self._row(flag) is not None
                yield _Part(flag, take(1) if is_foreign and str(ahead).lower() in ("true", "false") else [])
            else:
                yield _Part(flag, take(most))

    def _num_values(self, flag: str) -> int:
        """The most words that a flag takes."""
        many = 2**31 if self._takes_model else 1
        action = self._action(flag)
        if action is not None:
            return 0 if action.nargs == 0 else many if self._is_list(action) else 1
        row = self._row(flag)
        if row is None:
            self._refuse_unknown(flag)
        return {"nothing": 0, "value": 1, "values": many}[row.takes]

    def _action(self, flag: str) -> argparse.Action | None:
        """The command's own flag, also where a key of its JSON stands behind a dot."""
        if (action := self._known.get(flag)) is not None:
            return action
        action = self._known.get(flag.partition(".")[0])
        return action if action is not None and action.type in self._kinds.mappings else None

    def _row(self, flag: str) -> vllm_settings.Foreign | None:
        if self._action(flag) is not None:
            return None
        return vllm_settings.find(flag.partition(".")[0])

    def _is_list(self, action: argparse.Action) -> bool:
        return action.type in self._kinds.lists

    def _free_model(self, parts: list[_Part]) -> None:
        """Take the MODEL from behind a list, where no other word is free and none of ``--model`` is there.

        A list of one word keeps it. Of a longer one, the last word is the model if it can only be meant so.
        """
        if any(not part.flag or self._known.get(part.flag) is self._known.get("--model") for part in parts):
            return
        long = [i for i, part in enumerate(parts) if len(part.words) > 1 and self._num_values(part.flag) > 1]
        named = [i for i in long if is_model(parts[i].words[-1])]
        if len(named) == 1:
            parts.append(_Part("", [parts[named[0]].words.pop()]))
        elif long:  # the values stay unsaid: they may be keys
            raise ConfigError(
                f"It cannot be told which word behind {' and '.join(parts[i].flag for i in long)} is the model. Give "
                f"it first, as in '{self._command.prog} MODEL {parts[long[0]].flag} ...', or with --model; 'demo' is "
                "the model inside the package."
            )

    # ------------------------------------------------------------------------------------------- what becomes of it

    def _joined(self, flag: str, words: Sequence[str]) -> str:
        """All values of a list's flag, wherever they stood, as one word: so they replace those of a file."""
        convert = self._known[flag].type
        assert callable(convert)
        values: list[str] = []
        for word in words:
            try:
                values += convert(word)
            except argparse.ArgumentTypeError as error:
                self._command.error(f"argument {flag}: {error}")
        if not words:
            self._command.error(f"argument {flag}: expected one argument")
        return f"{flag}={json.dumps(values)}"

    def _keyed(self, part: _Part, action: argparse.Action) -> list[str]:
        """A key of a JSON setting, as the setting's own converter reads it."""
        base, _, key = part.flag.partition(".")
        if not all(key.split(".")) or len(part.words) != 1:
            self._command.error(f"argument {part.flag}: write {base}.KEY VALUE")
        return [f"{_long(action)}=.{key}={part.words[0]}"]

    def _foreign(self, part: _Part) -> list[str]:
        """What a flag that opsin has not stands for."""
        row = self._row(part.flag)
        assert row is not None, "the others were refused when the words were told apart"
        if row.takes != "nothing" and not part.words:
            self._command.error(f"argument {part.flag}: expected one argument")
        name = part.flag.partition(".")[0]
        is_off = row.takes == "nothing" and (name not in row.names or "false" in (word.lower() for word in part.words))
        if row.becomes:
            self._tell(f"{part.flag}: {row.told}.")
            value = "" if row.takes == "nothing" else f"={part.words[0]}"
            return [] if is_off else [row.becomes + value]
        if row.only is None:
            self._tell(f"{part.flag} changes nothing here: {row.told}.")
        elif row.only == "" and not is_off:
            raise ConfigError(f"vLLM's {part.flag} is not for opsin: {row.told}.")
        elif not set(part.words) <= set(row.only.split()) and not is_off:
            raise ConfigError(f"{part.flag} is {part.words[0]!r:.100}; it must be {row.choice}: {row.told}.")
        return []

    def _tell(self, notice: str) -> None:
        if notice not in self._notices:
            self._notices.append(notice)

    def _refuse_unknown(self, flag: str) -> NoReturn:
        names = [name for row in vllm_settings.TABLE for name in row.names]
        near = _nearest(flag.partition(".")[0], [*self._known, *names])
        hint = f"; did you mean {near}?" if near else f"; usage: {self._command.usage}"
        self._command.error(f"unrecognized arguments: {flag}{hint}")  # exits
        raise AssertionError


def _long(action: argparse.Action) -> str:
    return next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])


def is_model(word: str) -> bool:
    """Whether the word can name a model: a folder, a Hugging Face id, the one inside the package."""
    return word == "demo" or os.path.isdir(word) or _HUB_ID.fullmatch(word) is not None


def _nearest(flag: str, names: Sequence[str]) -> str | None:
    """The only flag that begins so; or one so much alike that it must have been meant."""
    longer = [name for name in names if name.startswith(flag)]
    if len(longer) == 1:
        return longer[0]
    return next(iter(difflib.get_close_matches(flag, names, n=1, cutoff=0.75)), None)
