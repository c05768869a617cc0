"""Every way to get a prompt or its parameters wrong, and what the caller is told."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from opsin.errors import ContextLengthError, MediaError, OpsinError, RequestError
from opsin.params import BeamSearchParams, PoolingParams, SamplingParams
from opsin.processing.processor import InputProcessor

RED = Image.new("RGB", (40, 30), "red")
ONE = "USER: <image>\nWhat? ASSISTANT:"
KEYS = (
    "prompt, prompt_token_ids, multi_modal_data, mm_processor_kwargs, multi_modal_uuids, cache_salt, add_special_tokens"
)


def with_image(image: Any, prompt: str = ONE, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "multi_modal_data": {"image": image}, **more}


NAN = torch.zeros(1, 16, 64)
NAN[0, 3, 5] = math.nan

PROMPTS: list[tuple[str, Any, type[OpsinError], str, str | None]] = [
    ("number", 3, RequestError,
     "A prompt must be a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'; got int.",
     "prompt"),
    ("nothing", {}, RequestError,
     "The prompt has neither 'prompt' nor 'prompt_token_ids'; give one of them.", "prompt"),
    ("unknown-key", {"prompt": "x", "multimodal_data": {}}, RequestError,
     f"Unknown key in the prompt: multimodal_data. Allowed are {KEYS}.", "multimodal_data"),
    ("text-not-string", {"prompt": 7}, RequestError, "'prompt' must be a string, got int.", "prompt"),
    ("ids-not-numbers", [1, "a"], RequestError,
     "prompt_token_ids must be a list of whole numbers; got 'a'.", "prompt_token_ids"),
    ("ids-empty", [], RequestError, "The prompt is empty: it has no tokens.", "prompt_token_ids"),
    ("id-outside-vocabulary", [1, 480], RequestError,
     "prompt_token_ids holds 480; this model's ids are 0 to 479.", "prompt_token_ids"),
    ("id-negative", [-1], RequestError,
     "prompt_token_ids holds -1; this model's ids are 0 to 479.", "prompt_token_ids"),
    ("salt-empty", {"prompt": "x", "cache_salt": ""}, RequestError,
     "cache_salt must be a non-empty string, got ''.", "cache_salt"),
    ("data-not-dict", {"prompt": "x", "multi_modal_data": [RED]}, RequestError,
     "multi_modal_data must be a dict, got list.", "multi_modal_data"),
    ("unknown-modality", {"prompt": "x", "multi_modal_data": {"images": RED}}, RequestError,
     "Unknown modality 'images' in multi_modal_data. Allowed are image, video.", "multi_modal_data.images"),
    ("video", {"prompt": "x", "multi_modal_data": {"video": [RED]}}, RequestError,
     "At most 0 video(s) may be provided in one prompt. This model takes none.", "multi_modal_data"),
    ("too-many", with_image([RED] * 5, "<image>" * 5), RequestError,
     "At most 4 image(s) may be provided in one prompt. This prompt has 5: send fewer, or start with "
     "limit_mm_per_prompt={'image': 5}.", "multi_modal_data"),
    ("placeholder-missing", with_image(RED, "What?"), RequestError,
     "The prompt has 0 image placeholder(s) but 1 image(s) were given. Write one '<image>' for each image, where it "
     "belongs.", "multi_modal_data.image"),
    ("placeholder-alone", "<image> What?", RequestError,
     "The prompt has 1 image placeholder(s) but 0 image(s) were given. Write one '<image>' for each image, where it "
     "belongs.", "multi_modal_data.image"),
    ("placeholders-too-few", with_image([RED, RED]), RequestError,
     "The prompt has 1 image placeholder(s) but 2 image(s) were given. Write one '<image>' for each image, where it "
     "belongs.", "multi_modal_data.image"),
    ("uuid-without-data", {"prompt": ONE, "multi_modal_uuids": {"image": ["a"]}}, RequestError,
     "An item of multi_modal_data.image is null. A uuid names an item for the caches, but the image itself must be "
     "sent with every request, since its cached features may be gone.", "multi_modal_data.image"),
    ("uuid-count", with_image(RED, multi_modal_uuids={"image": ["a", "b"]}), RequestError,
     "multi_modal_uuids.image has 2 entries for 1 image(s); give one per item, or null for those to be hashed.",
     "multi_modal_uuids.image"),
    ("uuid-type", with_image(RED, multi_modal_uuids={"image": [7]}), RequestError,
     "multi_modal_uuids.image must be a list of strings (or null where the content is to be hashed).",
     "multi_modal_uuids.image"),
    ("picture-type", with_image(7), MediaError,
     "A picture may be a PIL.Image, a NumPy array, encoded bytes or a path; got int.", "multi_modal_data.image"),
    ("picture-corrupt", with_image([RED, b"junk"], "<image><image>"), MediaError,
     "The data is not a picture in a format that opsin reads (JPEG, PNG, WebP, GIF, BMP, TIFF).",
     "multi_modal_data.image.1"),
    ("picture-empty", with_image(b""), MediaError, "The picture is empty: 0 bytes.", "multi_modal_data.image"),
    ("picture-float", with_image(np.zeros((4, 4, 3))), MediaError,
     "A picture array must hold uint8 values 0 to 255; got float64; multiply by 255 and convert.",
     "multi_modal_data.image"),
    ("features-rank", with_image(torch.zeros(1, 1, 16, 64)), MediaError,
     "Features must have shape (items, features, hidden size) and not be empty, got (1, 1, 16, 64).",
     "multi_modal_data.image"),
    ("features-empty", with_image(torch.zeros(1, 0, 64)), MediaError,
     "Features must have shape (items, features, hidden size) and not be empty, got (1, 0, 64).",
     "multi_modal_data.image"),
    ("features-width", with_image(torch.zeros(1, 16, 32)), MediaError,
     "Features have 32 values per row; this model's have 64. Use the output of this model's own vision tower and "
     "projector.", "multi_modal_data.image"),
    ("features-dtype", with_image(torch.zeros(1, 16, 64, dtype=torch.int64)), MediaError,
     "Features must be floating-point numbers, got int64.", "multi_modal_data.image"),
    ("features-nan", with_image(NAN), MediaError,
     "Features hold values that are not finite (NaN or infinity) in float32.", "multi_modal_data.image"),
    ("features-beyond-float32", with_image(torch.full((1, 16, 64), 1e300, dtype=torch.float64)), MediaError,
     "Features hold values that are not finite (NaN or infinity) in float32.", "multi_modal_data.image"),
    ("features-8-bit", with_image(torch.zeros(1, 16, 64).to(torch.float8_e4m3fn)), MediaError,
     "Features of torch.float8_e4m3fn on device 'cpu' cannot be read; give a float32, float16 or bfloat16 tensor.",
     "multi_modal_data.image"),
    ("features-without-data", with_image(torch.zeros(1, 16, 64, device="meta")), MediaError,
     "Features of torch.float32 on device 'meta' cannot be read; give a float32, float16 or bfloat16 tensor.",
     "multi_modal_data.image"),
    ("features-sparse", with_image(torch.zeros(16, 64).to_sparse()), MediaError,
     "Features must be a dense tensor, got layout torch.sparse_coo.", "multi_modal_data.image"),
    ("features-unknown-key", with_image({"image_embeds": torch.zeros(1, 16, 64), "grid": 1}), RequestError,
     "multi_modal_data.image is a dict with unknown grid. Features are given as {'image_embeds': tensor}, with "
     "'image_grid_thw' or 'image_sizes' or 'image_size_list' where the model needs it.", "multi_modal_data.image.grid"),
    ("features-count", with_image({"image_embeds": torch.zeros(1, 16, 64), "image_sizes": [(4, 4), (5, 5)]}),
     MediaError,
     "multi_modal_data.image has features of 1 item(s) but sizes or grids of 2; they must agree.",
     "multi_modal_data.image"),
    ("options-not-dict", with_image(RED, mm_processor_kwargs="a"), RequestError,
     "mm_processor_kwargs must be a dict, got str.", "mm_processor_kwargs"),
    ("options-of-each-not-dict", with_image(RED, mm_processor_kwargs=["a"]), RequestError,
     "A list of mm_processor_kwargs must have a dict, or null, for each of the 1 pictures and videos.",
     "mm_processor_kwargs"),
    ("half-surrogate", "Hi \ud83d!", RequestError,
     "The prompt holds U+D83D at character 3: half of a surrogate pair, which is no character. Send valid Unicode.",
     "prompt"),
    ("too-long", "x" * 300, ContextLengthError,
     "The prompt has 301 tokens; this model's context holds 200, and at least one token must remain for the answer. "
     "Shorten the prompt, send fewer or smaller pictures, or raise max_model_len if the model allows it.", "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "kind", "message", "param"), [pytest.param(*case[1:], id=case[0]) for case in PROMPTS]
)
def test_bad_prompt_is_refused_with_its_reason(
    processor: InputProcessor, prompt: Any, kind: type[OpsinError], message: str, param: str | None
) -> None:
    with pytest.raises(kind) as caught:
        processor.process("0", processor.prompts.read(prompt), SamplingParams())
    assert str(caught.value) == message
    assert getattr(caught.value, "param", None) == param
    # and the next request is none the worse
    assert processor.process("1", processor.prompts.read(with_image(RED)), SamplingParams()).request.spans


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": math.nan}, "temperature is nan; it must be a number between 0 and 100."),
        ({"n": 100_000}, "n is 100000; it must be a whole number between 1 and 16."),
        ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1."),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number at least 1, or None."),
        ({"stop": [""]}, "stop is ['']; it must be at most 16 non-empty strings."),
        ({"stop": "x", "detokenize": False}, "stop is ['x']; it must be empty when detokenize is False."),
        ({"logprobs": 21}, "logprobs is 21; it must be a whole number between 0 and 20, or None."),
        ({"allowed_token_ids": [480]}, "allowed_token_ids holds 480; this model's ids are 0 to 479."),
        ({"stop_token_ids": [999]}, "stop_token_ids holds 999; this model's ids are 0 to 479."),
        (
            {"allowed_token_ids": [2], "min_tokens": 3},
            "allowed_token_ids leaves nothing to draw: bad_words forbid each of them, or it ends the answer before "
            "min_tokens=3.",
        ),
        (
            {"allowed_token_ids": [10, 11], "bad_words_token_ids": [[10], [11]]},
            "allowed_token_ids leaves nothing to draw: bad_words forbid each of them.",
        ),
        ({"logit_bias": {480: 1.0}}, "logit_bias holds 480; this model's ids are 0 to 479."),
        ({"logit_bias": {"a": 1}}, "logit_bias is {'a': 1}; it must be a dict of token ids and numbers."),
        ({"logit_bias": [1]}, "logit_bias is [1]; it must be a dict of token ids and numbers."),
        (
            {"bad_words_token_ids": [[]]},
            "bad_words_token_ids is [[]]; it must be None or at most 4096 non-empty lists of token ids.",
        ),
        (
            {"bad_words_token_ids": [[-1]]},
            "bad_words_token_ids is [[-1]]; it must be None or at most 4096 non-empty lists of token ids.",
        ),
        ({"bad_words_token_ids": [[3, 480]]}, "bad_words need token 480; this model's ids are 0 to 479."),
        (
            {"bad_words": ["\ud83d"]},
            "bad_words is ['\\ud83d']; it must be valid Unicode, without halves of surrogate pairs.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_sampling_params_are_refused_with_their_reason(
    processor: InputProcessor, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        processor.process("0", processor.prompts.read("Hello"), SamplingParams(**changes))
    assert str(caught.value) == message
    assert caught.value.param == next(iter(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "classify"},
            "The task 'classify' needs a classification head, which no served architecture has. To weigh given "
            "answers against one another use pick (LLM.pick, POST /v1/pick); to compare inputs by their vectors use "
            "score (LLM.score, POST /score).",
        ),
        ({"dimensions": 65}, "dimensions is 65; this model's vectors have 64."),
        ({"dimensions": "8"}, "dimensions is '8'; it must be a whole number at least 1, or None."),
    ],
    ids=["task", "dimensions", "dimensions-type"],
)
def test_bad_pooling_params_are_refused_with_their_reason(
    processor: InputProcessor, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        processor.process("0", processor.prompts.read("Hello"), PoolingParams(**changes))
    assert str(caught.value) == message
    assert caught.value.param == next(iter(changes))


@pytest.mark.parametrize("changes", [{"beam_width": "3"}, {"max_tokens": 2.5}, {"length_penalty": math.inf}])
def test_bad_beam_search_params_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **changes})
    assert caught.value.param == next(iter(changes))


def test_sampling_params_none_means_no_stops_and_no_bad_words() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None, bad_words=None) == SamplingParams()  # pyright: ignore[reportArgumentType]


def test_cloned_sampling_params_share_nothing() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0})
    other = params.clone()
    other.stop.append("b")
    assert params == SamplingParams(stop=["a"], logit_bias={1: 2.0})


def test_uuid_of_any_characters_names_an_item(processor: InputProcessor) -> None:
    prompts = [with_image(RED, multi_modal_uuids={"image": [uuid]}) for uuid in ("\ud83d", "a")]
    keys = [
        processor.process("0", processor.prompts.read(prompt), SamplingParams()).request.media[0].key
        for prompt in prompts
    ]
    assert keys[0] != keys[1]


def test_unknown_sampling_param_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.convert({"temprature": 1.0}, SamplingParams)


def test_prompt_of_pictures_that_is_too_long_says_what_they_cost(processor: InputProcessor) -> None:
    prompt = with_image([RED] * 4, "<image>" * 4 + "x" * 200)
    with pytest.raises(ContextLengthError, match=r"has 265 tokens \(64 of them for 4 image") as caught:
        processor.process("0", processor.prompts.read(prompt), SamplingParams())
    assert caught.value.code == "context_length_exceeded"
