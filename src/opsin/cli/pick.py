"""``opsin pick``: how probable each of some given answers is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from opsin.cli import pictures
from opsin.cli.flags import add_engine_flags, add_option, engine_settings

if TYPE_CHECKING:
    from opsin.cli.flags import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "pick",
        usage="opsin pick [options] PICTURE... QUESTION --choices A,B",
        help="weigh given answers to a question about pictures",
        description="Tell how probable each of some given answers is, the most probable first. Nothing is generated.",
        epilog='example: opsin pick cat.jpg "Is there a cat?" --choices yes,no',
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="PICTURE, QUESTION", help="pictures by path or URL, then one quoted question"
    )
    add_option(parser, "choices", tuple[str, ...], "Answers, spelt as the model would give them.", ())
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Print no memory plan.")
    add_engine_flags(parser)
    parser.set_defaults(function=execute, parser=parser)


def execute(args: argparse.Namespace) -> int:
    sources, question = pictures.split_inputs(args.inputs, "")
    if not question or "choices" not in args:
        args.parser.error("give a question, and its answers with --choices")
    messages = [pictures.user_message(sources, question)]
    import opsin

    with opsin.LLM(**engine_settings(args)) as llm:
        with pictures.named(sources, 0):
            (output,) = llm.pick_chat(messages, list(args.choices), use_tqdm=False)
    ranked = sorted(output.choices, key=lambda choice: -choice.probability)
    if args.json:
        told = {choice.text: {"probability": choice.probability, "logprob": choice.logprob} for choice in ranked}
        print(json.dumps({"question": question, "best": output.best, "choices": told}, ensure_ascii=False))
        return 0
    width = max(len(choice.text) for choice in ranked)
    for choice in ranked:
        print(f"{choice.text:<{width}}  {choice.probability:6.1%}")
    return 0
