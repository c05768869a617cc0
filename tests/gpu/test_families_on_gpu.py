"""Every family on a CUDA device against transformers there: tokens and log-probabilities, graphs or none.

LLaVA runs on a CPU as well, so that these checks are themselves tried where there is no GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList

from opsin import LLM, SamplingParams
from tests.engine.conftest import assert_idle, picture
from tests.factories.families import FAMILIES
from tests.factories.family import Family, Size
from tests.models.driver import copy_with_weights

TOLERANCE = 5e-3  # of float32's log-probabilities, 1e-5 on a CPU; bfloat16's err by 0.03 to 0.2
LARGEST_BAR, MEAN_BAR = 1.5, 1.25  # times transformers' errors in bfloat16
NUM_DRAWS = 3  # of a checkpoint's weights
MAX_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
TOLD = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=20)
FEW_TOLD = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=20)
SMALL: Any = {"kv_cache_memory_bytes": 2**26, "media_workers": 0, "max_num_seqs": 8}  # few sizes of graphs
TRIED_ON_CPU = "llava"
RIGHT_FROM = {
    # Until then PaliGemma 2's last soft cap is left out, until 5.20 also those of its attention, and until 5.17 what it
    # generates counts as prompt, all of which sees itself.
    ("paligemma", "gemma2-window"): "5.23",
}


def over(pick: Callable[[Family], Sequence[str]]) -> Any:
    """Run a test over (family, name, device) for each name that ``pick`` finds in a row of the families' table."""
    cases = []
    for family in FAMILIES:
        for name in pick(family):
            cases.append(pytest.param(family, name, "cuda", id=f"{family.name}-{name}", marks=pytest.mark.gpu))
            if family.name == TRIED_ON_CPU:
                cases.append(pytest.param(family, name, "cpu", id=f"{family.name}-{name}-cpu"))
    return pytest.mark.parametrize(("family", "name", "device"), cases)


class Forced(LogitsProcessor):
    """Leaves ``generate`` no choice but these tokens."""

    def __init__(self, token_ids: Sequence[int], num_before: int) -> None:
        self.token_ids = token_ids
        self.num_before = num_before

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        only = torch.full_like(scores, float("-inf"))
        only[:, self.token_ids[input_ids.shape[1] - self.num_before]] = 0
        return only


class Answer(NamedTuple):
    """Tokens, and log-probabilities of the whole vocabulary at each of them."""

    token_ids: list[int]
    logprobs_TV: torch.Tensor


class Oracle(NamedTuple):
    """transformers' model of a checkpoint, on a device."""

    family: Family
    folder: Path
    model: Any

    @classmethod
    def of(cls, family: Family, folder: Path, device: str, dtype: torch.dtype) -> Oracle:
        return cls(family, folder, family.load(folder, dtype).to(device))

    @torch.inference_mode()
    def answer(self, prompt: Any, num_tokens: int, forced: Sequence[int] | None = None) -> Answer:
        """The greedy one, or what it says of the tokens that it is forced to take."""
        media = [] if isinstance(prompt, str) else prompt["multi_modal_data"]["image"]
        text = prompt if isinstance(prompt, str) else prompt["prompt"]
        inputs: dict[str, torch.Tensor] = {}
        for name, x in self.family.hf_inputs(self.folder, text, media).items():
            inputs[name] = x.to(self.model.device, self.model.dtype if x.is_floating_point() else None)
        num_before = inputs["input_ids"].shape[1]
        processors = [] if forced is None else [Forced(forced, num_before)]
        made = self.model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            logits_processor=LogitsProcessorList(processors),
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs_TV = torch.cat(made.logits).float().log_softmax(-1).cpu()
        return Answer(made.sequences[0, num_before:].tolist(), logprobs_TV)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def asked(family: Family, sizes: Sequence[Size], seed: int = 0) -> Any:
    """A prompt about pictures of these sizes."""
    if not sizes:
        return "USER: What is this? ASSISTANT:"
    images = [picture(seed + width * height + i, width, height) for i, (width, height) in enumerate(sizes)]
    text = f"USER: {family.signs(len(sizes))}\nWhat is this? ASSISTANT:"
    return {"prompt": text, "multi_modal_data": {"image": images}}


