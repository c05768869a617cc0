"""``LLM`` end to end on a tiny checkpoint: transformers is the oracle, and the invariants of ARCHITECTURE.md hold."""

from __future__ import annotations

import base64
import http.server
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from opsin import (
    LLM,
    BeamSearchParams,
    ContextLengthError,
    MediaError,
    PoolingParams,
    RequestError,
    SamplingParams,
)
from opsin.media.ops import make_tiles
from opsin.media.source import EncodedPicture, PixelPicture
from opsin.types import StepPlan, StepResult
from tests.engine.conftest import asked, assert_idle, everybody_let_in, hf_model, hf_processor, picture

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS: list[Any] = [
    asked(1),
    asked(2, 3),
    "Only text here.",
    asked(4, text="Describe the colours of everything that you can see, at length, please."),
    asked(1, 1, 5),
    asked(6),
]


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    """Greedy ids of transformers for ``PROMPTS``."""
    processor = hf_processor(folder)
    model = hf_model(folder)
    answers: list[list[int]] = []
    for prompt in PROMPTS:
        text = prompt if isinstance(prompt, str) else prompt["prompt"]
        images = None if isinstance(prompt, str) else prompt["multi_modal_data"]["image"]
        inputs = processor(images=images, text=text, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        answers.append(generated[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


# ------------------------------------------------------------------------------- the same tokens, always


def test_generate_greedy_equals_transformers(llm: LLM, expected: list[list[int]]):
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_generate_alone_equals_batched(llm: LLM, expected: list[list[int]]):
    assert [ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 7, "pipeline_depth": 2},
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 26, "block_size": 4},
        {"num_gpu_blocks_override": 26, "block_size": 4, "pipeline_depth": 2},
        {"pipeline_depth": 2},
        {"block_size": 4, "max_num_seqs": 2},
        {"max_num_batched_patches": 1, "vision_cache_gb": 2e-5, "pixel_buffer_gb": 1e-6},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_generate_under_any_budget_gives_the_same_tokens(
    make_llm: Callable[..., LLM], expected: list[list[int]], settings: dict[str, Any]
):
    llm = make_llm(**settings)
    with everybody_let_in():
        for _ in range(2):  # the second time with whatever the first has cached
            assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert_idle(llm)
    if "num_gpu_blocks_override" in settings:
        assert llm.stats()["num_preemptions_total"] > 0


def test_generate_with_plans_and_results_sent_as_bytes_gives_the_same_tokens(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    engine: Any = llm._front.engine
    executor: Any = engine.core.executor
    launch, sent = executor.launch, 0

    class Reply:
        def __init__(self, pending: Any) -> None:
            self._pending = pending

        def result(self) -> StepResult:
            return msgspec.msgpack.decode(msgspec.msgpack.encode(self._pending.result()), type=StepResult)

    def launch_from_bytes(plan: StepPlan) -> Reply:
        nonlocal sent
        packed = msgspec.msgpack.encode(plan)
        sent += len(packed)
        return Reply(launch(msgspec.msgpack.decode(packed, type=StepPlan)))

    monkeypatch.setattr(executor, "launch", launch_from_bytes)
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    assert len(llm.embed("Only text here.", use_tqdm=False)[0].outputs.embedding) == llm.model_spec.hidden_size
    assert sent > 0


def test_generate_with_worker_processes_gives_the_same_tokens(folder: Path, expected: list[list[int]]):
    with LLM(str(folder), media_workers=1) as llm:
        assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
        assert_idle(llm)


def test_chat_fetches_data_urls_and_allowed_files(folder: Path, tmp_path: Path, expected: list[list[int]]):
    picture(1).save(tmp_path / "one.png")
    encoded = base64.b64encode((tmp_path / "one.png").read_bytes()).decode()
    with LLM(str(folder), media_workers=0, allowed_local_media_path=str(tmp_path)) as llm:
        for url in (f"data:image/jpeg;base64,{encoded}", (tmp_path / "one.png").as_uri()):
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
            output = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
            assert ids(output) == expected[:1]
        content = [{"type": "image_url", "image_url": {"url": Path("/etc/passwd").as_uri()}}]
        with pytest.raises(RequestError) as refused:
            llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert refused.value.param == "messages.0.content.0.image_url"


def test_chat_fetches_the_pictures_of_several_conversations_at_once(folder: Path, expected: list[list[int]]):
    picture_bytes = io.BytesIO()
    picture(1).save(picture_bytes, "PNG")
    together = threading.Barrier(3)  # nobody is served before three have asked

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            together.wait(timeout=20)
            self.send_response(200)
            self.send_header("Content-Length", str(len(picture_bytes.getvalue())))
            self.end_headers()
            self.wfile.write(picture_bytes.getvalue())

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        conversations: list[Any] = []
        for i in range(3):
            url = f"http://127.0.0.1:{server.server_address[1]}/{i}.png"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
            conversations.append([{"role": "user", "content": content}])
        settings: Any = {"media_workers": 0, "allow_private_media_hosts": True, "image_fetch_timeout_s": 20.0}
        with LLM(str(folder), **settings) as llm:
            assert ids(llm.chat(conversations, GREEDY, use_tqdm=False)) == expected[:1] * 3
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_generate_repeated_prompt_hits_the_prefix_cache_and_decodes_nothing(llm: LLM):
    prompt = asked(77, 78)
    first = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    decoded = llm.stats()["num_pictures_decoded_total"]
    second = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    assert second.outputs[0].token_ids == first.outputs[0].token_ids
    assert second.num_cached_tokens > 0
    assert llm.stats()["num_pictures_decoded_total"] == decoded


def test_generate_other_cache_salt_shares_nothing(llm: LLM):
    prompt = asked(79)
    llm.generate(prompt, GREEDY, use_tqdm=False)
    salted: Any = {**prompt, "cache_salt": "mine"}
    assert llm.generate(salted, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.generate(salted, GREEDY, use_tqdm=False)[0].num_cached_tokens > 0


def test_generate_swapped_pictures_change_the_answer(llm: LLM):
    one, two = asked(81, 82), asked(82, 81)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    a, b = llm.generate([one, two], params, use_tqdm=False)
    assert a.outputs[0].cumulative_logprob != pytest.approx(b.outputs[0].cumulative_logprob, abs=1e-3)


def test_generate_embeddings_equal_the_picture(llm: LLM, expected: list[list[int]]):
    engine: Any = llm._front.engine
    executor: Any = engine.core.executor
    model = executor._runner.model
    request = llm._front.inputs.process("probe", llm._front.read_prompt(PROMPTS[1]), GREEDY)
    layouts = [item.layout for item in request.request.media]
    tiles = []
    for source, layout in zip(request.sources, layouts, strict=True):
        pixels = np.empty(layout.plan.num_bytes, np.uint8)
        assert isinstance(source, EncodedPicture | PixelPicture)
        make_tiles(source.decode(), layout.plan, pixels)
        tiles.append([torch.from_numpy(pixels).view(*layout.plan.tile_sizes[0], 3)])
    with torch.inference_mode():
        features = model.encode(tiles, layouts).view(2, -1, model.spec.hidden_size)
    for given in (features, list(features), {"image_embeds": features}):
        prompt: Any = {**PROMPTS[1], "multi_modal_data": {"image": given}}
        assert ids(llm.generate(prompt, GREEDY, use_tqdm=False))[0] == expected[1]


def test_generate_seeded_sample_does_not_depend_on_the_batch(llm: LLM):
    params = [SamplingParams(temperature=1.2, top_p=0.95, seed=i, max_tokens=10, ignore_eos=True) for i in range(6)]
    together = ids(llm.generate(PROMPTS, params, use_tqdm=False))
    alone = [ids(llm.generate(p, q, use_tqdm=False))[0] for p, q in zip(PROMPTS, params, strict=True)]
    assert together == alone
    assert together != ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))


def test_chat_equals_the_rendered_prompt(llm: LLM):
    content = [{"type": "image_pil", "image_pil": picture(1)}, {"type": "text", "text": "What is this?"}]
    spoken = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)[0]
    written = llm.generate(
        {"prompt": "USER: <image>\nWhat is this? ASSISTANT:", "multi_modal_data": {"image": picture(1)}},
        GREEDY,
        use_tqdm=False,
    )[0]
    assert spoken.prompt_token_ids == written.prompt_token_ids
    assert spoken.outputs[0].token_ids == written.outputs[0].token_ids


# --------------------------------------------------------------------------------- parameters and results


def test_generate_n_gives_distinct_answers_sharing_the_prompt(llm: LLM):
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    hits = llm.stats()["prefix_cache_hit_tokens_total"]
    prompt = asked(90, text="A prompt of several blocks, so that there is something to share.")
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1
    shared = len(output.prompt_token_ids) // 16 * 16
    assert llm.stats()["prefix_cache_hit_tokens_total"] == hits + 3 * shared


def test_generate_logprobs_equal_transformers(llm: LLM, folder: Path):
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate(asked(8), params, use_tqdm=False)
    model = hf_model(folder)
    pixels = hf_processor(folder).image_processor(picture(8), return_tensors="pt")["pixel_values"]
    answer = output.outputs[0]
    whole = torch.tensor([output.prompt_token_ids + answer.token_ids])
    with torch.inference_mode():
        truth = model(input_ids=whole, pixel_values=pixels).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    length = len(output.prompt_token_ids)
    assert len(output.prompt_logprobs) == length
    for position in range(1, length):
        entry = output.prompt_logprobs[position]
        assert entry is not None
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(truth[position - 1, token].item(), abs=1e-4)
    assert answer.logprobs is not None
    for step, entry in enumerate(answer.logprobs):
        assert set(truth[length - 1 + step].topk(3).indices.tolist()) <= set(entry)
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(truth[length - 1 + step, token].item(), abs=1e-4)


def test_generate_stop_string_ends_the_text_before_it(llm: LLM):
    (free,) = llm.generate("Only text here.", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[stop])
    (stopped,) = llm.generate("Only text here.", params, use_tqdm=False)
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == stop


def test_generate_ends_discovered_late_leave_the_same_answers(make_llm: Callable[..., LLM], llm: LLM):
    """Two steps deep, the step behind an end token, a stop string or the last token is already under way."""
    free = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    params = []
    for i, output in enumerate(free):
        answer = output.outputs[0]
        stop = [answer.text[i + 2 : i + 5]] if i % 2 else []
        ends = [] if i % 2 else [answer.token_ids[i + 3]]
        params.append(SamplingParams(temperature=0, max_tokens=20, stop=stop, stop_token_ids=ends, ignore_eos=True))
    told = []
    for settings in ({"pipeline_depth": 1}, {"pipeline_depth": 2}, {"pipeline_depth": 2, "max_num_seqs": 2}):
        engine = make_llm(**settings)
        answers = [output.outputs[0] for output in engine.generate(PROMPTS, params, use_tqdm=False)]
        told.append([(answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason) for answer in answers])
        assert_idle(engine)
    assert told[0] == told[1] == told[2]
    assert {reason for _, _, reason, _ in told[0]} == {"stop"}


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_generate_two_steps_deep_and_preempted_equals_one_step_deep(data: st.DataObject, make_llm: Callable[..., LLM]):
    """Random lengths, end tokens and stop strings, most of them found when a further step is under way."""
    shallow = make_llm()
    deep = make_llm(pipeline_depth=2, num_gpu_blocks_override=26, block_size=4)
    chosen = data.draw(st.lists(st.sampled_from(range(len(PROMPTS))), min_size=2, max_size=6))
    params = []
    for index in chosen:
        free = shallow.generate(
            PROMPTS[index], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), use_tqdm=False
        )
        text, token_ids = free[0].outputs[0].text, free[0].outputs[0].token_ids
        at = data.draw(st.integers(0, max(0, len(text) - 2)))
        stop = data.draw(st.sampled_from([[], [text[at : at + 2]]]))
        ends = data.draw(st.lists(st.sampled_from(token_ids), max_size=2))
        length = data.draw(st.integers(1, 16))
        params.append(SamplingParams(temperature=0, max_tokens=length, stop=stop, stop_token_ids=ends, ignore_eos=True))
    prompts = [PROMPTS[index] for index in chosen]
    told = []
    for engine in (shallow, deep):
        with everybody_let_in():
            answers = [output.outputs[0] for output in engine.generate(prompts, params, use_tqdm=False)]
        told.append([(answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason) for answer in answers])
        assert_idle(engine)
    assert told[0] == told[1]


