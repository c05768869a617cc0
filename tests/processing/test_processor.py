import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from opsin.config import MediaConfig
from opsin.errors import RequestError
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.continuations import fan_out
from opsin.processing.embeddings import GivenFeatures
from opsin.processing.processor import InputProcessor, ProcessedRequest
from opsin.types import FeatureSpan

IMAGE_ID = 4
FEATURES = 16


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def process(processor: InputProcessor, prompt: Any, **params: Any) -> ProcessedRequest:
    return processor.process("r", processor.prompts.read(prompt), SamplingParams(**params))


def with_images(prompt: str | list[int], *images: Any, **more: Any) -> dict[str, Any]:
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    return {key: prompt, "multi_modal_data": {"image": list(images)}, **more}


@pytest.mark.parametrize(
    "text",
    [
        "USER: <image>\nWhat is in the picture? ASSISTANT:",
        "<image>",
        "  <image>  <image> x<image>\n\n",
        "<s>a<image></s><image>",
        "<image><image><image>",
        "Grüße <image> 你好 <ima ge> <image",
        "no picture at all",
    ],
)
def test_token_ids_equal_the_huggingface_processors(processor: InputProcessor, folder: Path, text: str) -> None:
    count = text.count("<image>")
    images = [picture("red", (30 + 9 * i, 50)) for i in range(count)]
    expected = LlavaProcessor.from_pretrained(folder)(text=text, images=images or None)["input_ids"][0]

    request = process(processor, with_images(text, *images)).request

    assert request.prompt_token_ids == list(expected)
    starts = [i for i, t in enumerate(expected) if t == IMAGE_ID][::FEATURES]
    assert request.spans == [FeatureSpan(i, start, FEATURES) for i, start in enumerate(starts)]
    assert len(request.spans) == count


def test_token_prompt_is_expanded_or_taken_as_expanded(processor: InputProcessor) -> None:
    images = picture("red"), picture("blue")
    text = process(processor, with_images("a <image><image> b", *images))
    ids = text.request.prompt_token_ids
    short = [i for n, i in enumerate(ids) if i != IMAGE_ID or n in (ids.index(IMAGE_ID), ids.index(IMAGE_ID) + 1)]
    assert short.count(IMAGE_ID) == 2

    for given in (short, ids):
        request = process(processor, with_images(given, *images)).request
        assert request.prompt_token_ids == ids
        assert request.spans == text.request.spans
        assert [item.key for item in request.media] == [item.key for item in text.request.media]


@pytest.mark.parametrize(
    "ids",
    [
        [1, *[IMAGE_ID] * 15],
        [1, *[IMAGE_ID] * 17],
        [1, *[IMAGE_ID] * 8, 9, *[IMAGE_ID] * 8],
        [1, *[IMAGE_ID] * 32],
    ],
    ids=["short", "long", "broken", "twice"],
)
def test_token_prompt_expanded_wrongly_is_refused(processor: InputProcessor, ids: list[int]) -> None:
    with pytest.raises(RequestError, match=rf"has {ids.count(IMAGE_ID)} image placeholder\(s\) but 1 image"):
        process(processor, with_images(ids, picture("red")))


def test_media_keys_name_content_layout_options_and_nothing_else(processor: InputProcessor) -> None:
    def key(image: Any, **more: Any) -> bytes:
        return process(processor, with_images("<image>", image, **more)).request.media[0].key

    red = key(picture("red"))
    assert len(red) == 32
    assert red == key(picture("red"), cache_salt="other")
    other = [
        key(picture("blue")),
        key(picture("red", (30, 40))),
        key(picture("red"), mm_processor_kwargs={"resample": 2}),
        key(np.asarray(picture("red"))),
        key(torch.zeros(FEATURES, 64)),
        key(torch.ones(FEATURES, 64)),
    ]
    assert len({red, *other}) == 7


def test_uuid_replaces_the_content_within_its_salt(processor: InputProcessor) -> None:
    def key(colour: str, uuid: str | None, salt: str | None = None) -> bytes:
        prompt = with_images("<image>", picture(colour), multi_modal_uuids={"image": [uuid]}, cache_salt=salt)
        return process(processor, prompt).request.media[0].key

    assert key("red", "a") == key("blue", "a")
    assert key("red", None) != key("blue", None)
    digest = process(processor, with_images("<image>", picture("red"))).sources[0].digest
    keys = {key("red", "a"), key("red", "b"), key("red", "a", "salt"), key("red", None), key("red", digest.hex())}
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("form", "count"),
    [
        (picture("red"), 1),
        (np.zeros((8, 8, 3), np.uint8), 1),
        (np.zeros((2, 8, 8, 3), np.uint8), 2),
        ([picture("red"), np.zeros((8, 8), np.uint8)], 2),
        (torch.zeros(2, FEATURES, 64), 2),
        (torch.zeros(FEATURES, 64, dtype=torch.bfloat16), 1),
        ([torch.zeros(FEATURES, 64), torch.zeros(1, FEATURES, 64)], 2),
        ({"image_embeds": torch.zeros(2, FEATURES, 64)}, 2),
        ({"image_embeds": [torch.zeros(FEATURES, 64)]}, 1),
    ],
    ids=["pil", "array", "batch", "list", "tensor", "bfloat16", "tensors", "dict", "dict-list"],
)
def test_every_form_of_picture_is_taken(processor: InputProcessor, form: Any, count: int) -> None:
    done = process(processor, {"prompt": "<image>" * count, "multi_modal_data": {"image": form}})
    assert [span.length for span in done.request.spans] == [FEATURES] * count
    for source, item in zip(done.sources, done.request.media, strict=True):
        assert isinstance(source, GivenFeatures) == (not item.layout.plan.views)


