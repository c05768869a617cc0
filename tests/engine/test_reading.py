"""Where requests are read: brief ones on the event loop, one in each of its turns, and the others on threads."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin import AsyncLLM, EngineDeadError, RequestError, SamplingParams
from opsin.engine.reading import is_brief
from opsin.params import PoolingParams, StructuredOutputsParams

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def jpeg_url(num_more: int = 0, **settings: Any) -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 60)).save(file, "JPEG", **settings)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue() + bytes(num_more)).decode()


JPEG = jpeg_url()


def user(content: Any, **rest: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **rest}]


def picture(url: str, **rest: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **rest}


@pytest.mark.parametrize(
    "messages",
    [
        user("What is this?"),
        user(["What", {"type": "text", "text": "is this?"}, picture(jpeg_url(40_000))]),
        [{"role": "system", "content": "Be brief."}, *user([picture(JPEG), picture(JPEG)])],
    ],
    ids=["text", "picture", "pictures"],
)
def test_conversation_of_few_words_and_small_pictures_is_brief(messages: Any):
    assert is_brief(messages, GREEDY, {"chat_template_kwargs": {}, "isolate_template": True})


@pytest.mark.parametrize(
    "messages",
    [
        user("word " * 1000),
        user([{"type": "text", "text": "word " * 500}] * 2),
        user("") * 4000,
        user([""] * 4000),
        user([{"type": "text", "text": JPEG + "A" * 60_000}]),
        user([picture(jpeg_url(150_000))]),
        user([picture(jpeg_url(50_000))] * 2),
        user([picture(jpeg_url(exif=b"Exif\0\0II*\0" + bytes(100)))]),
        user([picture("data:image/jpeg;base64,SUkqAA==")]),
        user([picture(JPEG[:60] + "%0a" + JPEG[60:])]),
        user([picture("data:image/jpeg;base64,\u00e9")]),
        user([picture("data:image/png;base64," + JPEG[23:])]),
        user([picture("https://example.com/picture.jpg")]),
        user([picture(JPEG, mm_processor_kwargs={"max_pixels": 1})]),
        user([{"type": "video_url", "video_url": {"url": JPEG}}]),
        user("hello", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]),
        user(None),
        ("hello",),
        "hello",
        None,
    ],
)
def test_conversation_that_may_take_long_to_read_is_not_brief(messages: Any):
    assert not is_brief(messages, GREEDY, {})


@pytest.mark.parametrize(
    ("params", "options"),
    [
        (GREEDY, {"chat_template": "{{ 1 }}"}),
        (GREEDY, {"chat_template_kwargs": {"a": 1}}),
        (GREEDY, {"tools": [{}]}),
        (GREEDY, {"documents": [{}]}),
        (GREEDY, {"media_io_kwargs": {"video": {}}}),
        (SamplingParams(bad_words=["no"]), {}),
        (SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+")), {}),
        (PoolingParams(task="pick", choices=["yes", "no"]), {}),
    ],
)
def test_conversation_with_more_to_read_beside_it_is_not_brief(params: Any, options: Any):
    assert not is_brief(user("hello"), params, options)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[AsyncLLM]:
    with AsyncLLM(str(folder), media_workers=0) as engine:
        yield engine


@pytest.fixture
def readers(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which thread read each conversation."""
    names: list[str] = []
    prompts = engine._front.inputs.prompts
    render: Callable[..., Any] = prompts.render_chat

    def noted(*args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        return render(*args, **kwargs)

    monkeypatch.setattr(prompts, "render_chat", noted)
    return names


def test_brief_conversation_is_read_on_the_loop_once_the_template_is_compiled(engine: AsyncLLM, readers: list[str]):
    messages = user([picture(JPEG), {"type": "text", "text": "What is this?"}])
    long = user([picture(JPEG), *[""] * 64])
    engine._front.inputs.prompts.templates._kept.clear()

    async def run():
        return [await engine.prepare_chat(m, GREEDY) for m in (messages, messages, long)]

    on_thread, here, _ = asyncio.run(run())
    assert [name.startswith("opsin-read") for name in readers] == [True, False, True]
    assert here.request.prompt_token_ids == on_thread.request.prompt_token_ids
    assert here.request.media == on_thread.request.media


def test_many_brief_conversations_leave_the_loop_a_turn_between_two(engine: AsyncLLM, readers: list[str]):
    async def run():
        await engine.prepare_chat(user("first"), GREEDY)
        turns: list[int] = []

        async def count_turns():
            while True:
                turns.append(len(readers))
                await asyncio.sleep(0)

        counting = asyncio.create_task(count_turns())
        await asyncio.gather(*(engine.prepare_chat(user(f"hello {i}"), GREEDY) for i in range(8)))
        counting.cancel()
        return turns

    for _ in range(2):  # a second event loop has turns of its own
        turns = asyncio.run(run())
        assert max(after - before for before, after in itertools.pairwise(turns)) == 1


def test_brief_conversation_that_is_wrong_is_refused_and_the_next_is_read(engine: AsyncLLM, readers: list[str]):
    async def run():
        await engine.prepare_chat(user("first"), GREEDY)
        wrong = engine.prepare_chat(user([picture(jpeg_url(3000)[:-4] + "!!!!")]), GREEDY)
        return await asyncio.gather(wrong, engine.prepare_chat(user("hello"), GREEDY), return_exceptions=True)

    wrong, right = asyncio.run(run())
    assert isinstance(wrong, RequestError)
    assert wrong.param == "messages.0.content.0.image_url"
    assert not isinstance(right, BaseException)
    assert not any(name.startswith("opsin-read") for name in readers[1:])


def test_brief_conversation_of_an_engine_that_was_shut_down_is_refused(folder: Path):
    async def run(engine: AsyncLLM):
        await engine.prepare_chat(user("first"), GREEDY)
        engine.shutdown()
        with pytest.raises(EngineDeadError):
            await engine.prepare_chat(user("hello"), GREEDY)

    with AsyncLLM(str(folder), media_workers=0) as engine:
        asyncio.run(run(engine))
