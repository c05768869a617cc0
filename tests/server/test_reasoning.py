"""Thoughts before an answer, told apart: however the text is cut, whole and in streams, before calls and forms."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from opsin import LLM, AsyncLLM, ConfigError, SamplingParams
from opsin.cli import flags
from opsin.cli.main import build_parser
from opsin.cli.serve import server_config
from opsin.config import EngineConfig
from opsin.outputs import RequestOutput
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from opsin.server.reasoning import REASONING_PARSERS, Marks, MarkTokens, ReasoningReader
from tests.server.conftest import NAME, assert_idle, chat, serving
from tests.server.test_tools import CALL, COUNT, SHOW

QWEN, GLM, R1 = (REASONING_PARSERS[name] for name in ("qwen3", "glm45", "deepseek_r1"))
NO_TOKENS = MarkTokens(None, None, False)

# Opens the thoughts as Qwen3-VL-Thinking's does, or closes them at once where thinking is switched off.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content or '' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}"
)
SILENT = "{{ messages[0].content }}"  # says nothing of thoughts


# ------------------------------------------------------------------------------------------------- the reader


class Case(NamedTuple):
    marks: Marks
    state: bool | None
    text: str
    thought: str
    answer: str


CASES = [
    Case(QWEN, True, "Well, two.\n</think>\n\nTwo cats.", "Well, two.", "Two cats."),
    Case(QWEN, True, "<think>\nWell.</think>Two", "Well.", "Two"),  # it begins what the prompt has begun
    Case(QWEN, True, "a < b </ think> </thin\n\n</think> c </think> d", "a < b </ think> </thin", "c </think> d"),
    Case(QWEN, True, "So many words </thi", "So many words </thi", ""),
    Case(QWEN, True, "Cut \n\n", "Cut", ""),
    Case(QWEN, True, " </think> \n ", "", ""),
    Case(QWEN, True, "", "", ""),
    Case(QWEN, True, "a\n\nb  c</think>d\n\ne \n", "a\n\nb  c", "d\n\ne \n"),
    Case(QWEN, False, "<think>is</think> text", "", "<think>is</think> text"),
    Case(QWEN, False, "  as it is", "", "  as it is"),
    Case(QWEN, None, "  As it is, <think>no</think>", "", "  As it is, <think>no</think>"),
    Case(QWEN, None, "<thinking cap> on", "", "<thinking cap> on"),
    Case(QWEN, None, "<thi", "", "<thi"),
    Case(GLM, None, "<think>Hm.</think><answer>Two</answer>", "Hm.", "<answer>Two</answer>"),
    Case(
        GLM, None, "\n<think>\nHm.\n</think>\n<|begin_of_box|>2<|end_of_box|>", "Hm.", "<|begin_of_box|>2<|end_of_box|>"
    ),
    Case(GLM, None, "<think>never closed", "never closed", ""),
    Case(R1, None, "Hm.</think>Two", "Hm.", "Two"),  # without the first mark
    Case(R1, None, "<think>\nHm.\n</think>\n\nTwo", "Hm.", "Two"),
    Case(R1, None, "Hm.", "Hm.", ""),
    Case(R1, False, "Two", "", "Two"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.text)[:24])
def test_reader_tells_thoughts_and_answer_however_the_text_is_cut(case: Case, size: int):
    reader = ReasoningReader(case.marks, case.state, NO_TOKENS)
    pieces = [case.text[i : i + size] for i in range(0, len(case.text), size)] or [""]
    told = [reader.take(piece, [], ended=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert "".join(thought for thought, _ in told) == case.thought
    assert "".join(answer for _, answer in told) == case.answer
    assert reader.has_answer == bool(case.answer)


def test_reader_sends_text_on_at_once_unless_a_mark_may_begin():
    reader = ReasoningReader(QWEN, True, NO_TOKENS)
    pieces = ["\nWell", ", ", "two", " </thi", "s> is no mark", "</think", ">\n", "\nTwo", "<"]
    told = [reader.take(piece, [], ended=False) for piece in pieces]
    assert told == [
        ("Well", ""),
        (",", ""),
        (" two", ""),
        ("", ""),
        (" </this> is no mark", ""),
        ("", ""),
        ("", ""),
        ("", "Two"),
        ("", "<"),
    ]


@pytest.mark.parametrize(
    ("state", "ids", "text", "count"),
    [
        (True, [5, 6, 7, 2, 8, 1, 9], "a b c</think>d<think>e", 3),
        (None, [1, 5, 6, 2, 8], "<think>a b</think>c", 2),
        (None, [5, 1, 6], "a<think>b", 0),  # no thought: it does not begin the answer
        (True, [5, 6], "a b", 2),
        (False, [5, 1, 6, 2], "a<think>b</think>", 0),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_reader_counts_the_tokens_between_the_marks(
    state: bool | None, ids: list[int], text: str, count: int, size: int
):
    reader = ReasoningReader(GLM, state, MarkTokens(1, 2, False))
    for i in range(0, len(ids), size):
        reader.take(text if i == 0 else "", ids[i : i + size], ended=i + size >= len(ids))
    assert reader.num_tokens == count


def test_reader_without_tokens_for_its_marks_counts_nothing():
    reader = ReasoningReader(QWEN, True, MarkTokens(1, None, False))
    reader.take("a</think>b", [1, 2, 3], ended=True)
    assert reader.num_tokens is None


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|assistant|>\n<think></think>", False),
        ("<|assistant|>\n<think>x</think>y<|user|>z<|assistant|>", None),  # of an earlier turn
        ("", None),
    ],
)
def test_marks_see_at_the_prompts_end_whether_thoughts_are_open(prompt: str, state: bool | None):
    assert QWEN.state_after(prompt) is state


@pytest.mark.parametrize(
    ("begun", "is_open"), [("", False), ("Two", False), ("<think>Hm", True), ("<think>Hm</think>Two", False)]
)
def test_marks_see_in_a_message_gone_on_with_whether_thoughts_are_open(begun: str, is_open: bool):
    assert QWEN.state_within(begun) is is_open


# ----------------------------------------------------------------------------------------- an engine with lines


class Scripted:
    """An engine whose answers say what they are told to, piece by piece; otherwise the real one."""

    def __init__(self, engine: AsyncLLM, *answers: Sequence[str], reason: str = "stop") -> None:
        self._engine = engine
        self._answers = answers
        self._reason: Any = reason

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def stream(self, processed: Any, output_kind: Any = "cumulative") -> AsyncGenerator[Any, None]:
        async for output in self._engine.stream(processed, "final"):
            assert isinstance(output, RequestOutput)
            ends = [replace(answer, text="", finish_reason=self._reason) for answer in output.outputs]
            if output_kind == "delta":
                for i in range(max(map(len, self._answers))):
                    parts = [
                        replace(answer, text=said[i], token_ids=[], logprobs=None, finish_reason=None)
                        for answer, said in zip(ends, self._answers, strict=True)
                        if i < len(said)
                    ]
                    yield replace(output, finished=False, outputs=parts)
            else:
                ends = [replace(end, text="".join(said)) for end, said in zip(ends, self._answers, strict=True)]
            yield replace(output, outputs=ends)


@contextmanager
def talking(engine: Any, name: str = "qwen3", **settings: Any) -> Iterator[openai.OpenAI]:
    """A client of a server with a reasoning parser."""
    config = ServerConfig(
        served_model_name=(NAME,),
        reasoning_parser=name,  # type: ignore[arg-type]
        tool_call_parser="hermes",
        trust_request_chat_template=True,
        **settings,
    )
    app = create_app(engine, config, model=NAME)
    with serving(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


class Told(NamedTuple):
    """What a client sees of one answer."""

    reasoning: str | None
    content: str | None
    calls: list[str]
    reason: str


def ask(sdk: openai.OpenAI, *, stream: bool, template: str | None = TEMPLATE, **fields: Any) -> list[Told]:
    """The answers to a chat, read as openai-python's users read them."""
    extra = {"chat_template": template, **fields.pop("extra_body", {})}
    given = {"max_tokens": 2, **fields}
    messages = given.pop("messages", [{"role": "user", "content": "How many cats?"}])
    if not stream:
        answers = sdk.chat.completions.create(model=NAME, messages=messages, extra_body=extra, **given)
        return [
            Told(
                getattr(choice.message, "reasoning", None),
                choice.message.content,
                [call.function.name for call in choice.message.tool_calls or []],
                choice.finish_reason,
            )
            for choice in answers.choices
        ]
    found: dict[int, Told] = {}
    for chunk in sdk.chat.completions.create(model=NAME, messages=messages, extra_body=extra, stream=True, **given):
        for choice in chunk.choices:
            told = found.get(choice.index, Told(None, None, [], ""))
            thought, content = getattr(choice.delta, "reasoning", None), choice.delta.content
            calls = [call.function.name for call in choice.delta.tool_calls or [] if call.function]
            assert not (thought and told.content), "thoughts come first"
            found[choice.index] = Told(
                (told.reasoning or "") + thought if thought else told.reasoning,
                (told.content or "") + content if content else told.content,
                [*told.calls, *[name for name in calls if name]],
                choice.finish_reason or told.reason,
            )
    return [found[i] for i in sorted(found)]


BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@BOTH
@pytest.mark.parametrize(
    ("name", "template", "said", "thought", "content"),
    [
        ("qwen3", TEMPLATE, ["Let me see", ".\n</th", "ink>", "\n\n", "Two", " cats."], "Let me see.", "Two cats."),
        ("deepseek_r1", TEMPLATE, ["Hm", "\n</think>\n\nTwo"], "Hm", "Two"),
        ("deepseek_r1", SILENT, ["Hm", "</think>", "Two"], "Hm", "Two"),
        ("glm45", SILENT, ["<th", "ink>Hm</think", "><answer>", "Two</answer>"], "Hm", "<answer>Two</answer>"),
        ("glm45", SILENT, ["Two ", "cats"], None, "Two cats"),
        ("qwen3", SILENT, ["Two ", "cats"], None, "Two cats"),
    ],
)
def test_sdk_reads_thoughts_apart_from_the_answer(
    engine: AsyncLLM, name: str, template: str, said: list[str], thought: str | None, content: str, stream: bool
):
    with talking(Scripted(engine, said), name) as sdk:
        assert ask(sdk, stream=stream, template=template) == [Told(thought, content, [], "stop")]


@BOTH
def test_thoughts_that_are_never_closed_are_no_answer(engine: AsyncLLM, stream: bool):
    with talking(Scripted(engine, ["Hm, ", "so </think"], reason="length")) as sdk:
        assert ask(sdk, stream=stream) == [Told("Hm, so </think", None, [], "length")]