def test_paths_and_bytes_of_one_file_share_a_key(processor: InputProcessor, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture("red").save(path)
    forms = [str(path), path, path.read_bytes()]
    media = process(processor, with_images("<image>" * 3, *forms)).request.media
    assert len({item.key for item in media}) == 1


@pytest.mark.parametrize(
    ("keep", "tokens", "pictures"), [(500, 40, 2), (39, 39, 2), (23, 23, 1), (30, 23, 1), (6, 6, 0), (10, 6, 0)]
)
def test_truncation_keeps_the_end_and_never_half_a_picture(
    processor: InputProcessor, keep: int, tokens: int, pictures: int
) -> None:
    # <s>, picture, 1 token, picture, 6 tokens
    prompt = with_images("<image>x<image>xxxxxx", picture("red"), picture("blue"))
    whole = process(processor, prompt)
    assert len(whole.request.prompt_token_ids) == 40

    done = process(processor, prompt, truncate_prompt_tokens=keep)

    request = done.request
    assert request.prompt_token_ids == whole.request.prompt_token_ids[-tokens:]
    assert request.media == whole.request.media[2 - pictures :]
    assert len(done.sources) == len(request.spans) == pictures
    for i, span in enumerate(request.spans):
        assert (span.item, span.length) == (i, FEATURES)
        assert set(request.prompt_token_ids[span.start : span.start + FEATURES]) == {IMAGE_ID}


def test_sampling_params_are_completed_from_prompt_and_tokenizer(processor: InputProcessor) -> None:
    request = process(
        processor, "Hello", max_tokens=None, stop_token_ids=[7], bad_words=["circle"], prompt_logprobs=1
    ).request
    assert isinstance(request.params, SamplingParams)
    assert request.params.max_tokens == 200 - len(request.prompt_token_ids)
    assert request.stop_token_ids == {2, 7}
    assert not request.share_prefix
    encode = processor.tokenizer.encode
    assert encode("circle", add_special_tokens=False) in (request.params.bad_words_token_ids or [])
    assert process(processor, "Hello", ignore_eos=True).request.stop_token_ids == frozenset()
    clamped = process(processor, "x" * 190, max_tokens=50, min_tokens=50).request
    assert isinstance(clamped.params, SamplingParams)
    assert (clamped.params.max_tokens, clamped.params.min_tokens) == (9, 9)


def test_pooling_prompt_may_fill_the_context(processor: InputProcessor) -> None:
    request = processor.process("r", processor.prompts.read("x" * 199), PoolingParams()).request
    assert len(request.prompt_token_ids) == 200
    assert request.stop_token_ids == frozenset()


def test_seeds_depend_on_the_request_and_on_nothing_else(processor: InputProcessor) -> None:
    prompt = processor.prompts.read("Hello")

    def seed(name: str, **params: Any) -> int:
        return processor.process(name, prompt, SamplingParams(**params)).request.seed

    assert seed("a") == seed("a") != seed("b")
    assert seed("a", seed=5) == seed("b", seed=5) == 5


def test_fan_out_shares_the_prompt_and_draws_apart(processor: InputProcessor) -> None:
    request = process(processor, "Hello", n=3, seed=5, prompt_logprobs=0).request
    children = fan_out(request, 3)
    assert [c.request_id for c in children] == ["r-0", "r-1", "r-2"]
    assert len({c.seed for c in children}) == 3
    assert children[0].seed == 5
    assert {c.cache_namespace for c in children} == {"r"}
    assert [c.params.prompt_logprobs for c in children if isinstance(c.params, SamplingParams)] == [0, None, None]
    assert fan_out(request, 1) == [request]


def test_default_params_come_from_the_generation_config(make_processor: Callable[..., InputProcessor]) -> None:
    config = {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 99, "eos_token_id": 2, "do_sample": True}
    params = make_processor(generation_config=config).default_sampling_params()
    assert params == SamplingParams(temperature=0.2, top_p=0.9, max_tokens=99)
    assert make_processor(generation_config=config).default_sampling_params(max_tokens=None).max_tokens == 99
    assert make_processor().default_sampling_params() == SamplingParams()
    assert make_processor().default_sampling_params(max_tokens=None).max_tokens is None


def test_limit_of_zero_refuses_every_picture(make_processor: Callable[..., InputProcessor]) -> None:
    processor = make_processor(media=MediaConfig(limit_mm_per_prompt={"image": 0}))
    with pytest.raises(RequestError, match=r"^At most 0 image\(s\) may be provided in one prompt\."):
        process(processor, with_images("<image>", picture("red")))


def test_processing_takes_less_than_a_millisecond(processor: InputProcessor) -> None:
    prompt = with_images("USER: <image>\n" + "What is in the picture? " * 20 + "ASSISTANT:", picture("red"))

    def seconds() -> float:
        start = time.perf_counter()
        process(processor, prompt)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 1e-3
