import itertools
from typing import Any

import pytest
from PIL import Image

from opsin.errors import MediaError, RequestError, RequestFailedError
from opsin.outputs import CompletionOutput, Logprob, PoolingRequestOutput, RequestOutput, Thumbnails
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.output import OutputBatch, OutputKind, OutputProcessor
from opsin.processing.processor import InputProcessor
from opsin.types import RequestUpdate, TokenLogprob

TEXT = "How many cats are there? Three 😀 cats."


class Stream:
    """One request fed token by token."""

    def __init__(self, processor: InputProcessor, kind: OutputKind = "delta", **params: Any) -> None:
        self.outputs = OutputProcessor(processor.tokenizer, clock=itertools.count(100.0).__next__)
        request = processor.process(
            "r", processor.prompts.read("Hi"), SamplingParams(max_tokens=100, **params), arrival_s=99.0
        )
        self.ids = processor.tokenizer.encode(TEXT, add_special_tokens=False)
        self.children = self.outputs.add(request, kind)

    def feed(self, tokens: list[int], child: str = "r", **more: Any) -> OutputBatch:
        return self.outputs.update([RequestUpdate(request_id=child, token_ids=tokens, **more)])

    def run(self, reason: Any = "length", step: int = 1) -> tuple[list[CompletionOutput], list[str]]:
        seen: list[CompletionOutput] = []
        aborts: list[str] = []
        for i in range(0, len(self.ids), step):
            done = i + step >= len(self.ids)
            batch = self.feed(self.ids[i : i + step], finish_reason=reason if done else None)
            seen += [
                answer for output in batch.outputs if isinstance(output, RequestOutput) for answer in output.outputs
            ]
            aborts += batch.aborts
        return seen, aborts


@pytest.mark.parametrize("step", [1, 2, 100])
def test_deltas_add_up_and_cumulative_and_final_agree(processor: InputProcessor, step: int) -> None:
    deltas, _ = Stream(processor, "delta").run(step=step)
    growing, _ = Stream(processor, "cumulative").run(step=step)
    (final,), _ = Stream(processor, "final").run(step=step)
    assert "".join(d.text for d in deltas) == growing[-1].text == final.text == TEXT
    assert [t for d in deltas for t in d.token_ids] == growing[-1].token_ids == final.token_ids
    assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(growing))
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["cats"], "How many ", "cats"),
        (["ats are", "cats are t"], "How many c", "ats are"),
        (["there?", "cats are there?"], "How many ", "cats are there?"),
        (["😀"], "How many cats are there? Three ", "😀"),
        (["dogs", "cats!", "Three 😀 dog"], TEXT, None),
    ],
)
def test_stop_string_ends_the_text_before_itself_and_is_never_shown(
    processor: InputProcessor, stop: list[str], text: str, reason: str | None, step: int
) -> None:
    deltas, aborts = Stream(processor, "delta", stop=stop).run(step=step)
    assert "".join(d.text for d in deltas) == text
    assert all(text.startswith("".join(d.text for d in deltas[:i])) for i in range(len(deltas)))
    assert deltas[-1].stop_reason == reason
    assert deltas[-1].finish_reason == ("stop" if reason else "length")
    assert aborts == (["r"] if reason else [])


def test_stop_string_is_shown_on_request_and_later_tokens_are_dropped(processor: InputProcessor) -> None:
    stream = Stream(processor, "final", stop=["many c"], include_stop_str_in_output=True)
    (answer,), aborts = stream.run(step=100)
    assert answer.text == "How many c"
    assert aborts == ["r"]
    shown = processor.tokenizer.decode(answer.token_ids)
    assert shown.startswith("How many c")
    assert len(answer.token_ids) < len(stream.ids)
    assert stream.feed(stream.ids).outputs == []  # what was still in flight


def test_stop_string_before_min_tokens_does_not_count(processor: InputProcessor) -> None:
    deltas, _ = Stream(processor, "delta", stop=["cats"], min_tokens=12).run()
    assert "".join(d.text for d in deltas) == "How many cats are there? Three 😀 "


def test_end_token_gives_no_stop_reason_but_another_one_does(processor: InputProcessor) -> None:
    for token, reason in ((2, None), (7, 7)):
        stream = Stream(processor, "final", stop_token_ids=[7], skip_special_tokens=False)
        stream.feed(stream.ids[:2])
        batch = stream.feed([token], finish_reason="stop", stop_token_id=token)
        (output,) = batch.outputs
        assert isinstance(output, RequestOutput)
        answer = output.outputs[0]
        assert (answer.text, answer.finish_reason, answer.stop_reason) == ("How many", "stop", reason)
        assert answer.token_ids[-1] == token


def test_end_token_that_is_asked_for_as_a_stop_is_the_stop_reason(processor: InputProcessor) -> None:
    stream = Stream(processor, "final", stop_token_ids=[2], ignore_eos=True)
    (output,) = stream.feed([2], finish_reason="stop", stop_token_id=2).outputs
    assert isinstance(output, RequestOutput)
    assert output.outputs[0].stop_reason == 2


def test_text_held_back_for_a_stop_string_appears_when_the_answer_ends(processor: InputProcessor) -> None:
    stream = Stream(processor, "delta", stop=["cats are there? Four"])
    deltas, _ = stream.run()
    assert "".join(d.text for d in deltas) == TEXT
    stream = Stream(processor, "delta", stop=["cats are X"])
    stream.feed(stream.ids[:4])
    ids, output = stream.outputs.abort("r")
    assert ids == ["r"]
    assert isinstance(output, RequestOutput)
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].text == processor.tokenizer.decode(stream.ids[:4])[len("How many ") :]
    assert stream.outputs.abort("r") == ([], None)


