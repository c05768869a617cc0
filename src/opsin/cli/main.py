"""The command tree, and what becomes of errors.

Exit codes: 0 done, 2 wrong usage or an ``OpsinError`` (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import opsin
from opsin.cli import bench, chat, collect_env, flags, models, pick, run, serve, verify
from opsin.errors import OpsinError

logger = logging.getLogger(__name__)

COMMANDS = (run, chat, pick, serve, models, bench, verify, collect_env)


def build_parser() -> flags.Parser:
    """The parser of the whole command line; each command's namespace carries its function and its own parser."""
    parser = flags.Parser(
        prog="opsin",
        usage="opsin [--version] COMMAND ...",
        description="Run vision-language models: pictures and text in, text out.",
        epilog="'opsin COMMAND --help' explains a command. Start with: opsin run PICTURE \"What is this?\"",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"opsin {opsin.__version__}")
    commands = parser.add_subparsers(prog="opsin", title="commands", metavar="COMMAND", parser_class=flags.Parser)
    parser.set_defaults(function=lambda args: parser.print_help())
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        args = flags.parse(build_parser(), argv)
        args.argv = argv  # measurements report it
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("opsin").setLevel(logging.WARNING if getattr(args, "quiet", False) else logging.INFO)
        for notice in args.notices:
            logger.warning("%s", notice)
        return args.function(args) or 0
    except OpsinError as error:
        print(f"opsin: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `opsin models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
