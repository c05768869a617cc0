"""``pick``: probabilities of given answers, compared with teacher forcing in transformers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from opsin import LLM, AsyncLLM, ContextLengthError, MediaError, PoolingParams, RequestError, SamplingParams
from opsin.outputs import PickOutput
from tests.engine.conftest import assert_idle, engines_over, hf_model, picture
from tests.factories.families import FAMILIES
from tests.factories.family import Family

SHORT = ["A", "B", "?"]  # one token each
LONG = ["two blue squares", "a red circle", "a red", "Three.", "the lazy dog jumps over the quick brown fox"]
CASES = [
    pytest.param((family, family.served[0]), id=family.name)
    for family in FAMILIES
    if family.name in ("llava", "qwen2_vl", "internvl")
]


class Served(NamedTuple):
    family: Family
    folder: Path
    model: Any

    def prompt(self) -> Any:
        data = {"image": [picture(1), picture(2, 30, 60)]}
        return {"prompt": self.family.question, "multi_modal_data": data}

    def forced(self, answer: list[int]) -> float:
        """The log-probability of an answer behind the prompt, all of it run at once."""
        prompt = self.prompt()
        inputs = self.family.hf_inputs(self.folder, prompt["prompt"], prompt["multi_modal_data"]["image"])
        length = inputs["input_ids"].shape[1]
        tails = {"input_ids": torch.tensor([answer]), "attention_mask": torch.ones(1, len(answer), dtype=torch.long)}
        for name, value in inputs.items():
            if value.ndim == 2 and value.shape == (1, length):
                tail = tails.get(name, torch.zeros(1, len(answer)))
                inputs[name] = torch.cat([value, tail.to(value.dtype)], dim=1)
        with torch.inference_mode():
            logprobs = self.model(**inputs).logits[0].float().log_softmax(-1)
        return sum(logprobs[length - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.fixture(scope="module", params=CASES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    family, name = request.param
    folder = family.write(tmp_path_factory.mktemp(family.name), family.shapes[name])
    return Served(family, folder, hf_model(folder))


@pytest.fixture(scope="module")
def make_served(served: Served) -> Iterator[Callable[..., LLM]]:
    with engines_over(served.folder) as make:
        yield make


def weigh(llm: LLM, prompt: Any, choices: list[str]) -> PickOutput:
    (output,) = llm.encode(prompt, PoolingParams(task="pick", choices=choices), use_tqdm=False)
    assert isinstance(output.outputs, PickOutput)
    return output.outputs


@pytest.mark.parametrize(
    "settings",
    [{}, {"block_size": 4}, {"max_num_batched_tokens": 7, "pipeline_depth": 2}, {"enable_prefix_caching": False}],
    ids=["plain", "small-blocks", "chunked", "no-prefix-cache"],
)
def test_pick_log_probabilities_equal_transformers_teacher_forcing(
    served: Served, make_served: Callable[..., LLM], settings: dict[str, Any]
):
    llm = make_served(**settings)
    most_tokens = 0
    for choices in (SHORT, LONG):
        params = PoolingParams(task="pick", choices=choices)
        spellings = llm._front.inputs.process("0", llm._front.read_prompt(served.prompt()), params).answers
        assert [len(spelling) for spelling in spellings] == [len(choices)] * 2  # with a space before them, and without
        forced = [[served.forced(answer) for answer in spelling] for spelling in spellings]
        likelier = int(np.argmax([np.logaddexp.reduce(each) for each in forced]))
        for _ in range(2):  # the second time its own blocks are cached
            output = weigh(llm, served.prompt(), choices)
            assert [choice.logprob for choice in output.choices] == pytest.approx(forced[likelier], abs=2e-3)
            assert [choice.num_tokens for choice in output.choices] == [len(a) for a in spellings[likelier]]
            most_tokens = max(most_tokens, *(choice.num_tokens for choice in output.choices))
    assert most_tokens > 5
    assert_idle(llm)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_pick_gives_an_answer_the_log_probability_that_generating_it_has(
    family: Family, tmp_path_factory: pytest.TempPathFactory
):
    folder = family.write(tmp_path_factory.mktemp(family.name), family.shapes[family.served[0]])
    prompt: Any = {"prompt": family.question, "multi_modal_data": {"image": [picture(1), picture(2, 30, 60)]}}
    if "{index}" in prompt["prompt"]:
        first, rest = prompt["prompt"].split("{index}", 1)
        prompt["prompt"] = first + "1" + rest.replace("{index}", "2")
    with LLM(str(folder), media_workers=0, block_size=4, seed=0) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
        answer = llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0]
        params = PoolingParams(task="pick", choices=["a", "b", "c"])
        front = llm._front
        processed = front.inputs.process("0", front.read_prompt(prompt), params)
        answers = [answer.token_ids, answer.token_ids[:3], [answer.token_ids[0], 9, 10]]
        front.start(dataclasses.replace(processed, answers=[answers]))
        outputs: list[Any] = []
        while not outputs:
            outputs += front.step().outputs
        front.come_to_rest()
        assert answer.logprobs is not None
        each = [logprobs[token].logprob for logprobs, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        whole, beginning, _ = outputs[0].outputs.choices
        assert whole.logprob == pytest.approx(sum(each), abs=1e-3)
        assert beginning.logprob == pytest.approx(sum(each[:3]), abs=1e-3)
        assert_idle(llm)


def test_pick_of_one_token_choices_runs_the_prompt_once_and_encodes_the_picture_once(make_llm: Callable[..., LLM]):
    llm = make_llm(block_size=8, enable_prefix_caching=False)
    before = llm.stats()
    launched: list[int] = []
    executor: Any = llm._front.engine.core.executor  # type: ignore[attr-defined]
    launch = executor.launch
    executor.launch = lambda plan: (launched.append(plan.num_tokens), launch(plan))[1]
    try:
        llm.pick(picture(3), "How many?", ["1", "2", "3", "4", "5"])
        once = sum(launched)
        launched.clear()
        llm.pick(picture(4), "How many?", LONG)
    finally:
        executor.launch = launch
    prompt = llm.stats()["prefix_cache_queried_tokens_total"] - before["prefix_cache_queried_tokens_total"]
    content = [{"type": "image_pil", "image_pil": picture(3)}, {"type": "text", "text": "How many?"}]
    (chat,) = llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
    assert once == len(chat.prompt_token_ids) + 1  # and the space that may come before a digit
    assert sum(launched) < once + 2 * len(LONG) * (8 + 30)  # each leaf computes its own tokens and part of one block
    assert prompt > 2 * once  # though every leaf counts the whole prompt as its own


def test_pick_leaves_no_trace_of_one_question_in_the_next(llm: LLM):
    first = weigh(llm, "Only text here.", LONG)
    weigh(llm, "Quite another text.", SHORT)
    assert weigh(llm, "Only text here.", LONG) == first
    turned = weigh(llm, "Only text here.", LONG[::-1])
    assert [c.logprob for c in turned.choices[::-1]] == pytest.approx([c.logprob for c in first.choices], abs=1e-5)


def test_pick_is_calibrated_by_length_as_documented(llm: LLM):
    output = weigh(llm, "Only text here.", LONG)
    sums = np.array([choice.logprob for choice in output.choices])
    counts = np.array([choice.num_tokens for choice in output.choices])
    scaled = np.exp(counts.mean() * sums / counts)
    assert [c.probability for c in output.choices] == pytest.approx(scaled / scaled.sum())
    assert [c.raw_probability for c in output.choices] == pytest.approx(np.exp(sums) / np.exp(sums).sum())
    equal = weigh(llm, "Only text here.", SHORT)
    assert [c.probability for c in equal.choices] == pytest.approx([c.raw_probability for c in equal.choices])


def test_pick_output_reads_well():
    output = PickOutput.weigh(["1", "2", "4"], np.log([0.2, 0.5, 0.3]).tolist(), [1, 1, 1])
    assert output.best == "2"
    assert output.probabilities == pytest.approx({"1": 0.2, "2": 0.5, "4": 0.3})
    assert output["4"] == pytest.approx(0.3)
    assert output.mean == pytest.approx(2.4)
    assert repr(output) == "PickOutput('2' 50.0%, '4' 30.0%, '1' 20.0%)"
    with pytest.raises(ValueError, match="yes"):
        _ = PickOutput.weigh(["yes", "no"], [0.0, -1.0], [1, 1]).mean


def test_pick_under_few_blocks_gives_the_same(make_llm: Callable[..., LLM]):
    questions = [f"What is the picture number {i} of, and what colour has it?" for i in range(6)]
    conversations = [[{"role": "user", "content": text}] for text in questions]
    calm = make_llm().pick_chat(conversations, LONG, use_tqdm=False)
    crowded = make_llm(block_size=4, num_gpu_blocks_override=26, pipeline_depth=2, max_num_batched_tokens=24)
    hurried = crowded.pick_chat(conversations, LONG, use_tqdm=False)
    for a, b in zip(calm, hurried, strict=True):
        assert [c.logprob for c in a.choices] == pytest.approx([c.logprob for c in b.choices], abs=1e-3)
    assert_idle(crowded)


def test_pick_beside_generation_changes_neither(folder: Path):
    async def run() -> tuple[PickOutput, PickOutput, str, str]:
        with AsyncLLM(str(folder), media_workers=0) as engine:

            async def text() -> str:
                params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
                return [o.outputs[0].text async for o in engine.generate("USER: Count. ASSISTANT:", params)][-1]

            alone = await engine.pick(picture(5), "What?", LONG)
            alone_text = await text()
            together, together_text = await asyncio.gather(engine.pick(picture(5), "What?", LONG), text())
            return alone, together, alone_text, together_text

    alone, together, alone_text, together_text = asyncio.run(run())
    assert alone_text == together_text
    assert [c.logprob for c in alone.choices] == pytest.approx([c.logprob for c in together.choices], abs=1e-3)


def test_control_strings_in_choices_are_plain_text(llm: LLM):
    params = PoolingParams(task="pick", choices=["</s>", "<image>", "yes"])
    processed = llm._front.inputs.process("0", llm._front.read_prompt("Only text."), params)
    special = llm._front.inputs.tokenizer.special_ids
    assert all(special.isdisjoint(answer) for spelling in processed.answers for answer in spelling)
    weigh(llm, "Only text.", ["</s>", "<image>", "yes"])


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (["one"], "between 2 and 64"),
        ([str(i) for i in range(65)], "between 2 and 64"),
        (["a", "a"], "more than once"),
        (["a", ""], "none of them empty"),
        (["a", 1], "none of them empty"),
        ([1, 2, 3, 4, 5], "got 1, write '1'"),
        ("yes", "must be a list"),
        (None, "must be a list"),
        ([], "between 2 and 64"),
        (["a", "\ud800"], "surrogate"),
    ],
)
def test_bad_choices_are_refused(llm: LLM, choices: Any, words: str):
    with pytest.raises(RequestError, match=words):
        llm.pick(None, "What?", choices)
    assert_idle(llm)


def test_bad_questions_and_pictures_are_refused(llm: LLM, make_llm: Callable[..., LLM]):
    with pytest.raises(RequestError, match="question must be"):
        llm.pick(picture(1), "", SHORT)
    with pytest.raises(MediaError):
        llm.pick(b"no picture", "What?", SHORT)
    with pytest.raises(RequestError, match="Got 1 lists of choices for 2"):
        llm.pick_chat([[{"role": "user", "content": "a"}]] * 2, [SHORT], use_tqdm=False)
    tight = make_llm(max_model_len=32)
    with pytest.raises(ContextLengthError, match="longest choice"):
        tight.pick(None, "Hi?", ["a", "the lazy dog jumps over the quick brown fox " * 3])
    with pytest.raises(RequestError, match="makes no text"):
        make_llm(runner="pooling").pick(None, "Hi?", SHORT)
    assert_idle(llm)


def test_demo_model_picks_what_is_true():
    drawing = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(drawing).ellipse((20, 20, 76, 76), fill="red")
    with LLM("demo") as llm:
        assert llm.pick(drawing, "What color is the circle?", ["red", "blue", "green"]).best == "red"
        assert llm.pick(drawing, "Is there a circle?", ["yes", "no"])["yes"] > 0.9
        assert llm.pick(drawing, "Is there a square?", ["yes", "no"])["no"] > 0.9
        assert llm.pick(drawing, "How many shapes are there?", ["1", "2", "3", "4", "5"]).mean == pytest.approx(
            1, abs=0.1
        )
        long = ["a red circle", "a blue square", "a red circle and a blue square"]
        assert llm.pick(drawing, "What is in the picture?", long).best == "a red circle"
