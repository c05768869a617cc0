"""OpenAI's own Python client, unchanged."""

from __future__ import annotations

import asyncio
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from opsin import AsyncLLM
from opsin.errors import RequestFailedError
from opsin.server.app import create_app
from opsin.server.config import ServerConfig
from tests.server.conftest import NAME, serving, user
from tests.server.test_errors import Failing

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "openai_chat_completion_client_for_multimodal.py"


@pytest.fixture
def sdk(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def ask(sdk: openai.OpenAI, **fields: Any) -> Any:
    given: dict[str, Any] = {"model": NAME, "messages": user(1, "What is this?"), "temperature": 0, "max_tokens": 8}
    return sdk.chat.completions.create(**{**given, **fields})


def test_sdk_chat_with_a_picture(sdk: openai.OpenAI):
    answer = ask(sdk, extra_body={"ignore_eos": True, "top_k": 1, "unheard_of": 1})
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8


def test_sdk_stream_joins_to_the_answer(sdk: openai.OpenAI):
    whole = ask(sdk).choices[0].message.content
    chunks = list(ask(sdk, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


def test_sdk_stream_left_early_frees_everything(sdk: openai.OpenAI, client: httpx.Client):
    with ask(sdk, stream=True, max_tokens=480, n=4, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    assert client.get("/health").status_code == 200  # and the fixture waits for the pools to be full again


def test_sdk_async_many_at_once(address: str):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as sdk:

            async def one(seed: int) -> str:
                messages: Any = user(seed, "What is this?")
                stream = await sdk.chat.completions.create(
                    model=NAME, messages=messages, temperature=0, max_tokens=8, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return list(await asyncio.gather(*(one(seed) for seed in (1, 2, 1, 2, 1, 2))))

    texts = asyncio.run(run())
    assert texts == texts[:2] * 3


def test_sdk_models_completions_and_embeddings(sdk: openai.OpenAI):
    assert [card.id for card in sdk.models.list()] == [NAME, "alias"]
    assert sdk.completions.create(model=NAME, prompt="Once", max_tokens=4, extra_body={"ignore_eos": True}).usage
    default = sdk.embeddings.create(model=NAME, input="Hello").data[0].embedding  # the SDK asks for base64 by itself
    floats = sdk.embeddings.create(model=NAME, input="Hello", encoding_format="float").data[0].embedding
    assert default == pytest.approx(floats, abs=1e-6)


def test_sdk_errors_are_of_the_right_class(sdk: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        ask(sdk, model="gpt-9")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(sdk, temperature=-1)
    assert bad.value.param == "temperature"
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError) as picture:
        ask(sdk, messages=user(broken, "What?"), stream=True)
    assert picture.value.code == "invalid_image_format"


def test_sdk_with_a_wrong_key(engine: AsyncLLM):
    with serving(create_app(engine, ServerConfig(api_key=("right",)), model=NAME)) as address:
        for key, error in (("wrong", openai.AuthenticationError), ("right", None)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as sdk:
                if error is None:
                    assert ask(sdk).choices
                else:
                    with pytest.raises(error):
                        ask(sdk)


def test_example_asks_every_kind_of_question(address: str, capsys: pytest.CaptureFixture[str]):
    example = runpy.run_path(str(EXAMPLE))
    example["main"](["--base-url", f"{address}/v1"])
    answers = capsys.readouterr().out.split("? ")
    assert len(answers) == 5
    assert all(answers)


def test_sdk_raises_for_a_stream_that_fails_midway(engine: AsyncLLM):
    failing = Failing(engine, RequestFailedError("logits are not finite"), 2)
    app = create_app(failing, ServerConfig(), model=NAME)  # type: ignore[arg-type]
    with (
        serving(app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as sdk,
        pytest.raises(openai.APIError, match="not finite"),
    ):
        list(ask(sdk, stream=True, max_tokens=400, extra_body={"ignore_eos": True}))
