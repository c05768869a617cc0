"""``opsin pick``: how probable each of some given answers is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from opsin.cli import pictures
from opsin.cli.flags import add_engine_flags, add_option, engine_settings
from opsin.cli.values import names
from opsin.params import PoolingParams

if TYPE_CHECKING:
    from opsin.cli.flags import Commands


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "pick",
        usage="opsin pick [options] PICTURE... QUESTION CHOICE CHOICE...",
        help="weigh given answers to a question about pictures",
        description="Tell how probable each of some given answers is, the most probable first. Nothing is generated.",
        epilog='example: opsin pick cat.jpg "Is there a cat?" yes no',
        allow_abbrev=False,
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="PICTURE, QUESTION, CHOICE",
        help="pictures by path or URL, then one quoted question, then its answers, spelt as the model would give them",
    )
    add_option(parser, "choices", tuple[str, ...], "The answers, where none stand behind the question.", ())
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Print no memory plan.")
    add_engine_flags(parser)
    parser.set_defaults(function=execute, parser=parser)


def _split(args: argparse.Namespace) -> tuple[list[str], str, list[str]]:
    """The pictures, the question and its answers."""
    sources, texts = pictures.split_inputs(args.inputs)
    question, answers = "".join(texts[:1]), texts[1:]
    if "choices" in args:
        if answers:
            args.parser.error("answers stand both free and behind --choices; write all of them as --choices yes,no")
        answers = list(args.choices)
    elif len(answers) == 1:  # no choice, unless it is a list
        answers = list(names(answers[0]))
    if not question or not answers:
        args.parser.error('give a question, and its answers behind it: "Is there a cat?" yes no')
    return sources, question, answers


def execute(args: argparse.Namespace) -> int:
    sources, question, choices = _split(args)
    PoolingParams(task="pick", choices=choices)  # fails here, before anything heavy is loaded
    messages = [pictures.user_message(sources, question)]
    import opsin

    with opsin.LLM(**engine_settings(args)) as llm:
        with pictures.named(sources, 0):
            (output,) = llm.pick_chat(messages, choices, use_tqdm=False)
    ranked = sorted(output.choices, key=lambda choice: -choice.probability)
    if args.json:
        told = {choice.text: {"probability": choice.probability, "logprob": choice.logprob} for choice in ranked}
        print(json.dumps({"question": question, "best": output.best, "choices": told}, ensure_ascii=False))
        return 0
    width = max(len(choice.text) for choice in ranked)
    for choice in ranked:
        print(f"{choice.text:<{width}}  {choice.probability:6.1%}")
    return 0
