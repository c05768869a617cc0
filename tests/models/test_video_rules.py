"""Qwen2-VL's and InternVL's rules for videos: frames, grids, text and positions, against Hugging Face's video classes.

These import torchvision, which is not installed, for their pixels alone: their sampling of frames is run without it.
Pixels are compared in ``tests/engine/test_videos.py``, by what models make of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import InternVLProcessor, Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.video_utils import VideoMetadata

from opsin.errors import RequestError, UnsupportedModelError
from opsin.models.internvl.rule import InternVLRule
from opsin.models.qwen2_vl.rule import Qwen2VLRule
from opsin.models.videos import spaced
from opsin.types import Clip, MediaItem
from tests.models.stubbed import video_processor

IMAGE, VIDEO = 7, 8


class Tokenizer:
    def convert_tokens_to_ids(self, token: str) -> int | None:
        known = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<video>": VIDEO}
        return known.get(token) or {"<IMG_CONTEXT>": IMAGE, "<img>": 5, "</img>": 6}.get(token)


@pytest.fixture(scope="module")
def processors() -> Mapping[str, Any]:
    """The two classes."""
    names = {"qwen2_vl": "Qwen2VLVideoProcessor", "internvl": "InternVLVideoProcessor"}
    return {family: video_processor(family, name) for family, name in names.items()}


def qwen(version: str = "2", **video: Any) -> Qwen2VLRule:
    config = {"model_type": "qwen2_vl" if version == "2" else "qwen2_5_vl", "image_token_id": IMAGE}
    config["vision_config"] = {} if version == "2" else {"tokens_per_second": 2}
    settings = {"size": {"shortest_edge": 4 * 784, "longest_edge": 20 * 784}}
    return Qwen2VLRule.from_hf(config, settings | ({"video_processor": video} if video else {}), Tokenizer())


def internvl(**video: Any) -> InternVLRule:
    config = {"image_token_id": IMAGE, "vision_config": {"image_size": 56, "patch_size": 14}}
    settings: dict[str, Any] = {"size": {"height": 56, "width": 56}}
    return InternVLRule.from_hf(config, settings | ({"video_processor": video} if video else {}), Tokenizer())


def clip(total: int, frames: Sequence[int] | None = None, fps: float | None = 10.0, size: Any = (200, 113)) -> Clip:
    return Clip(size[0], size[1], total, tuple(range(total) if frames is None else frames), fps)


# ---------------------------------------------------------------------------------------------------------- frames


def test_qwen2_vl_samples_the_frames_that_hf_samples(processors: Mapping[str, Any]) -> None:
    rule = qwen()
    settings = SimpleNamespace(num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    checked = 0
    for total, fps in itertools.product((1, 3, 4, 5, 29, 30, 31, 100, 250, 1801), (10.0, 23.976, 30.0)):
        for options in (
            {"num_frames": 3},
            {"num_frames": 4},
            {"num_frames": 22},
            {"fps": 1},
            {"fps": 2.5},
            {"fps": 50},
        ):
            metadata = VideoMetadata(total_num_frames=total, fps=fps)
            try:
                expected = processors["qwen2_vl"].sample_frames(settings, metadata, **options).tolist()
            except (ValueError, ZeroDivisionError):
                with pytest.raises(RequestError, match="frames"):
                    rule.video_layout(clip(total, fps=fps), options)
                continue
            if not expected or expected[-1] >= total:
                continue
            padded = expected + expected[-1:] * (len(expected) % 2)
            assert list(rule.video_layout(clip(total, fps=fps), options).plan.frames) == padded, (total, fps, options)
            checked += 1
    assert checked > 100


def test_internvl_samples_the_frames_that_hf_samples(processors: Mapping[str, Any]) -> None:
    rule = internvl()
    settings = SimpleNamespace(num_frames=None, fps=None, initial_shift=True)
    checked = 0
    for total, fps in itertools.product((1, 4, 5, 29, 30, 31, 100, 250, 1801), (10.0, 23.976, 30.0)):
        for options in ({"num_frames": 1}, {"num_frames": 8}, {"num_frames": 13, "initial_shift": False}, {"fps": 1}):
            metadata = VideoMetadata(total_num_frames=total, fps=fps)
            try:
                expected = processors["internvl"].sample_frames(settings, metadata, **options).tolist()
            except (ValueError, ZeroDivisionError):
                with pytest.raises(RequestError, match="frames"):
                    rule.video_layout(clip(total, fps=fps), options)
                continue
            if expected and expected[-1] < total:
                assert list(rule.video_layout(clip(total, fps=fps), options).plan.frames) == expected, (total, options)
                checked += 1
    assert checked > 60


def test_spaced_is_torch_s_arange_below_the_total() -> None:
    for total in (1, 7, 15, 30, 97, 1000):
        for count in range(1, total + 1):
            expected = torch.arange(0, total, total / count).int().tolist()
            assert spaced(total, count) == [i for i in expected if i < total]


def test_frames_chosen_before_stay_unless_the_processor_is_asked() -> None:
    chosen = clip(30, (0, 10, 20, 29))
    for rule in (qwen(), internvl()):
        assert rule.video_layout(chosen, {}).plan.frames == (0, 10, 20, 29)
        assert rule.video_layout(chosen, {"do_sample_frames": False, "num_frames": 2}).plan.frames == (0, 10, 20, 29)
        assert len(rule.video_layout(chosen, {"num_frames": 6}).plan.frames) == 6


@pytest.mark.parametrize("make", [qwen, internvl])
def test_checkpoint_that_samples_does_so_where_nobody_chose(make: Any) -> None:
    size = {"height": 56, "width": 56} if make is internvl else {"shortest_edge": 784, "longest_edge": 7840}
    rule = make(do_sample_frames=True, num_frames=4, size=size)
    assert len(rule.video_layout(clip(30), {}).plan.frames) == 4
    assert rule.video_layout(clip(30, (0, 29)), {}).plan.frames == (0, 29)
    assert len(rule.video_layout(clip(30, fps=None), {}).plan.frames) == 30  # a list of pictures
    assert len(rule.video_layout(clip(30), {"do_sample_frames": False}).plan.frames) == 30


@pytest.mark.parametrize("make", [qwen, internvl])
@pytest.mark.parametrize(
    ("given", "options", "reason"),
    [
        (clip(30, fps=None), {"fps": 2}, "nobody told"),
        (clip(4), {"num_frames": 8}, "cannot be sampled"),
        (Clip(9, 9, 2, (0, 1), 5.0, (0, 40), 80), {"num_frames": 2}, "selection"),
        (clip(4), {"frames": 8}, "unknown keys: frames"),
        (clip(4), {"image_mean": 0.1}, "cannot change image_mean"),
        (clip(4), {"do_resize": False}, "Without do_resize"),
    ],
)
def test_options_that_cannot_be_met_are_refused(make: Any, given: Clip, options: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        make().video_layout(given, options)


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (30, 500), (640, 480), (56, 57), (1920, 1080)])
@pytest.mark.parametrize("count", [1, 2, 5, 32])
def test_qwen2_vl_video_grids_equal_hf(size: tuple[int, int], count: int) -> None:
    width, height = size
    cases: list[tuple[dict[str, Any], tuple[int, int]]] = [
        ({}, (4 * 784, 20 * 784)),  # the pictures', where the folder has none for videos
        ({"size": {"shortest_edge": 100_000, "longest_edge": 200_000}}, (100_000, 200_000)),
        ({"min_pixels": 3136, "max_pixels": 50_176}, (3136, 50_176)),
        ({"image_mean": (0.48145466, 0.4578275, 0.40821073)}, (128 * 784, 768 * 784)),
    ]
    for video, bounds in cases:
        made_height, made_width = hf.smart_resize(height, width, 28, *bounds)
        layout = qwen(**video).video_layout(clip(count, size=size), {})
        grid = ((count + 1) // 2, made_height // 14, made_width // 14)
        assert layout.numbers == grid
        assert layout.num_patches == 4 * layout.num_features == grid[0] * grid[1] * grid[2]
        assert layout.plan.num_bytes == 2 * grid[0] * made_height * made_width * 3


def test_qwen2_vl_shares_a_budget_among_frames_where_it_is_told_to() -> None:
    """``cap_pixels_per_frame``: 0.9 * 1000 tokens' worth of pixels over 30 frames, two to a step."""
    rule = qwen(
        size={"shortest_edge": 784, "longest_edge": 784 * 700}, cap_pixels_per_frame=True, max_video_tokens=1000
    )
    layout = rule.video_layout(clip(30, size=(1000, 1000)), {})
    assert layout.num_features == 15 * 49  # 60 tokens a step at most, which is 7 x 7
    assert rule.video_layout(clip(30, size=(1000, 1000)), {"cap_pixels_per_frame": False}).num_features == 15 * 676


