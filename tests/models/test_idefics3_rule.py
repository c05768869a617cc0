"""Idefics3's and SmolVLM's rule against Hugging Face's Pillow-backed processors: the same tiles, the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from opsin.config import MediaConfig
from opsin.errors import RequestError, UnsupportedModelError
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models.idefics3.rule import Idefics3Rule
from opsin.models.numerals import in_words
from opsin.models.rule import Placeholder, TokenRun
from opsin.types import Clip
from tests.factories.idefics3 import FAKE, GLOBAL, IMAGE, Idefics3Shape, build_image_processor, picture_text, video_text

EDGE = 32
NUM_FEATURES = 4
VISION: dict[str, Any] = {"image_size": EDGE, "patch_size": 8}
SHAPES = {"idefics3": Idefics3Shape(), "smolvlm": Idefics3Shape(version="smolvlm")}
SIZES = [(1, 1), (1, 40), (2, 300), (300, 2), (32, 32), (64, 64), (65, 63), (96, 32), (33, 101), (200, 113), (640, 481)]
SIZES += [(1, 5000), (5000, 1), (95, 96), (97, 95)]
HUGE = (3000, 2001)


class Tokenizer:
    """Ids by the order of first asking; ``absent`` tokens have none."""

    def __init__(self, *absent: str) -> None:
        self.absent = absent
        self.tokens: list[str] = []

    def convert_tokens_to_ids(self, token: str) -> int | None:
        if token in self.absent:
            return None
        if token not in self.tokens:
            self.tokens.append(token)
        return self.tokens.index(token)


def make_rule(
    processor: Mapping[str, Any] | None = None, tokenizer: Tokenizer | None = None, **config: Any
) -> Idefics3Rule:
    settings = build_image_processor(SHAPES["idefics3"]).to_dict() if processor is None else processor
    return Idefics3Rule.from_hf({"vision_config": VISION} | config, settings, tokenizer or Tokenizer())


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image.convert(mode)


def normalized(rule: Idefics3Rule, image: Image.Image, options: Mapping[str, Any] | None = None) -> np.ndarray:
    """(tiles, 3, height, width) float32, as the tower sees it."""
    source = open_picture(image, MediaConfig())
    plan = rule.layout("image", *source.size, 1, options or {}).plan
    out = np.full(plan.num_bytes, 99, np.uint8)
    make_tiles(source.decode(), plan, out)
    pixels = out.reshape(-1, EDGE, EDGE, 3)
    return np.stack([rule.norm.table()[pixels[..., channel], channel] for channel in range(3)], axis=1)


@pytest.mark.parametrize("version", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 2},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_pad": False},
        {"do_image_splitting": False},
        {"size": {"longest_edge": 180}},
        {"size": {"longest_edge": 20}},
        {"size": {"height": 40, "width": 70}},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    ],
    ids=str,
)
def test_pixels_over_sizes_equal_hf(version: str, settings: dict[str, Any]) -> None:
    processor = build_image_processor(SHAPES[version], **settings)
    rule = make_rule(processor.to_dict())
    for size in SIZES if settings else [*SIZES, HUGE]:
        image = noise(size[0], size[1])
        expected = processor([[image]], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(normalized(rule, image), expected, err_msg=str(size))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK", "YCbCr"])
def test_pixels_over_modes_equal_hf(mode: str) -> None:
    image = noise(61, 83, "RGB").convert(mode) if mode in ("P", "CMYK", "YCbCr") else noise(61, 83, mode)
    expected = build_image_processor(SHAPES["idefics3"])([[image]], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(normalized(make_rule(), image), expected)


@pytest.mark.parametrize("size", [(40, 100), (192, 100), (32, 31), (150, 64)])
def test_pixels_without_resize_equal_hf(size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = build_image_processor(SHAPES["idefics3"])([[image]], return_tensors="np", do_resize=False)
    np.testing.assert_array_equal(normalized(make_rule(), image, {"do_resize": False}), expected["pixel_values"][0])


def spelled(runs: Sequence[TokenRun | str], tokenizer: Tokenizer) -> str:
    return "".join(run if isinstance(run, str) else tokenizer.tokens[run.token_id] * run.count for run in runs)


def num_features(runs: Sequence[TokenRun | str], tokenizer: Tokenizer) -> int:
    tokens = [run for run in runs if isinstance(run, TokenRun)]
    assert all(run.is_feature == (tokenizer.tokens[run.token_id] == IMAGE) for run in tokens)
    return sum(run.count for run in tokens if run.is_feature)


@pytest.mark.parametrize("version", SHAPES)
def test_expansion_over_a_grid_of_sizes_spells_hf_s_text(version: str) -> None:
    tokenizer = Tokenizer()
    rule = make_rule(tokenizer=tokenizer)
    processor = build_image_processor(SHAPES[version])
    sides = [1, 2, 7, 31, 32, 33, 63, 64, 65, 96, 97, 333, 1000]
    for width in sides:
        for height in sides:
            made = processor([[noise(width, height)]], return_row_col_info=True, return_tensors="np")
            layout = rule.layout("image", width, height, 1, {})
            runs = rule.expand("image", 1, layout)
            assert spelled(runs, tokenizer) == picture_text(version, made, 0, NUM_FEATURES), (width, height)
            assert layout.num_features == num_features(runs, tokenizer)
            assert layout.num_patches == len(layout.plan.tile_sizes) * 16


@pytest.mark.parametrize(
    ("edge", "patch", "scale", "longest"), [(364, 14, 2, 1456), (512, 16, 4, 2048), (384, 14, 3, 1536)]
)
def test_rows_and_columns_of_the_hub_s_checkpoints_equal_hf_at_every_aspect_ratio(
    edge: int, patch: int, scale: int, longest: int
) -> None:
    """Hugging Face's own count of them goes wrong where they are 0; pictures are never so small here."""
    shape = Idefics3Shape(edge=edge, longest_edge=longest)
    processor = build_image_processor(shape)
    vision = {"image_size": edge, "patch_size": patch}
    rule = make_rule(processor.to_dict(), vision_config=vision, scale_factor=scale)
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (1, 9999), (9999, 1), *rng.integers(1, 4000, (2000, 2)).tolist()]:
        _, *expected = processor.get_number_of_image_patches(height, width, {})
        layout = rule.layout("image", width, height, 1, {})
        assert list(layout.numbers) == expected, (width, height)
        assert layout.num_features == (expected[0] * expected[1] + 1) * (edge // patch // scale) ** 2


def test_picture_of_one_tile_has_an_overview_alone() -> None:
    layout = make_rule().layout("image", 100, 100, 1, {"size": {"longest_edge": 30}})
    assert layout.numbers == (0, 0)
    assert layout.num_features == NUM_FEATURES
    assert len(layout.plan.views) == 1


@pytest.mark.parametrize(
    ("processor", "config", "absent", "reason"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, {}, (), "SmolVLMImageProcessor"),
        ({"do_flip": True}, {}, (), "do_flip"),
        ({"max_image_size": {"longest_edge": 40}}, {}, (), "max_image_size"),
        ({"image_seq_len": 9}, {}, (), "image_seq_len is 9; the model is built for 4"),
        ({"size": {"shortest_edge": 96}}, {}, (), "longest_edge"),
        ({"size": 96}, {}, (), "longest_edge"),
        ({"resample": 5}, {}, (), "resample"),
        ({"image_mean": [0.5]}, {}, (), "image_mean"),
        ({}, {"scale_factor": 3}, (), "scale_factor"),
        ({}, {"vision_config": {"image_size": EDGE, "patch_size": 40}}, (), "patch_size"),
        ({}, {}, (FAKE,), "fake_token_around_image"),
        ({}, {}, (GLOBAL,), "global-img"),
    ],
)
def test_from_hf_of_what_is_not_implemented_is_refused(
    processor: dict[str, Any], config: dict[str, Any], absent: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(build_image_processor(SHAPES["idefics3"]).to_dict() | processor, Tokenizer(*absent), **config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_crops": 4}, "num_crops"),
        ({"max_image_size": {"longest_edge": 64}}, "cannot change max_image_size"),
        ({"image_mean": [0, 0, 0]}, "cannot change image_mean"),
        ({"size": {"longest_edge": 0}}, "longest_edge"),
        ({"do_image_splitting": 1}, "true or false"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule().layout("image", 100, 100, 1, options)


@pytest.mark.parametrize("options", [{"size": {"longest_edge": 250}}, {"do_resize": False}])
def test_tags_past_the_tokenizer_s_are_text_as_in_hf(options: dict[str, Any]) -> None:
    tokenizer = Tokenizer()
    made = build_image_processor(SHAPES["idefics3"])(
        [[noise(230, 20)]], return_row_col_info=True, return_tensors="np", **options
    )
    rule = make_rule(tokenizer=tokenizer)
    runs = rule.expand("image", 1, rule.layout("image", 230, 20, 1, options))
    assert spelled(runs, tokenizer) == picture_text("idefics3", made, 0, NUM_FEATURES)
    assert "<row_1_col_8>" in runs


def test_embedding_layout_takes_an_overview_or_all_tiles_of_a_size() -> None:
    rule = make_rule()
    assert rule.embedding_layout("image", NUM_FEATURES, {}).numbers == (0, 0)
    tiled = rule.layout("image", 90, 40, 1, {})
    layout = rule.embedding_layout("image", tiled.num_features, {"image_sizes": (40, 90)})
    assert (layout.numbers, layout.num_features, layout.plan.views) == (tiled.numbers, tiled.num_features, ())
    assert rule.expand("image", 1, layout) == rule.expand("image", 1, tiled)
    with pytest.raises(RequestError, match="image_sizes"):
        rule.embedding_layout("image", tiled.num_features, {})
    with pytest.raises(RequestError, match="image_grid_thw"):
        rule.embedding_layout("image", NUM_FEATURES, {"image_grid_thw": (1, 2, 2)})


# ------------------------------------------------------------------------------------------------------- videos

SMOLVLM: dict[str, Any] = {"model_type": "smolvlm"}


def clip(count: int = 3, **about: Any) -> Clip:
    return Clip(width=90, height=70, num_frames=count, frames=tuple(range(count)), **about)


def test_videos_of_idefics3_are_refused() -> None:
    rule = make_rule()
    assert (rule.max_items("image"), rule.max_items("video")) == (None, 0)
    for ask in (
        lambda: rule.placeholder("video"),
        lambda: rule.video_layout(clip(), {}),
        lambda: rule.layout("video", 100, 100, 8, {}),
        lambda: rule.embedding_layout("video", NUM_FEATURES, {}),
    ):
        with pytest.raises(RequestError, match="images only"):
            ask()


@pytest.mark.parametrize("size", [(1, 1), (90, 70), (300, 2), (640, 480), (32, 32)])
def test_frames_have_the_pixels_of_pictures_that_are_not_split(size: tuple[int, int]) -> None:
    """As transformers' video processor, but for Pillow's filter in place of torchvision's."""
    image = noise(*size)
    processor = build_image_processor(SHAPES["smolvlm"])
    expected = processor([[image]], return_tensors="np", do_image_splitting=False)["pixel_values"][0]
    rule = make_rule(processor.to_dict(), **SMOLVLM)
    made = rule.video_layout(Clip(width=size[0], height=size[1], num_frames=1, frames=(0,)), {}).plan
    out = np.empty(made.num_bytes, np.uint8)
    make_tiles(image, made, out)
    pixels = out.reshape(-1, EDGE, EDGE, 3)
    got = np.stack([rule.norm.table()[pixels[..., channel], channel] for channel in range(3)], axis=1)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("shown", "metadata"),
    [
        (clip(1, fps=8.0), {"fps": 8.0, "duration": 0.125, "frames_indices": [0]}),
        (clip(3, fps=0.5), {"fps": 0.5, "duration": 6.0, "frames_indices": [0, 1, 2]}),
        (clip(3), {"fps": None, "duration": None, "frames_indices": [0, 1, 2]}),
        (clip(50), {"fps": None, "duration": None, "frames_indices": list(range(50))}),
        (
            Clip(width=9, height=9, num_frames=40_000, frames=(0, 1801, 39_999), fps=10.0),
            {"fps": 10.0, "duration": 4000.0, "frames_indices": [0, 1801, 39_999]},
        ),
        (
            clip(2, fps=2.0, recorded=(7, 300), num_recorded=500),
            {"fps": 2.0, "duration": 250.0, "frames_indices": [7, 300]},
        ),
    ],
)
def test_video_s_text_equals_hf_s(shown: Clip, metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer()
    rule = make_rule(tokenizer=tokenizer, **SMOLVLM)
    layout = rule.video_layout(shown, {})
    runs = rule.expand("video", 1, layout)
    assert spelled(runs, tokenizer) == video_text(metadata, len(shown.frames), NUM_FEATURES)
    assert layout.num_features == num_features(runs, tokenizer) == len(shown.frames) * NUM_FEATURES
    assert layout.num_patches == len(shown.frames) * 16
    assert (layout.plan.frames, layout.plan.tile_sizes) == (shown.frames, [(EDGE, EDGE)])


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "one"),
        (12, "twelve"),
        (20, "twenty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (768, "seven hundred and sixty-eight"),
        (1001, "one thousand and one"),
        (1234, "one thousand, two hundred and thirty-four"),
    ],
)
def test_number_of_frames_is_spelled_as_num2words_does(count: int, words: str) -> None:
    assert in_words(count) == words


@pytest.mark.parametrize("seconds", [1, 5, 30, 100, 300])
@pytest.mark.parametrize(("fps", "most"), [(1, 64), (2, 4), (0.5, 10), (5, 16), (12, 12), (13, 13), (100, 1000)])
def test_video_samples_as_hf_s_processor_does(seconds: int, fps: float, most: int) -> None:
    rule = make_rule(**SMOLVLM)
    processor: Any = SimpleNamespace(num_frames=most, fps=fps)
    metadata = VideoMetadata(total_num_frames=seconds * 12, fps=12.0, duration=float(seconds))
    sampled: Any = SmolVLMVideoProcessor.sample_frames
    expected = sampled(processor, metadata).tolist()
    plan = rule.video_layout(clip(seconds * 12, fps=12.0), {"num_frames": most, "fps": fps}).plan
    assert list(plan.frames) == expected


def test_video_sampling_of_the_hub_s_configs_is_read() -> None:
    sampling = {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 64}}
    base = build_image_processor(SHAPES["smolvlm"]).to_dict() | {"video_sampling": sampling}
    rule = make_rule(base, **SMOLVLM)
    assert (rule.video_settings["fps"], rule.video_settings["num_frames"]) == (1, 8)
    assert rule.video_settings["size"] == base["size"]  # which transformers, too, prefers to the sampling's
    every = clip(240, fps=12.0)
    assert len(rule.video_layout(every, {}).plan.frames) == 240  # chosen by whoever loaded it
    assert len(rule.video_layout(every, {"do_sample_frames": True}).plan.frames) == 8
    alone = make_rule({key: value for key, value in base.items() if key != "size"}, **SMOLVLM)
    assert alone.video_settings["size"] == {"longest_edge": 64}


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ({"do_flip": True}, "do_flip"),
        ({"max_image_size": {"longest_edge": 64}}, "max_image_size"),
        ({"max_image_size": {"longest_edge": EDGE}, "image_mean": [0, 0, 0]}, "normalised pixels"),
        ({"max_image_size": {"longest_edge": EDGE}, "video_sampling": {"fps": 1}}, "video_sampling"),
        ({"max_image_size": {"longest_edge": EDGE}, "size": 96}, "longest_edge"),
    ],
)
def test_video_config_that_is_not_implemented_is_refused(video: dict[str, Any], reason: str) -> None:
    processor = build_image_processor(SHAPES["smolvlm"]).to_dict() | {"video_processor": video}
    with pytest.raises(UnsupportedModelError, match=reason):
        make_rule(processor, **SMOLVLM)
    make_rule(processor)  # which takes no videos


