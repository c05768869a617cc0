"""``opsin run``: ask one question about pictures and leave."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from opsin.cli import pictures
from opsin.cli.flags import add_engine_flags, engine_settings
from opsin.cli.session import Session, add_sampling_flags, print_piece, sampling_params

if TYPE_CHECKING:
    from opsin.cli.flags import Commands

DEFAULT_QUESTION = "What is in the picture?"


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "run",
        usage="opsin run [options] PICTURE... QUESTION",
        help="ask one question about pictures",
        description="Ask one question about pictures. The answer goes to stdout, everything else to stderr.",
        epilog='example: opsin run cat.jpg "What colour is the cat?"',
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="PICTURE, QUESTION",
        help=f"pictures by path or URL, then one quoted question ('{DEFAULT_QUESTION}' if there is none)",
    )
    parser.add_argument("--system", metavar="TEXT", default=argparse.SUPPRESS, help="A system message to begin with.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of the answer's text.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Print the answer alone: no memory plan, no speed.")
    add_sampling_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(function=execute, parser=parser)


def execute(args: argparse.Namespace) -> int:
    sources, texts = pictures.split_inputs(args.inputs, most_texts=1)
    question = texts[0] if texts else DEFAULT_QUESTION
    params = sampling_params(args)
    messages = [{"role": "system", "content": args.system}] if "system" in args else []
    messages.append(pictures.user_message(sources, question))

    with Session(engine_settings(args)) as session:
        with pictures.named(sources, len(messages) - 1):
            answer = session.ask(messages, params, _ignore if args.json else print_piece)
        memory = session.llm.memory_plan
    if args.json:
        report = {
            "model": getattr(args, "model", "demo"),
            "pictures": [source if not source.startswith("data:") else "data:" for source in sources],
            "question": question,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "media_tokens": answer.media_tokens,
            "cached_tokens": answer.cached_tokens,
            "completion_tokens": answer.completion_tokens,
            "ttft_s": round(answer.ttft_s, 4),
            "total_s": round(answer.total_s, 4),
            "tokens_per_s": answer.tokens_per_s and round(answer.tokens_per_s, 2),
            "memory": memory._asdict(),
        }
        print(json.dumps(report, ensure_ascii=False))
    else:
        print()
        if not args.quiet:
            print(answer.summary(), file=sys.stderr)
    return 0


def _ignore(text: str) -> None:
    del text
