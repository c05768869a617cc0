"""``opsin verify``: on this machine, with the weights that are here, does opsin compute what transformers computes?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from opsin.cli import environment
from opsin.cli.flags import add_engine_flags, add_model_place, engine_settings
from opsin.errors import ConfigError
from opsin.params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from opsin.cli.flags import Commands
    from opsin.cli.oracle import OracleAnswer
    from opsin.engine.checkpoint import Checkpoint
    from opsin.models.rule import MediaRule

_NUM_TOKENS = 16
_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest difference of a log-probability that is the dtype's doing."""

_PIXEL_TOLERANCE = 1e-6

_CASES = (
    ("one picture", ("animals.png",), "What is in the picture?"),
    ("another size", ("lunch.jpg",), "Describe this picture."),
    ("two pictures", ("shapes.png", "sign.png"), "What do these pictures have in common?"),
    ("text alone", (), "The capital of France is"),
)


class Verdict(NamedTuple):
    """One case. None stands for what could not be compared.

    Attributes:
        prompt_ids: the expanded prompts are equal.
        pixels: largest difference between the values that the towers get.
        same_tokens: how many leading tokens of the answer transformers would have chosen as well.
        logprob: largest difference of the chosen tokens' log-probabilities.
        near_tie: the first token that differs was as likely in transformers, within the tolerance.
    """

    case: str
    prompt_tokens: int
    prompt_ids: bool | None
    pixels: float | None
    same_tokens: int
    num_tokens: int
    logprob: float
    near_tie: bool

    def passes(self, tolerance: float) -> bool:
        same = self.same_tokens == self.num_tokens or self.near_tie
        pixels = self.pixels is None or self.pixels <= _PIXEL_TOLERANCE
        return same and pixels and self.prompt_ids is not False and self.logprob <= tolerance


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        usage="opsin verify [options] [MODEL]",
        help="compare a model's answers with transformers'",
        description="Run a model here in opsin and in transformers on the same prompts and pictures, and compare token "
        "ids, pixels and log-probabilities. Both are loaded, one after the other. Exit code 1 if they differ.",
        epilog="example: opsin verify Qwen/Qwen2-VL-2B-Instruct --dtype float32",
        allow_abbrev=False,
    )
    add_model_place(parser)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    add_engine_flags(parser)
    parser.set_defaults(function=execute, parser=parser)


def execute(args: argparse.Namespace) -> int:
    from opsin.config import EngineConfig
    from opsin.engine.checkpoint import Checkpoint

    settings: dict[str, Any] = {"max_num_seqs": 4, **engine_settings(args)}
    if settings.get("load_format") == "dummy":
        raise ConfigError("verify compares real weights; leave out load_format=dummy.")
    checkpoint = Checkpoint.open(EngineConfig.from_flat(settings))
    answers, dtype, device = _opsin_answers(settings, checkpoint)
    report: dict[str, Any] = {"model": str(settings.get("model", "demo")), "dtype": dtype, "device": device}
    try:
        oracle_name, verdicts = _compare(checkpoint, answers, dtype, device)
    except _NoOracleError as error:
        print(f"No verdict: {error}", file=sys.stderr)
        return 3
    tolerance = _TOLERANCE[dtype]
    agrees = all(verdict.passes(tolerance) for verdict in verdicts)
    report |= {"oracle": oracle_name, "agrees": agrees, "cases": [verdict._asdict() for verdict in verdicts]}
    if args.json:
        print(json.dumps({**report, "environment": environment.collect()}))
    else:
        print(_table(verdicts, tolerance))
        say = "agrees with" if agrees else "DIFFERS from"
        print(f"{report['model']} in {dtype} on {device}: opsin {say} {oracle_name}.")
    return 0 if agrees else 1


class _NoOracleError(Exception):
    """transformers does not have the model, or cannot load it here."""


class _Answer(NamedTuple):
    """What opsin made of one case."""

    case: str
    prompt: str
    pictures: list[Image.Image]
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    pixels: npt.NDArray[np.float32] | None


def _opsin_answers(settings: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[list[_Answer], str, str]:
    from opsin import LLM

    params = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True, logprobs=0)
    answers: list[_Answer] = []
    with LLM(**settings) as llm:
        for case, names, question in _CASES:
            most = checkpoint.rule.max_items("image")
            if most is not None and len(names) > most:
                continue
            pictures = [_picture(name) for name in names]
            prompt = _prompt(checkpoint.rule, len(pictures), question)
            given: Any = {"prompt": prompt, "multi_modal_data": {"image": pictures}} if pictures else prompt
            (output,) = llm.generate(given, params, use_tqdm=False)
            (answer,) = output.outputs
            told = answer.logprobs or []
            logprobs = [position[token].logprob for token, position in zip(answer.token_ids, told, strict=True)]
            pixels = _pixels(checkpoint.rule, pictures)
            answers.append(_Answer(case, prompt, pictures, output.prompt_token_ids, answer.token_ids, logprobs, pixels))
        return answers, llm.dtype, llm.device


