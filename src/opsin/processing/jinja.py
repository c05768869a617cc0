"""Chat templates: finding, compiling, inspecting and rendering them, as transformers does.

Templates come with checkpoints, from strangers, so they run in jinja's sandbox and see plain data only. A checkpoint's
own template runs in this process, whose owner chose it, and may compute for so many seconds per conversation and make
values of so many elements. Those of requests run in processes of their own (``opsin.processing.isolated``), since a
sandbox bounds no program wholly.
"""

# jinja2 types what templates see as Unknown.
# pyright: standard

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from opsin.errors import ConfigError, RequestError
from opsin.processing.neutral import CLOSE, OPEN

ContentFormat = Literal["string", "openai"]
_SHOWN_CHARS = 200
_MAX_CPU_S = 5.0  # for one conversation, where a millisecond is usual
_TICKS = 256  # between two looks at the clock
_MAX_ELEMENTS = 2**24  # of a repeated text, or bits of a power; made in one go, in which no other thread runs
_CONTINUE_HERE = "\ufdd2"  # a noncharacter, as the marks of opsin.processing.neutral are
RESERVED_NAMES = frozenset(
    "messages tools documents add_generation_prompt continue_final_message tokenize chat_template conversation "
    "return_dict return_tensors padding truncation max_length".split()
)


class ChatTemplate:
    """One compiled template.

    Args:
        source: jinja text.
        special_tokens: names such as ``bos_token`` that templates may write.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._environment = environment = _environment()
        try:
            self.content_format: ContentFormat = "openai" if _iterates_content(environment.parse(source)) else "string"
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise RequestError(f"The chat template is not valid jinja: {error}", param="chat_template") from error
        except RecursionError:
            raise RequestError("The chat template is nested too deeply.", param="chat_template") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt.

        Args:
            messages: ``{"role", "content", ...}`` in the form that ``content_format`` names.
            continue_final_message: leave the last message open, so that the model writes on.
            kwargs: further names for the template.

        Raises:
            RequestError: the template refuses the conversation, or ``kwargs`` names what the engine sets itself.
        """
        self._check(kwargs or {}, add_generation_prompt and continue_final_message)
        if continue_final_message:
            messages = [*messages[:-1], _with_text_end(messages[-1])]
        messages = [_with_parts(message) for message in messages]
        try:
            clock = self._environment.begin()
            pieces = self._template.generate(
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **(kwargs or {})},
            )
            prompt = "".join(clock.watched(pieces))
        except SecurityError as error:
            raise RequestError(f"The chat template does something unsafe: {error}", param="chat_template") from error
        except TemplateError as error:
            raise RequestError(f"The chat template refused the conversation: {error}", param="messages") from error
        except RecursionError:
            raise RequestError("The chat template calls itself without end.", param="chat_template") from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError) as error:
            raise RequestError(
                f"The chat template failed on this conversation: {type(error).__name__}: {error}", param="messages"
            ) from error
        return _cut_at_end(prompt, messages[-1]) if continue_final_message else prompt

    def _check(self, kwargs: Mapping[str, Any], contradicts: bool) -> None:
        taken = sorted((RESERVED_NAMES | set(self._special_tokens)) & set(kwargs))
        if taken:
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(taken)}: the engine sets these itself. "
                "Use the request's own fields of the same name where there are any.",
                param="chat_template_kwargs",
            )
        if contradicts:
            raise RequestError(
                "add_generation_prompt and continue_final_message are both true; "
                "the first starts a new message, the second goes on with the last. Set one to false.",
                param="continue_final_message",
            )


def find_template(
    folder: Path | None, tokenizer_template: str | Mapping[str, str] | None, family: str, *, tools: bool = False
) -> str | None:
    """The template of a checkpoint: its processor's, its tokenizer's, or the one shipped here for its family.

    None when there is none.
    """
    found: str | Mapping[str, str] | None = _processor_template(folder) if folder else None
    found = found or tokenizer_template
    if isinstance(found, Mapping):
        found = (found.get("tool_use") if tools else None) or found.get("default")
    if found:
        return found
    return shipped_templates().get(family)