@BOTH
def test_thinking_that_the_template_has_switched_off_leaves_all_to_the_answer(engine: AsyncLLM, stream: bool):
    with talking(Scripted(engine, ["Two ", "</think> cats"])) as sdk:
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        assert ask(sdk, stream=stream, extra_body=off) == [Told(None, "Two </think> cats", [], "stop")]


@BOTH
def test_thinking_switched_off_for_all_is_switched_on_by_a_request(engine: AsyncLLM, stream: bool):
    with talking(Scripted(engine, ["a", "</think>b"]), default_chat_template_kwargs={"enable_thinking": False}) as sdk:
        assert ask(sdk, stream=stream) == [Told(None, "a</think>b", [], "stop")]
        on = {"chat_template_kwargs": {"enable_thinking": True}}
        assert ask(sdk, stream=stream, extra_body=on) == [Told("a", "b", [], "stop")]


@BOTH
def test_samples_of_one_prompt_think_each_for_itself(engine: AsyncLLM, stream: bool):
    with talking(Scripted(engine, ["One</th", "ink>1"], ["Two", " still", " thinking"], ["</think>3"])) as sdk:
        told = ask(sdk, stream=stream, n=3)
    assert told == [
        Told("One", "1", [], "stop"),
        Told("Two still thinking", None, [], "stop"),
        Told(None, "3", [], "stop"),
    ]


@BOTH
def test_include_reasoning_false_leaves_the_thoughts_out(engine: AsyncLLM, stream: bool):
    with talking(Scripted(engine, ["Hm", " hm", " hm", "</think>", "Two"])) as sdk:
        body = {"chat_template": TEMPLATE, "include_reasoning": False}
        messages: Any = [{"role": "user", "content": "How many?"}]
        fields: Any = {"model": NAME, "messages": messages, "max_tokens": 1, "extra_body": body}
        if stream:
            deltas = [chunk.choices[0].delta for chunk in sdk.chat.completions.create(**fields, stream=True)]
            assert not any(hasattr(delta, "reasoning") for delta in deltas)
            assert [delta.content for delta in deltas] == ["", "Two", None]  # the role, the answer, its end
        else:
            message = sdk.chat.completions.create(**fields).choices[0].message
            assert not hasattr(message, "reasoning")
            assert message.content == "Two"