def test_internvl_video_is_one_tile_a_frame() -> None:
    layout = internvl().video_layout(clip(5, size=(200, 90)), {})
    assert (layout.num_features, layout.num_patches, layout.plan.frames) == (5 * 4, 5 * 16, (0, 1, 2, 3, 4))
    assert layout.plan.tile_sizes == [(56, 56)]


def test_options_of_the_other_modality_are_passed_over() -> None:
    """One request's options are for its pictures and its videos."""
    rule = qwen()
    assert rule.layout("image", 200, 200, 1, {"fps": 2}) == rule.layout("image", 200, 200, 1, {})
    tiles = internvl()
    assert tiles.video_layout(clip(3), {"max_patches": 2}) == tiles.video_layout(clip(3), {})
    assert tiles.layout("image", 99, 99, 1, {"num_frames": 2}) == tiles.layout("image", 99, 99, 1, {})


# ---------------------------------------------------------------------------------------------- text and positions


def test_internvl_frames_are_captioned_as_hf_captions_them() -> None:
    rule = internvl()
    signs: dict[int, str] = {IMAGE: "<c>", 5: "<img>", 6: "</img>"}
    processor: Any = SimpleNamespace(
        image_token="<c>", start_image_token="<img>", end_image_token="</img>", image_seq_length=4
    )
    for count in (1, 3):
        parts = rule.expand("video", 1, rule.video_layout(clip(count), {}))
        text = "".join(part if isinstance(part, str) else signs[part.token_id] * part.count for part in parts)
        given = {"pixel_values_videos": [torch.zeros(count, 3, 56, 56)]}
        assert text == InternVLProcessor.replace_video_token(processor, given, 0)


