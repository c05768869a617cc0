"""``opsin models``: what is supported, and what a model will cost before it is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import typing
from typing import TYPE_CHECKING, Any

from opsin.cli import environment
from opsin.cli.flags import Parser, add_option, config_groups

if TYPE_CHECKING:
    from opsin.cli.flags import Commands
    from opsin.models import Family

COMMON_SIZES = ((224, 224), (336, 336), (640, 480), (1024, 1024), (1280, 720), (1920, 1080), (4032, 3024))


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "models",
        usage="opsin models [--json] [show MODEL]",
        help="list what is supported; explain one model",
        description="List the supported architectures, or show one model's size, picture tokens and memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.set_defaults(function=execute_list, parser=parser)
    kinds = parser.add_subparsers(prog="opsin models", metavar="show", parser_class=Parser)
    show = kinds.add_parser(
        "show",
        usage="opsin models show [options] MODEL",
        help="explain one model",
        description="Show one model's size, tokens per picture and memory. Weights are neither downloaded nor loaded.",
        allow_abbrev=False,
    )
    show.add_argument("model", metavar="MODEL", help="Hugging Face id, local folder, or 'demo'")
    show.add_argument("--json", action="store_true", help="Print JSON.")
    for name in ("revision", "dtype"):
        _add_model_option(show, name)
    show.set_defaults(function=execute_show, parser=show)


def execute_list(args: argparse.Namespace) -> int:
    from opsin.models import MODELS

    if args.json:
        print(json.dumps(list(dict.fromkeys(family.architecture for family in MODELS))))
        return 0
    width = max(len(family.name) for family in MODELS)
    for family in MODELS:
        print(f"{family.name:<{width}}  {summary(family)}")
    print("\n'opsin models show MODEL' explains one model: a Hugging Face id, a folder, or 'demo'.")
    return 0


def execute_show(args: argparse.Namespace) -> int:
    facts = describe_model(args.model, revision=getattr(args, "revision", None), dtype=getattr(args, "dtype", "auto"))
    print(json.dumps(facts, indent=2) if args.json else environment.table(facts))
    return 0


def describe_model(model: str, *, revision: str | None, dtype: str) -> dict[str, Any]:
    """What a model is and costs, from its config and tokenizer alone.

    Raises:
        ConfigError: no such model.
        UnsupportedModelError: its architecture or a setting of it.
    """
    import torch

    from opsin.kernels import select
    from opsin.layers import Placement
    from opsin.models import resolve
    from opsin.models.hub import find_model
    from opsin.processing.tokenizer import Tokenizer

    files = find_model(model, revision=revision, weights=False)
    family = resolve(files.config)
    tokenizer = Tokenizer.from_folder(files.folder, files.generation_config)
    rule = family.load_rule().from_hf(files.config, files.processor, tokenizer)
    name = files.dtype if dtype == "auto" else dtype
    torch_dtype: torch.dtype = getattr(torch, name)
    # The meta device has shapes and no memory, so the count is exact and costs nothing.
    place = Placement(select(torch.device("cpu"), "reference"), torch.device("meta"), torch_dtype)
    network = family.load_model().from_hf(files.config, place=place, norm=rule.norm)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    spec = network.spec
    kv_bytes = spec.kv_bytes_per_token(torch_dtype.itemsize)
    return {
        "model": model,
        "architecture": family.architecture,
        "folder": str(files.folder),
        "parameters": num_parameters,
        "dtype": name,
        "weights_gib": round(num_parameters * torch_dtype.itemsize / 2**30, 3),
        "context_tokens": spec.max_position,
        "vocabulary": spec.vocab_size,
        "layers": len(spec.layers),
        "kv_cache_kib_per_token": round(kv_bytes / 2**10, 2),
        "kv_cache_gib_at_full_context": round(kv_bytes * spec.max_position / 2**30, 3),
        "tokens_per_picture": {
            f"{width}x{height}": rule.layout("image", width, height, 1, {}).num_features
            for width, height in COMMON_SIZES
        },
    }


def summary(family: Family) -> str:
    """The first line of the family's own documentation; imports no torch."""
    return (importlib.import_module(f"opsin.models.{family.folder}").__doc__ or "").strip().partition("\n")[0]


def _add_model_option(parser: argparse.ArgumentParser, name: str) -> None:
    """The engine's own flag of that name, with the engine's own words."""
    (group,) = [group for group in config_groups() if group.name == "model"]
    (field,) = [field for field in dataclasses.fields(group.cls) if field.name == name]
    add_option(parser, name, typing.get_type_hints(group.cls)[name], field.metadata["help"], field.default)
