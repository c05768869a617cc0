"""Command-line flags and YAML files, both generated from the dataclasses of ``opsin.config``.

A flag is absent from the parsed namespace unless somebody gave it, so that defaults live in the dataclasses alone.
A YAML file is turned into the flags it stands for and parsed before the command line's own, which therefore win.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from opsin import vllm_settings
from opsin.cli.values import StoreMapping, converter, mapping, names, texts, without_none
from opsin.cli.words import Kinds, Rewritten, rewrite, spelt
from opsin.config import RUNNER_OF_TASK, EngineConfig
from opsin.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]  # what add_subparsers() returns


class ConfigGroup(NamedTuple):
    """One dataclass of ``EngineConfig``: ``name`` is its field there."""

    name: str
    cls: type
    title: str


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are one line, like every other error of the command."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def config_groups() -> list[ConfigGroup]:
    """The groups of engine settings, in order."""
    groups: list[ConfigGroup] = []
    for field in dataclasses.fields(EngineConfig):
        cls = typing.cast(type, field.default_factory)
        summary = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
        groups.append(ConfigGroup(field.name, cls, f"{field.name}: {summary[0].lower()}{summary[1:]}"))
    return groups


def add_option(
    group: argparse._ActionsContainer,
    name: str,
    kind: Any,
    help: str,
    default: object,
    *aliases: str,
    splits: bool = True,
) -> None:
    """Add the flag of one setting.

    Args:
        name: the setting's name; the flag is spelt with dashes.
        kind: its annotation: str, int, float, bool, Literal, Mapping, tuple[str, ...], or one of these or None.
        default: printed, not stored.
        splits: a tuple's values may be joined by commas.

    A Mapping's flag also takes single keys, and a tuple's several words (``opsin.cli.words``).
    """
    flag = "--" + name.replace("_", "-")
    if default is not None and default is not False and default not in ((), ""):
        told = ", ".join(default) if isinstance(default, tuple) else "yes" if default is True else default
        help = f"{help} (default: {told})"
    help = help.replace("%", "%%")
    kind = without_none(kind)
    if kind is bool:
        group.add_argument(flag, *aliases, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        return
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    convert, metavar = converter(kind)
    if convert is names and not splits:
        convert, metavar = texts, "TEXT"
    group.add_argument(
        flag,
        *aliases,
        action=StoreMapping if convert is mapping else "store",
        type=convert,
        choices=choices,
        metavar=None if choices else metavar,
        default=argparse.SUPPRESS,
        help=help,
    )


def add_model_place(parser: argparse.ArgumentParser) -> None:
    """Let the model stand free on the command line, as ``--model`` does."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=argparse.SUPPRESS,
        help="Hugging Face id, local folder, or 'demo' for the model inside the package",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per engine setting, grouped as ``EngineConfig`` is, and ``--config``."""
    for group in config_groups():
        section = parser.add_argument_group(group.title)
        hints = typing.get_type_hints(group.cls)
        for field in dataclasses.fields(group.cls):
            default = None if field.default is dataclasses.MISSING else field.default
            aliases = {"model": ("-m",), "tensor_parallel_size": ("-tp",)}.get(field.name, ())
            add_option(section, field.name, hints[field.name], field.metadata["help"], default, *aliases)
        if group.name == "model":
            section.add_argument(
                "--task",
                dest="runner",
                type=_task,
                default=argparse.SUPPRESS,
                metavar="TASK",
                help="Former name of --runner: 'generate' or 'embedding'.",
            )
            section.add_argument(
                "--config",
                metavar="FILE",
                default=argparse.SUPPRESS,
                help="YAML file of settings, named as the flags are; flags given beside it win.",
            )


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine settings that were given, as keywords of ``LLM``.

    Raises:
        ConfigError, RequestError: a value is out of range.
    """
    known = {field.name for group in config_groups() for field in dataclasses.fields(group.cls)}
    settings, _ = vllm_settings.without({name: value for name, value in vars(args).items() if name in known})
    media = EngineConfig.from_flat(settings).media  # fails here, before anything heavy is loaded
    if media.media_io_kwargs:
        from opsin.media.clips import FrameChoice

        FrameChoice.of(media.media_io_kwargs)
    return settings


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The parser's flags, without ``--help`` and ``--config``."""
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "config"):
            yield action