@pytest.mark.parametrize(
    ("shown", "options", "reason"),
    [
        (clip(fps=8.0), {"num_crops": 2}, "num_crops"),
        (clip(fps=8.0), {"fps": 1}, "needs all three"),
        (clip(), {"fps": 1, "num_frames": 2}, "needs all three"),
        (clip(fps=8.0), {"fps": "1", "num_frames": 2}, "fps is '1'"),
        (clip(fps=8.0), {"fps": float("inf"), "num_frames": 2}, "above 0"),
        (clip(fps=8.0), {"fps": 1, "num_frames": 2.0}, "whole number"),
        (clip(fps=1e-300), {}, "longer than"),
        (clip(fps=1e-320), {"fps": 1, "num_frames": 2}, "too many frames"),
        (clip(fps=8.0), {"do_resize": False}, "32 x 32"),
        (clip(fps=8.0), {"size": {"longest_edge": 0}}, "longest_edge"),
    ],
)
def test_video_options_that_cannot_be_honoured_are_refused(shown: Clip, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make_rule(**SMOLVLM).video_layout(shown, options)


def test_video_is_marked_by_text_where_the_tokenizer_would_split_it() -> None:
    tokenizer = Tokenizer("<video>")
    assert make_rule(tokenizer=tokenizer, **SMOLVLM).placeholder("video") == Placeholder("<video>", None, "<video>")
    whole = Tokenizer()
    known = make_rule(tokenizer=whole, **SMOLVLM).placeholder("video")
    assert known.token_id == whole.convert_tokens_to_ids("<video>")


def test_video_s_embedding_is_whole_frames_at_24_a_second() -> None:
    rule = make_rule(**SMOLVLM)
    assert rule.embedding_layout("video", 30 * NUM_FEATURES, {}).times == rule.video_layout(clip(30), {}).times
    with pytest.raises(RequestError, match="whole tiles of 4"):
        rule.embedding_layout("video", NUM_FEATURES + 1, {})
    with pytest.raises(RequestError, match="alone"):
        rule.embedding_layout("video", NUM_FEATURES, {"video_grid_thw": (1, 2, 2)})
