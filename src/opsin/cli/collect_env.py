"""``opsin collect-env``: what to paste into a bug report."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from opsin.cli import environment

if TYPE_CHECKING:
    from opsin.cli.flags import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "collect-env",
        usage="opsin collect-env [--json]",
        help="print versions and devices, for bug reports",
        description="Print versions and devices, for bug reports. No secrets are read.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.set_defaults(function=execute, parser=parser)


def execute(args: argparse.Namespace) -> int:
    facts = environment.collect()
    print(json.dumps(facts, indent=2) if args.json else environment.table(facts))
    return 0