def yaml_arguments(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The command-line arguments that a YAML file of settings stands for.

    Args:
        parser: the command's; its flags are the keys that the file may hold, with dashes or underscores.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or holds a key that is no flag.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read --config {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}; it must hold 'name: value' lines.")
    settings = typing.cast("dict[object, object]", content)
    known = {name: action for action in options(parser) for name in action.option_strings if name.startswith("--")}
    arguments: list[str] = []
    for key, value in settings.items():
        name = "--" + str(key).replace("_", "-")
        if name not in known and (row := vllm_settings.find(name)) is not None and not name.startswith("--no-"):
            arguments += _foreign_arguments(name, value, row)
            continue
        if name not in known or name.startswith("--no-"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0][2:]}'?" if near else ""
            raise ConfigError(f"--config {path}: unknown setting '{key}'.{hint} '{parser.prog} --help' lists all.")
        if value is None:
            continue
        action = known[name]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ConfigError(f"--config {path}: {key} is {value!r}; it must be true or false.")
            if value:
                arguments.append(name)
            elif isinstance(action, argparse.BooleanOptionalAction):
                arguments.append(name.replace("--", "--no-", 1))
        else:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            arguments.append(f"{name}={text}")
    return arguments


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line as vLLM's users may write it, whose command may name a YAML file of settings.

    Returns:
        The flags that were given, and ``notices``: what is to be told of flags that change nothing.

    Raises:
        ConfigError: that file is wrong, or a flag is refused.
    """
    command, depth = _command(parser, argv)
    first, words = list(argv[:depth]), spelt(argv[depth:])
    filed, typed = Rewritten([], []), Rewritten(words, [])
    if "--config" in command._option_string_actions:  # it has an engine
        path = _config_of(words)
        if path is not None:
            filed = rewrite(yaml_arguments(path, command), command, _KINDS, has_model=True)
        has_model = any(word.startswith("--model=") for word in filed.words)
        typed = rewrite(words, command, _KINDS, has_model=has_model)
    args, unknown = parser.parse_known_args([*first, *filed.words, *typed.words])
    if unknown:  # said by the command, which knows its usage; ``parse_args`` would say it in the name of all
        command.error(f"unrecognized arguments: {' '.join(unknown)}; usage: {command.usage}")
    args.notices = [*filed.notices, *typed.notices]
    return args


def _command(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.ArgumentParser, int]:
    """The parser of the command that a line begins with, and how many words that is."""
    for depth, word in enumerate(argv):
        deeper = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not deeper or word not in deeper[0].choices:
            return parser, depth
        parser = deeper[0].choices[word]
    return parser, len(argv)


def _config_of(words: Sequence[str]) -> str | None:
    """The file that ``--config`` names; the last one, as argparse has it."""
    found = None
    for word, after in pairwise([*words, None]):
        if word is None or word == "--":
            break
        if word.startswith("--config="):
            found = word.partition("=")[2]
        elif word == "--config":
            found = after
    return found


def _foreign_arguments(name: str, value: object, row: vllm_settings.Foreign) -> list[str]:
    """A setting that vLLM alone has, as the flag that is answered."""
    if value is None:
        return []
    if row.takes == "nothing":
        return [name if value else name.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [name, *map(str, typing.cast("list[object]", value))]
    return [f"{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _task(text: str) -> str:
    if text not in RUNNER_OF_TASK:
        raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(RUNNER_OF_TASK)}")
    return RUNNER_OF_TASK[text]


_KINDS = Kinds(lists=(names, texts), mappings=(mapping,))
