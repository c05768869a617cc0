"""Command-line flags and YAML files, both generated from the dataclasses of ``opsin.config``.

A flag is absent from the parsed namespace unless somebody gave it, so that defaults live in the dataclasses alone.
A YAML file is turned into the flags it stands for and parsed before the command line's own, which therefore win.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union

from opsin.config import EngineConfig
from opsin.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]  # what add_subparsers() returns

_TASKS = {"auto": "auto", "generate": "generate", "embedding": "pooling", "embed": "pooling"}
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


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
    group: argparse._ActionsContainer, name: str, kind: Any, help: str, default: object, *aliases: str
) -> None:
    """Add the flag of one setting.

    Args:
        name: the setting's name; the flag is spelt with dashes.
        kind: its annotation: str, int, float, bool, Literal, Mapping, tuple[str, ...], or one of these or None.
        default: printed, not stored.
    """
    flag = "--" + name.replace("_", "-")
    if default is not None and default is not False and default != ():
        help = f"{help} (default: {'yes' if default is True else default})"
    help = help.replace("%", "%%")
    kind = _without_none(kind)
    if kind is bool:
        group.add_argument(flag, *aliases, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        return
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    convert, metavar = _converter(kind)
    group.add_argument(
        flag,
        *aliases,
        type=convert,
        choices=choices,
        metavar=None if choices else metavar,
        default=argparse.SUPPRESS,
        help=help,
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
        ConfigError: a value is out of range.
    """
    names = {field.name for group in config_groups() for field in dataclasses.fields(group.cls)}
    settings = {name: value for name, value in vars(args).items() if name in names}
    EngineConfig.from_flat(settings)  # fails here, before anything heavy is loaded
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
    """Parse a command line whose command may name a YAML file of settings.

    Flags may be spelt with underscores, as in scripts written for vLLM.

    Raises:
        ConfigError: that file is wrong.
    """
    argv = [re.sub(r"^--\w[\w-]*", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    args = parser.parse_args(argv)
    if "config" not in args:
        return args
    chosen: argparse.ArgumentParser = args.parser
    depth = len(chosen.prog.split()) - 1  # words of the command itself: "bench throughput" is two
    return parser.parse_args([*argv[:depth], *yaml_arguments(args.config, chosen), *argv[depth:]])


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (Union, types.UnionType):
        (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
    return kind


def _converter(kind: Any) -> tuple[Callable[[str], Any], str]:
    """The function that reads a value of this type, and the name that stands for the value in ``--help``."""
    origin = typing.get_origin(kind) or kind
    if origin is int:
        return _integer, "N"
    if origin is float:
        return _number, "X"
    if origin is Mapping:
        return _mapping, "JSON"
    if origin is tuple:
        return _names, "A,B"
    if origin in (str, Literal):
        return str, "TEXT"
    raise TypeError(f"no command-line spelling for {kind}")


def _integer(text: str) -> int:
    """An integer, with k, m, g for powers of 1000 and K, M, G for powers of 1024."""
    factor = _UNITS.get(text[-1:], 1)
    try:
        return round(float(text[:-1]) * factor) if factor != 1 else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number (8192, 8k and 8K are)") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def _mapping(text: str) -> dict[str, Any]:
    """A JSON object, or ``name=value,name=value``."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"'{text}' is not JSON: {error}") from None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and separator and value for name, separator, value in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a JSON object nor 'name=value,name=value'")
    return {name.strip(): _scalar(value.strip()) for name, _, value in pairs}


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _names(text: str) -> tuple[str, ...]:
    """A comma-separated list, or a JSON one."""
    if text.lstrip().startswith("["):
        try:
            return tuple(str(part) for part in json.loads(text))
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"'{text}' is not JSON: {error}") from None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _task(text: str) -> str:
    if text not in _TASKS:
        raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(_TASKS)}")
    return _TASKS[text]