def test_server_without_a_parser_leaves_thoughts_in_the_content(engine: AsyncLLM):
    app = create_app(Scripted(engine, ["Hm</think>Two"]), ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with serving(app) as address, httpx.Client(base_url=address, trust_env=False) as client:
        answer = client.post("/v1/chat/completions", json=chat(max_tokens=1)).json()
    assert answer["choices"][0]["message"]["content"] == "Hm</think>Two"
    assert "reasoning" not in answer["choices"][0]["message"]
    assert "completion_tokens_details" not in answer["usage"]


@BOTH
def test_tools_are_read_from_what_follows_the_thoughts(engine: AsyncLLM, stream: bool):
    said = [f"I could {CALL[:20]}", f"{CALL[20:]}.</thi", f"nk>\n\nNow. {CALL[:7]}", CALL[7:]]
    with talking(Scripted(engine, said)) as sdk:
        told = ask(sdk, stream=stream, tools=[COUNT, SHOW])
    assert told == [Told(f"I could {CALL}.", "Now.", ["count"], "tool_calls")]


@BOTH
def test_tools_in_thoughts_without_end_are_not_called(engine: AsyncLLM, stream: bool):
    with talking(Scripted(engine, [CALL, CALL], reason="length")) as sdk:
        assert ask(sdk, stream=stream, tools=[COUNT]) == [Told(CALL * 2, None, [], "length")]


@BOTH
@pytest.mark.parametrize(
    ("begun", "thought", "content"),
    [
        ("<think>So", "far", "Two"),
        ("Two of", None, " far</think>Two"),
        ("<think>So</think>", None, " far</think>Two"),
    ],
)
def test_message_gone_on_with_thinks_on_if_it_was_thinking(
    engine: AsyncLLM, begun: str, thought: str | None, content: str, stream: bool
):
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": begun}]
    said = [" far</th", "ink>Two"]
    with talking(Scripted(engine, said)) as sdk:
        told = ask(sdk, stream=stream, messages=messages, extra_body={"continue_final_message": True})
    assert told == [Told(thought, content, [], "stop")]


# -------------------------------------------------------------------------------------------- the engine itself

VOCAB_SIZE, FIRST_SPARE = 480, 420  # the tiny model has rows for tokens that its tokenizer has not
NO_END = {"2": -100}  # its end token
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
NAMED = {"type": "function", "function": {"name": "count"}}
FORM = {"type": "object", "properties": {"many": {"enum": [1, 2]}}, "required": ["many"], "additionalProperties": False}


class Thinker(NamedTuple):
    """A server whose model closes its thoughts, and the tokens up to there, the mark itself included."""

    client: httpx.Client
    thought: list[int]


def with_tokens(source: Path, folder: Path, names: Mapping[int, str], *, is_special: bool) -> Path:
    """A copy of a checkpoint whose spare rows have names, and whose template opens thoughts."""
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i in range(FIRST_SPARE, VOCAB_SIZE):
        special = is_special and i in names
        tokenizer["added_tokens"].append({"id": i, "content": names.get(i, f"<r{i}>"), "special": special, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "special"])
def thinker(
    request: pytest.FixtureRequest, tiny_llava: Callable[[Any], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Thinker]:
    """Its marks are special tokens, or added ones that are not, as those of Qwen3."""
    from tests.factory import LlavaShape

    base, source = tmp_path_factory.mktemp("thinker"), tiny_llava(LlavaShape(num_kv_heads=2))
    names = {FIRST_SPARE: "<think>"}
    with LLM(str(with_tokens(source, base / "first", names, is_special=request.param)), media_workers=0) as llm:
        params = SamplingParams(temperature=0, max_tokens=60, logit_bias={2: -100})
        (output,) = llm.chat(chat()["messages"], params, use_tqdm=False)
        said = output.outputs[0].token_ids
    # What it says anyway becomes the mark that closes its thoughts.
    at = next(i for i, token in enumerate(said) if i > 2 and token > FIRST_SPARE and token not in said[:i])
    names[said[at]] = "</think>"
    folder = with_tokens(source, base / "second", names, is_special=request.param)
    with AsyncLLM(str(folder), media_workers=1) as engine:
        app = create_app(engine, ServerConfig(served_model_name=(NAME,), reasoning_parser="qwen3"), model=NAME)
        with serving(app) as address, httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            yield Thinker(client, said[: at + 1])
        assert_idle(app, engine)


def answered(thinker: Thinker, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only answer, and the usage."""
    body = chat(logit_bias=NO_END, return_token_ids=True, **{"max_tokens": 60, "ignore_eos": False, **fields})
    response = thinker.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0], response.json()["usage"]


def text_of(thinker: Thinker) -> str:
    """The thoughts' text."""
    return thinker.client.post("/detokenize", json={"tokens": thinker.thought[:-1]}).json()["prompt"].strip()


def events(thinker: Thinker, **fields: Any) -> list[dict[str, Any]]:
    body = chat(logit_bias=NO_END, stream=True, **{"max_tokens": 60, "ignore_eos": False, **fields})
    lines = thinker.client.post("/v1/chat/completions", json=body).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def joined(told: Sequence[dict[str, Any]], name: str) -> str:
    return "".join(event["choices"][0]["delta"].get(name, "") for event in told if event["choices"])


def test_thoughts_of_a_real_model_are_told_and_counted(thinker: Thinker):
    choice, usage = answered(thinker)
    assert choice["token_ids"][: len(thinker.thought)] == thinker.thought
    assert choice["message"]["reasoning"] == text_of(thinker)
    assert "think>" not in choice["message"]["content"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(thinker.thought) - 1}
    assert usage["completion_tokens"] == 60


def test_thoughts_of_a_real_model_stream_to_what_the_whole_answer_has(thinker: Thinker):
    choice, usage = answered(thinker, logprobs=True)
    told = events(thinker, logprobs=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert joined(told, "reasoning") == choice["message"]["reasoning"]
    assert joined(told, "content") == choice["message"]["content"]
    parts = [event["choices"][0]["logprobs"] for event in told if event["choices"]]
    entries = [entry for part in parts if part for entry in part["content"]]
    assert entries == choice["logprobs"]["content"]
    assert len(entries) == 60
    counts = [event["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in told[1:]]
    assert counts == sorted(counts)
    assert told[-1]["usage"]["completion_tokens_details"] == usage["completion_tokens_details"]


def test_thoughts_cut_at_max_tokens_are_counted_and_leave_no_content(thinker: Thinker):
    choice, usage = answered(thinker, max_tokens=3)
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "length"
    assert text_of(thinker).startswith(choice["message"]["reasoning"])
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}


def test_stop_strings_end_thoughts_as_well(thinker: Thinker):
    text = text_of(thinker)
    stop = next(char for char in text[1:] if char.isascii() and char.isprintable() and not char.isspace())
    choice, _ = answered(thinker, stop=[stop])
    assert choice["message"]["reasoning"] == text[: text.index(stop)].rstrip()
    assert choice["message"]["content"] is None
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"json": FORM}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": FORM}}},
    ],
    ids=["structured_outputs", "response_format"],
)
def test_form_of_an_answer_begins_behind_thoughts_that_are_free(thinker: Thinker, form: dict[str, Any]):
    choice, usage = answered(thinker, **form)
    assert choice["token_ids"][: len(thinker.thought)] == thinker.thought
    assert choice["message"]["reasoning"] == text_of(thinker)
    assert json.loads(choice["message"]["content"])["many"] in (1, 2)
    assert choice["finish_reason"] == "stop"
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(thinker.thought) - 1}
    told = events(thinker, **form)
    assert (joined(told, "reasoning"), joined(told, "content")) == (text_of(thinker), choice["message"]["content"])


def test_form_of_an_answer_holds_at_once_where_thinking_is_switched_off(thinker: Thinker):
    choice, usage = answered(thinker, structured_outputs={"choice": ["yes", "no"]}, **OFF)
    assert choice["message"]["content"] in ("yes", "no")
    assert choice["message"]["reasoning"] is None
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["any", "one"])
def test_demanded_calls_come_behind_the_thoughts(thinker: Thinker, choice: Any):
    told, _ = answered(thinker, tools=[COUNT], tool_choice=choice, parallel_tool_calls=False, max_tokens=200)
    (call,) = told["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"what", "most"}
    assert told["message"]["reasoning"] == text_of(thinker)
    assert told["message"]["content"] is None


@pytest.mark.parametrize("more", [0, 1])
def test_demanded_call_that_never_begins_is_none(thinker: Thinker, more: int):
    told, _ = answered(thinker, tools=[COUNT], tool_choice=NAMED, max_tokens=len(thinker.thought) - 1 + more)
    assert "tool_calls" not in told["message"]
    assert told["finish_reason"] == "length"


def test_rendered_chat_tells_where_the_form_begins(thinker: Thinker):
    path, form = "/v1/chat/completions/render", {"structured_outputs": {"choice": ["yes"]}}
    thinking = {"opens": FIRST_SPARE, "closes": thinker.thought[-1], "is_open": True}
    params = thinker.client.post(path, json=chat(**form)).json()["sampling_params"]
    assert params["structured_outputs"]["thinking"] == thinking
    params = thinker.client.post(path, json=chat(**form, **OFF)).json()["sampling_params"]
    assert "thinking" not in params["structured_outputs"]


def test_search_tells_thoughts_apart_as_well(thinker: Thinker):
    body = chat(use_beam_search=True, max_tokens=60)
    (choice,) = thinker.client.post("/v1/chat/completions", json=body).json()["choices"]
    greedy = thinker.client.post("/v1/chat/completions", json=chat(max_tokens=60)).json()["choices"][0]
    assert choice["message"]["reasoning"] == greedy["message"]["reasoning"]
    assert "think>" not in choice["message"]["content"]


def test_responses_hold_the_thoughts_in_their_text(thinker: Thinker):
    body = {"input": "What is this?", "temperature": 0, "max_output_tokens": 60, "logit_bias": NO_END}
    said = thinker.client.post("/v1/responses", json={**body, "skip_special_tokens": False}).json()
    (part,) = said["output"][0]["content"]
    thought, mark, _ = part["text"].partition("</think>")
    assert (thought.strip(), mark) == (text_of(thinker), "</think>")


@pytest.mark.parametrize(
    ("field", "form"),
    [
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("guided_regex", {"guided_regex": "a+"}),
        ("tools", {"tools": [COUNT], "tool_choice": "required"}),
    ],
)
def test_form_that_cannot_begin_behind_thoughts_is_a_400(engine: AsyncLLM, field: str, form: dict[str, Any]):
    with talking(engine) as sdk:  # whose tokenizer has no tokens for the marks
        body = {"chat_template": TEMPLATE, **form}
        with pytest.raises(openai.BadRequestError, match="behind what this model thinks") as caught:
            sdk.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hi"}], extra_body=body)
        assert caught.value.param == field
        body |= OFF
        sdk.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "Hi"}], max_tokens=30, extra_body=body
        )