def ids(outputs: Sequence[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


class Told(NamedTuple):
    """The log-probabilities that an answer tells: of which step, of which token."""

    steps: list[int]
    token_ids: list[int]
    values: torch.Tensor

    @classmethod
    def by(cls, output: Any) -> Told:
        rows = enumerate(output.logprobs)
        told = [(step, token_id, entry.logprob) for step, row in rows for token_id, entry in row.items()]
        steps, token_ids, values = (list(column) for column in zip(*told, strict=True))
        return cls(steps, token_ids, torch.tensor(values))

    def of(self, logprobs_TV: torch.Tensor) -> torch.Tensor:
        """The same steps' and tokens'."""
        return logprobs_TV[self.steps, self.token_ids]


@over(lambda family: family.served)
def test_float32_answers_equal_transformers_there(family: Family, name: str, device: str, tmp_path: Path):
    folder = family.write(tmp_path, family.shapes[name])
    prompts = [asked(family, sizes) for sizes in family.asked]
    oracle = Oracle.of(family, folder, device, torch.float32)
    answers = [oracle.answer(prompt, MAX_TOKENS) for prompt in prompts]
    expected = [answer.token_ids for answer in answers]
    if Version(transformers.__version__) < Version(RIGHT_FROM.get((family.name, name), "0")):
        answers = []
        with LLM(str(folder), device="cpu", dtype="float32", **SMALL) as llm:  # by itself held to one that is right
            expected = ids(llm.generate(prompts, GREEDY, use_tqdm=False))
    for enforce_eager in (False, True):  # with graphs, and without
        with LLM(str(folder), device=device, dtype="float32", enforce_eager=enforce_eager, **SMALL) as llm:
            assert ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
            outputs = llm.generate(prompts, TOLD, use_tqdm=False)
            assert ids(outputs) == expected
            assert_idle(llm)
        for output, answer in zip(outputs, answers, strict=False):
            told = Told.by(output.outputs[0])
            torch.testing.assert_close(told.values, told.of(answer.logprobs_TV), atol=TOLERANCE, rtol=0)


class Errors(NamedTuple):
    """Of log-probabilities, beside the exact ones."""

    largest: float
    mean_square_root: float

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> Errors:
        errors = torch.cat(list(parts))
        return cls(float(errors.abs().max()), float(errors.square().mean().sqrt()))


def bfloat16_errors(family: Family, ours: Path, theirs: Path, device: str) -> tuple[Errors, Errors]:
    """Of opsin and of transformers in bfloat16, the truth being float32's log-probabilities by transformers. All go
    through the same tokens: those that opsin takes in bfloat16. A picture's rounding is felt in all of an answer, so
    there are many.

    Args:
        ours: the checkpoint that opsin runs; ``theirs``: transformers'.
    """
    sizes = [size for prompt in family.asked for size in prompt]
    prompts = [asked(family, [sizes[i % len(sizes)]], seed=100 * i) for i in range(24)]
    with LLM(str(ours), device=device, dtype="bfloat16", **SMALL) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, FEW_TOLD, use_tqdm=False)]
    exact, rounded = (Oracle.of(family, theirs, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    our_errors: list[torch.Tensor] = []
    their_errors: list[torch.Tensor] = []
    for prompt, output in zip(prompts, outputs, strict=True):
        told = Told.by(output)
        forced = output.token_ids
        truth, near = (told.of(model.answer(prompt, len(forced), forced).logprobs_TV) for model in (exact, rounded))
        our_errors.append(told.values - truth)
        their_errors.append(near - truth)
    return Errors.of(our_errors), Errors.of(their_errors)


@over(lambda family: family.served[:1])
def test_bfloat16_errs_little_more_than_transformers(family: Family, name: str, device: str, tmp_path: Path):
    """By the largest error and by all of them. A single prompt decides the largest: over 30 draws of each family's
    weights, on a CPU, opsin's was 0.4 to 2.1 times that of transformers, whose own with eager attention was 0.6 to 2.2
    times that with SDPA. So the middle one of three draws counts. Root mean squares were 0.71 to 1.14 times, and 0.85
    to 1.25.
    """
    shape = family.shapes[name]
    ratios: list[Errors] = []
    for draw in range(NUM_DRAWS):
        folder = family.write(tmp_path / str(draw), replace(shape, seed=shape.seed + 100 * draw))
        ours, theirs = bfloat16_errors(family, folder, folder, device)
        ratios.append(Errors(*(a / b for a, b in zip(ours, theirs, strict=True))))
    largest, mean_square_root = (statistics.median(values) for values in zip(*ratios, strict=True))
    assert largest <= LARGEST_BAR, ratios
    assert mean_square_root <= MEAN_BAR, ratios


def test_weights_of_one_bit_less_err_too_much(tmp_path: Path):
    (family,) = (family for family in FAMILIES if family.name == TRIED_ON_CPU)
    whole = family.write(tmp_path / "whole", family.shapes[family.served[0]])
    weights = {
        name: ((x.view(torch.int32) + 2**16) & -(2**17)).view(torch.float32)  # 6 bits behind the point, of bfloat16's 7
        for name, x in load_file(whole / "model.safetensors").items()
    }
    ours, theirs = bfloat16_errors(family, copy_with_weights(whole, tmp_path / "cut", weights), whole, "cpu")
    assert ours.mean_square_root > MEAN_BAR * theirs.mean_square_root