def test_generate_stop_token_ends_the_answer(llm: LLM, expected: list[list[int]]):
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[expected[0][3]], ignore_eos=True)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[0][: expected[0].index(expected[0][3]) + 1]
    assert output.outputs[0].stop_reason == expected[0][3]


def test_beam_search_equals_transformers(llm: LLM, folder: Path):
    (found,) = llm.beam_search(asked(9), BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    inputs = hf_processor(folder)(images=picture(9), text=asked(9)["prompt"], return_tensors="pt")
    model = hf_model(folder)
    truth = model.generate(
        **inputs, num_beams=3, num_return_sequences=3, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert [sequence.tokens for sequence in found.sequences] == truth.tolist()


def test_embed_is_the_last_hidden_state_normalised(llm: LLM, folder: Path):
    (output,) = llm.embed("Only text here.", use_tqdm=False)
    model = hf_model(folder)
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([output.prompt_token_ids]), output_hidden_states=True).hidden_states[-1]
    truth = torch.nn.functional.normalize(hidden[0, -1], dim=-1)
    assert np.allclose(output.outputs.embedding, truth.numpy(), atol=1e-5)
    (short,) = llm.embed("Only text here.", PoolingParams(dimensions=8), use_tqdm=False)
    assert np.allclose(short.outputs.embedding, torch.nn.functional.normalize(hidden[0, -1, :8], dim=-1), atol=1e-5)


def test_notebook_view_shows_the_picture_and_escapes_text(llm: LLM):
    (output,) = llm.generate(asked(11, text="<script>"), GREEDY, use_tqdm=False)
    shown = output._repr_html_()
    assert "data:image/jpeg;base64," in shown
    assert "<script>" not in shown


# ------------------------------------------------------------------------------------------- what goes wrong


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    picture(5, 200, 200).save(buffer, "JPEG")
    return buffer.getvalue()[:-2000]


BAD_PROMPTS: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown key": ({"prompt": "x", "image": 1}, RequestError, "Unknown key"),
    "too few pictures": ({**asked(1), "prompt": "<image><image>"}, RequestError, "2"),
    "too many pictures": ({**asked(1, 2), "prompt": "<image>"}, RequestError, "1"),
    "truncated picture": (
        {"prompt": "<image>", "multi_modal_data": {"image": truncated_jpeg()}},
        MediaError,
        "picture",
    ),
    "not a picture": ({"prompt": "<image>", "multi_modal_data": {"image": b"hello"}}, MediaError, "format"),
    "empty picture": ({"prompt": "<image>", "multi_modal_data": {"image": b""}}, MediaError, "empty"),
    "empty prompt": ({"prompt_token_ids": []}, RequestError, "empty"),
    "too long": ({"prompt_token_ids": [5] * 600}, ContextLengthError, "512"),
    "unknown token": ({"prompt_token_ids": [10**6]}, RequestError, "1000000"),
    "embedding of wrong width": (
        {"prompt": "<image>", "multi_modal_data": {"image": torch.zeros(1, 16, 3)}},
        MediaError,
        "3 values per row",
    ),
    "embedding not finite": (
        {"prompt": "<image>", "multi_modal_data": {"image": torch.full((1, 16, 64), float("nan"))}},
        MediaError,
        "finite",
    ),
    "wrong type": (3.5, RequestError, "float"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_generate_bad_prompt_raises_and_the_engine_goes_on(llm: LLM, expected: list[list[int]], name: str):
    prompt, error, words = BAD_PROMPTS[name]
    with pytest.raises(error, match=words):
        llm.generate([PROMPTS[0], prompt, PROMPTS[1]], GREEDY, use_tqdm=False)
    assert_idle(llm)
    assert ids(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == expected[:2]


def test_generate_return_exceptions_fails_bad_prompts_alone(llm: LLM, expected: list[list[int]]):
    bad = [prompt for prompt, _, _ in BAD_PROMPTS.values()]
    results = llm.generate([*bad, *PROMPTS], GREEDY, use_tqdm=False, return_exceptions=True)
    assert [type(r) for r in results[: len(bad)]] == [error for _, error, _ in BAD_PROMPTS.values()]
    assert ids(results[len(bad) :]) == expected


def test_generate_mismatched_params_are_refused(llm: LLM):
    with pytest.raises(RequestError, match="2 sets of parameters for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])


def test_generate_interrupted_aborts_and_leaves_the_engine_usable(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    step, count = llm._front.step, 0

    def interrupted_step() -> Any:
        nonlocal count
        count += 1
        if count == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(llm._front, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert count == 4
    monkeypatch.undo()
    assert_idle(llm)
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