def test_form_with_thoughts_of_the_clients_own_making_is_a_400(client: httpx.Client):
    form = {"choice": ["yes"], "thinking": {"opens": 1, "closes": 2}}
    response = client.post("/v1/chat/completions", json=chat(structured_outputs=form))
    assert response.status_code == 400
    assert "thinking" in response.json()["error"]["message"]


# ------------------------------------------------------------------------------------------ requests and settings


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_of_earlier_turns_reach_the_template(thinker: Thinker, name: str):
    said = {"role": "assistant", "content": "Two.", name: "One, and one. "}
    body = {"messages": [{"role": "user", "content": "Cats?"}, said, {"role": "user", "content": "Dogs?"}]}
    tokens = thinker.client.post("/tokenize", json=body).json()["tokens"]
    prompt = thinker.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert "assistant: One, and one. Two.\n" in prompt


def test_thoughts_that_are_no_text_are_a_400(client: httpx.Client):
    said = {"role": "assistant", "content": "Two.", "reasoning": {"text": "One"}}
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Cats?"}, said]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.1.reasoning"


def test_budget_of_thoughts_is_a_400(client: httpx.Client):
    response = client.post("/v1/chat/completions", json=chat(thinking_token_budget=100))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "thinking_token_budget"


def test_command_line_takes_the_names_of_the_parsers_and_no_others(capsys: pytest.CaptureFixture[str]):
    for name in REASONING_PARSERS:
        args = flags.parse(build_parser(), ["serve", "demo", "--enable-reasoning", "--reasoning-parser", name])
        assert server_config(args).reasoning_parser == name
    with pytest.raises(SystemExit) as ended:
        flags.parse(build_parser(), ["serve", "demo", "--reasoning-parser", "granite"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert all(name in told for name in ("granite", *REASONING_PARSERS))


def test_llm_says_that_the_parser_is_the_servers():
    with pytest.raises(ConfigError, match="reasoning_parser is a setting of 'opsin serve'"):
        EngineConfig.from_flat({"reasoning_parser": "qwen3"})