def _prompt(rule: MediaRule, num_pictures: int, question: str) -> str:
    if not num_pictures:
        return question
    sign = rule.placeholder("image").text
    return "".join(sign.replace("{index}", str(i + 1)) + "\n" for i in range(num_pictures)) + question


def _picture(name: str) -> Image.Image:
    from PIL import Image

    with (resources.files("opsin.demo") / "pictures" / name).open("rb") as file:
        return Image.open(file).convert("RGB")


def _pixels(rule: Any, pictures: Sequence[Image.Image]) -> npt.NDArray[np.float32] | None:
    """The normalised values of all tiles, flat."""
    import numpy as np

    from opsin.media.ops import make_tiles

    if not pictures:
        return None
    parts: list[npt.NDArray[np.float32]] = []
    for picture in pictures:
        plan = rule.layout("image", picture.width, picture.height, 1, {}).plan
        tiles = np.empty(plan.num_bytes, np.uint8)
        make_tiles(picture, plan, tiles)
        table = rule.norm.table()
        parts.append(np.take_along_axis(table, tiles.reshape(-1, 3), axis=0).reshape(-1))
    return np.concatenate(parts)


def _compare(checkpoint: Checkpoint, answers: Sequence[_Answer], dtype: str, device: str) -> tuple[str, list[Verdict]]:
    import torch

    from opsin.cli.oracle import Oracle

    try:
        oracle = Oracle(checkpoint.files.folder, device, getattr(torch, dtype))
    except (ValueError, KeyError, ImportError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise _NoOracleError(
            f"transformers cannot load this model, so there is nothing to compare with: {reason}"
        ) from error
    verdicts: list[Verdict] = []
    for answer in answers:
        theirs = oracle.answer(answer.prompt, answer.pictures, answer.prompt_ids, answer.ids)
        verdicts.append(_verdict(answer, theirs, _TOLERANCE[dtype]))
    return oracle.name, verdicts


def _verdict(answer: _Answer, theirs: OracleAnswer, tolerance: float) -> Verdict:
    import numpy as np

    best = theirs.logprobs_TV.argmax(axis=1)
    ids = answer.ids[: len(best)]
    differs = np.flatnonzero(best != np.array(ids))
    same = int(differs[0]) if len(differs) else len(ids)
    chosen = theirs.logprobs_TV[np.arange(len(ids)), ids]
    gap = theirs.logprobs_TV[same].max() - chosen[same] if same < len(ids) else 0.0
    return Verdict(
        case=answer.case,
        prompt_tokens=len(answer.prompt_ids),
        prompt_ids=None if theirs.prompt_token_ids is None else theirs.prompt_token_ids == answer.prompt_ids,
        pixels=_pixel_difference(answer.pixels, theirs.pixels),
        same_tokens=same,
        num_tokens=len(ids),
        logprob=float(np.abs(chosen - np.array(answer.logprobs[: len(ids)])).max()),
        near_tie=bool(gap <= tolerance),
    )


def _pixel_difference(ours: npt.NDArray[np.float32] | None, theirs: npt.NDArray[np.float32] | None) -> float | None:
    """Between the sorted values, since every tower wants its pixels in another order; each may be given several times.

    None where the numbers of values do not fit, as with processors that pad.
    """
    import numpy as np

    if ours is None or theirs is None or not len(ours) or len(theirs) % len(ours):
        return None
    times = len(theirs) // len(ours)
    return float(np.abs(np.sort(theirs)[::times] - np.sort(ours)).max())


def _table(verdicts: Sequence[Verdict], tolerance: float) -> str:
    lines = [f"{'case':<14} {'prompt':>12} {'pixels':>8} {'tokens':>8} {'log-probability':>16}"]
    for verdict in verdicts:
        ids = {True: "same", False: "DIFFERS", None: "-"}[verdict.prompt_ids]
        pixels = "-" if verdict.pixels is None else f"{verdict.pixels:.1g}"
        tie = verdict.near_tie and verdict.same_tokens < verdict.num_tokens
        tokens = f"{verdict.same_tokens}/{verdict.num_tokens}" + "~" * tie
        lines.append(
            f"{verdict.case:<14} {verdict.prompt_tokens:>4} {ids:>7} {pixels:>8} {tokens:>8} {verdict.logprob:>16.2g}"
            + ("" if verdict.passes(tolerance) else "  <- differs")
        )
    notes = "prompt: token ids; pixels, log-probability: largest differences"
    if any(verdict.near_tie and verdict.same_tokens < verdict.num_tokens for verdict in verdicts):
        notes += "; ~: parts where two tokens were equally likely"
    return "\n".join([*lines, notes])