def hf_model(version: str) -> Any:
    text = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 0}
    text |= {"vocab_size": 10, "intermediate_size": 8, "bos_token_id": None, "eos_token_id": None}
    vision: dict[str, Any] = {"depth": 0, "num_heads": 1}
    if version == "2":
        return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision | {"embed_dim": 8, "hidden_size": 8}))
    vision |= {"hidden_size": 8, "out_hidden_size": 8, "tokens_per_second": 2}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def row(rule: Qwen2VLRule, *pieces: int | MediaItem) -> tuple[list[int], list[MediaItem]]:
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids += [1] * piece
        else:
            ids += [IMAGE if piece.modality == "image" else VIDEO] * piece.layout.num_features
    return ids, [piece for piece in pieces if not isinstance(piece, int)]


def moving(rule: Qwen2VLRule, count: int, fps: float | None = 10.0, size: Any = (300, 80)) -> MediaItem:
    return MediaItem(b"", "video", rule.video_layout(clip(count, fps=fps, size=size), {}))


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_positions_of_short_videos_equal_hf_rope_index(version: str) -> None:
    """While a video takes no more positions in time than in space, all versions of transformers agree."""
    rule = qwen(version)
    still = MediaItem(b"", "image", rule.layout("image", 90, 60, 1, {}))
    for fps in (2.0, 3.7, 10.0, 29.97, None):
        ids, items = row(rule, 3, moving(rule, 5, fps), 2, still, 1, moving(rule, 4, fps, (80, 300)), 4)
        kinds = torch.tensor([[0 if i == 1 else i - IMAGE + 1 for i in ids]])
        grids = {m: torch.tensor([i.layout.numbers for i in items if i.modality == m]) for m in ("image", "video")}
        seconds = {} if version == "2" else {"second_per_grid_ts": torch.tensor([2 / (fps or 24.0)] * 2)}
        expected, deltas = hf_model(version).get_rope_index(
            torch.tensor([ids]), kinds, image_grid_thw=grids["image"], video_grid_thw=grids["video"], **seconds
        )
        positions = rule.positions(ids, items)
        assert positions is not None
        assert [list(axis) for axis in positions.axes] == expected[:, 0].tolist()
        assert positions.delta == deltas.item()


def test_text_begins_behind_the_last_moment_of_a_long_video() -> None:
    """arXiv:2409.12191: each part begins one above the highest position before it. transformers did so until 5.0."""
    rule = qwen("2.5", size={"shortest_edge": 784, "longest_edge": 784})
    ids, items = row(rule, 1, moving(rule, 6, fps=0.5, size=(28, 28)), 2)  # 4 s a step, 2 positions a second
    positions = rule.positions(ids, items)
    assert positions is not None
    assert list(positions.axes[0]) == [0, 1, 9, 17, 18, 19]
    assert list(positions.axes[1]) == list(positions.axes[2]) == [0, 1, 1, 1, 18, 19]
    assert positions.delta == 20 - len(ids)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "video", "reason"),
    [
        (qwen, {"video_processor_type": "Other"}, "video_processor_type is 'Other'"),
        (qwen, {"stride": 2}, "unknown keys: stride"),
        (qwen, {"image_mean": (0, 0, 0)}, "normalised"),
        (qwen, {"temporal_patch_size": 4}, "temporal_patch_size"),
        (qwen, {"size": {"height": 3}}, "shortest_edge"),
        (internvl, {"size": {"height": 28, "width": 28}}, "its size"),
        (internvl, {"size": {"height": 56, "width": 56}, "do_center_crop": True}, "do_center_crop"),
        (internvl, {"size": {"height": 56, "width": 56}, "resample": 9}, "resample"),
    ],
)
def test_video_processor_that_is_not_implemented_is_refused(make: Any, video: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        make(**video)


def test_embeddings_of_videos_must_fit() -> None:
    rule = qwen()
    assert rule.embedding_layout("video", 12, {"video_grid_thw": (2, 4, 6)}).numbers == (2, 4, 6)
    assert qwen("2.5").embedding_layout("video", 12, {"video_grid_thw": (2, 4, 6)}).times == (1.0,)
    for extras in ({}, {"image_grid_thw": (2, 4, 6)}, {"video_grid_thw": (1, 4, 6)}, {"video_grid_thw": (2, 3, 8)}):
        with pytest.raises(RequestError, match="video_grid_thw"):
            rule.embedding_layout("video", 12, extras)
    assert internvl().embedding_layout("video", 12, {}).num_features == 12
    with pytest.raises(RequestError, match="whole tiles"):
        internvl().embedding_layout("video", 13, {})