def shipped_templates() -> dict[str, str]:
    """The templates in this package by name: a family that often comes without one, or a kind of checkpoint."""
    folder = resources.files("opsin.processing") / "templates"
    return {file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8") for file in folder.iterdir()}


def read_template(given: str) -> str:
    """A template that a user names: the text itself, a path to a file, or the name of one that is shipped here.

    Raises:
        ConfigError: none of these.
    """
    if not isinstance(given, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"chat_template must be jinja text or a path, got {type(given).__name__}.")
    if "{%" in given or "{{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no such file; a NUL in its name; not text
        shipped = shipped_templates()
        if given in shipped:
            return shipped[given]
        reason = error.strerror if isinstance(error, OSError) else error
        shown = given if len(given) <= _SHOWN_CHARS else given[:_SHOWN_CHARS] + "..."
        raise ConfigError(
            f"chat_template {shown!r} is neither jinja text (it has no '{{{{' or '{{%') nor a readable file ({reason}) "
            f"nor a template that comes with opsin: {', '.join(sorted(shipped))}."
        ) from error


def _processor_template(folder: Path) -> str | Mapping[str, str] | None:
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        path = folder / name
        if path.is_file() and (template := json.loads(path.read_text(encoding="utf-8")).get("chat_template")):
            return template
    return None


# ---------------------------------------------------------------------------------- the language of templates


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PlainDict:
    """What templates get for ``dict``: it makes dicts, and has no attributes to climb out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Sequence[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _SafeNamespace(Namespace):
    """``namespace()`` without private attributes."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja's own filter this one does not escape for HTML.
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for mark in (OPEN, CLOSE):  # they must survive, or a user's control strings would pass for the template's
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


class _Clock:
    """The CPU time that one conversation has taken on its thread, looked at now and then."""

    def __init__(self) -> None:
        self._end_s = time.thread_time() + _MAX_CPU_S
        self._num_ticks = 0

    def tick(self) -> None:
        self._num_ticks += 1
        if self._num_ticks % _TICKS == 0 and time.thread_time() > self._end_s:
            raise SecurityError(f"it computed for more than {_MAX_CPU_S:g} s")

    def watched(self, pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            self.tick()
            yield piece


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a clock that calls, attributes and output tick, and with bounds on what is made in one go."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._thread = threading.local()  # a template may render on several threads at once

    def begin(self) -> _Clock:
        """Start the clock of one conversation on this thread."""
        self._thread.clock = _Clock()
        return self._thread.clock

    def _tick(self) -> None:
        clock: _Clock | None = getattr(self._thread, "clock", None)
        if clock is not None:  # None while constants are folded, when the template is compiled
            clock.tick()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * max(right, 0)
        elif isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() + right.bit_length()
        else:
            sequence, times = (left, right) if isinstance(right, int) else (right, left)
            size = len(sequence) * times if isinstance(sequence, Sequence) and isinstance(times, int) else 0
        if size > _MAX_ELEMENTS:
            raise SecurityError(f"it makes a value of {size:.3g} elements")
        return super().call_binop(context, operator, left, right)


def _environment() -> _BoundedEnvironment:
    environment = _BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_PlainDict(), namespace=_SafeNamespace
    )
    return environment


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content, and so wants it as a list of parts.

    Follows names that are bound to the content by ``set`` or handed to a macro of the template's own.
    """
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:  # until no further name is found to hold content
        before = len(names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            for given, parameter in zip(call.args, macro.args if macro else (), strict=False):
                if _is_content(given, names):
                    names.add(parameter.name)
        if len(names) == before:
            break
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Getitem(node=inner, arg=nodes.Slice()) | nodes.Filter(node=inner):
            return _is_content(inner, names)
        case nodes.CondExpr(expr1=first, expr2=second):
            return _is_content(first, names) or _is_content(second, names)
        case nodes.Name(name=name):
            return name in names
        case _:
            return False


class _Parts(list[Any]):
    """Content as parts. A template that loops over those of users may write others' out whole, as GLM-4.1V's does: they
    are their text then, which is most often all that a caller gave, not Python's spelling of a list."""

    def __str__(self) -> str:
        return "\n".join(part["text"] for part in self if isinstance(part, Mapping) and "text" in part)


def _with_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": _Parts(content)} if isinstance(content, list) else message


# ------------------------------------------------------------------------------------- continue_final_message


def _with_text_end(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a sign, and a blank to see trimming by, at the end of its (last) text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _CONTINUE_HERE + " "}
    parts = [dict(part) for part in content or ()]
    for part in reversed(parts):
        if "text" in part:
            part["text"] += _CONTINUE_HERE + " "
            return {**message, "content": parts}
    raise RequestError(
        "continue_final_message is true, but the final message holds no text to continue.",
        param="continue_final_message",
    )


def _cut_at_end(prompt: str, message: Mapping[str, Any]) -> str:
    at = prompt.rfind(_CONTINUE_HERE)
    if at < 0:
        raise RequestError(
            f"continue_final_message is true, but the chat template leaves out the final message "
            f"(role {message.get('role')!r}), so it cannot be continued.",
            param="continue_final_message",
        )
    # Where the template trims the message, its own trailing blanks go too, as they do in transformers.
    return prompt[:at] if prompt[at + 1 : at + 2] == " " else prompt[:at].rstrip()