def test_several_answers_finish_together_and_are_told_apart(processor: InputProcessor) -> None:
    stream = Stream(processor, "final", n=2, stop=["there"])
    assert [child.request_id for child in stream.children] == ["r-0", "r-1"]
    assert stream.feed(stream.ids[:2], "r-1", finish_reason="length").outputs == []
    batch = stream.feed(stream.ids, "r-0", num_cached_tokens=3)
    assert batch.aborts == ["r-0"]
    (output,) = batch.outputs
    assert isinstance(output, RequestOutput)
    assert [(a.index, a.text) for a in output.outputs] == [(0, "How many cats are "), (1, "How many")]
    assert output.finished
    assert output.num_cached_tokens == 3
    assert stream.outputs.num_unfinished == 0


def test_blocks_that_siblings_share_do_not_count_as_cached(processor: InputProcessor) -> None:
    stream = Stream(processor, "final", n=2)
    stream.feed([10], "r-0", finish_reason="length", num_cached_tokens=16)
    batch = stream.feed([11], "r-1", finish_reason="length", num_cached_tokens=32)
    (output,) = batch.outputs
    assert output.num_cached_tokens == 16


def test_streamed_answers_end_once(processor: InputProcessor) -> None:
    stream = Stream(processor, "delta", n=2)
    first = stream.feed(stream.ids[:1], "r-0", finish_reason="length").outputs
    second = stream.feed(stream.ids[:1], "r-1").outputs
    assert [[a.index for a in o.outputs] for o in (*first, *second) if isinstance(o, RequestOutput)] == [[0], [1]]


def test_failure_of_one_answer_fails_the_request_and_stops_its_siblings(processor: InputProcessor) -> None:
    for code, kind in ((None, RequestFailedError), ("image_parse_error", MediaError)):
        stream = Stream(processor, "final", n=3)
        stream.feed(stream.ids[:1], "r-2", finish_reason="length")
        batch = stream.feed([], "r-0", finish_reason="error", error="It broke.", error_code=code)
        assert isinstance(batch.failures["r"], kind)
        assert batch.aborts == ["r-1"]
        assert batch.outputs == []
        assert stream.outputs.num_unfinished == 0


def test_logprobs_are_named_and_summed(processor: InputProcessor) -> None:
    stream = Stream(processor, "final", logprobs=1, prompt_logprobs=0)
    chosen, other = stream.ids[1], stream.ids[0]
    entry = [TokenLogprob(chosen, -2.0, 2), TokenLogprob(other, -0.5, 1)]
    stream.feed([chosen], logprobs=[entry], prompt_logprobs=[None, [TokenLogprob(9, -1.0, 1)]])
    (output,) = stream.feed([chosen], logprobs=[entry], finish_reason="length").outputs
    assert isinstance(output, RequestOutput)
    answer = output.outputs[0]
    assert answer.cumulative_logprob == -4.0
    assert answer.logprobs is not None
    assert answer.logprobs[0] == {chosen: Logprob(-2.0, 2, " many"), other: Logprob(-0.5, 1, "How")}
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert set(output.prompt_logprobs[1] or ()) == {9}


def test_embedding_comes_with_its_prompt(processor: InputProcessor) -> None:
    outputs = OutputProcessor(processor.tokenizer)
    request = processor.process("e", processor.prompts.read("Hi"), PoolingParams())
    outputs.add(request)
    (output,) = outputs.update([RequestUpdate(request_id="e", embedding=[0.6, 0.8], finish_reason="stop")]).outputs
    assert isinstance(output, PoolingRequestOutput)
    assert output.outputs.embedding == [0.6, 0.8]
    assert output.prompt_token_ids == request.request.prompt_token_ids


def test_running_id_is_refused_a_second_time(processor: InputProcessor) -> None:
    outputs = OutputProcessor(processor.tokenizer)
    request = processor.process("a", processor.prompts.read("Hi"), SamplingParams())
    outputs.add(request)
    with pytest.raises(RequestError, match="ids must be unique"):
        outputs.add(request)


def test_metrics_follow_the_clock(processor: InputProcessor) -> None:
    stream = Stream(processor, "cumulative")
    stream.feed(stream.ids[:1])
    (output,) = stream.feed(stream.ids[1:4], finish_reason="length").outputs
    assert isinstance(output, RequestOutput)
    assert output.metrics is not None
    assert output.metrics.time_to_first_token == 1.0
    assert output.metrics.tokens_per_second == 4 / 2.0
    assert output.metrics.finished_time == 101.0


def test_notebook_view_shows_pictures_and_escapes_text() -> None:
    class Picture:
        def __init__(self, broken: bool) -> None:
            self.broken = broken

        def decode(self) -> Image.Image:
            if self.broken:
                raise OSError
            return Image.new("RGB", (800, 400), "red")

    thumbnails = Thumbnails([Picture(False), Picture(True)])
    output = RequestOutput(
        "r", "<b>hi</b>", [1, 2], None, [CompletionOutput(0, "<script>", [5])], True, thumbnails=thumbnails
    )
    page = output._repr_html_()
    assert page.count("data:image/jpeg;base64,") == 1
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;hi" in page
    assert "2 prompt tokens, 1 generated" in page
    assert len(page) < 4000
    assert output._repr_html_() == page  # the picture itself is no longer needed
