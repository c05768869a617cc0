"""MiniCPM-V's slicing, pixels and prompt tokens, against what its reference code made of the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.kernels.reference import KERNELS
from opsin.layers import Placement
from opsin.media.ops import make_tiles
from opsin.models.hub import find_model
from opsin.models.minicpmv.rule import MiniCPMVRule
from opsin.models.rule import TokenRun
from opsin.models.slicing import best_size, slice_grid
from opsin.models.towers.patches import Patches
from opsin.processing.tokenizer import Tokenizer
from opsin.types import Clip, MediaLayout
from tests.factories import minicpmv as factory

ReadRule = Callable[..., MiniCPMVRule]


@pytest.fixture(scope="module")
def read_rule(tmp_path_factory: pytest.TempPathFactory) -> ReadRule:
    folders = {
        name: factory.write_minicpmv(tmp_path_factory.mktemp(name), shape) for name, shape in factory.SHAPES.items()
    }

    def read(name: str = "plain", config: dict[str, Any] | None = None, **processor: Any) -> MiniCPMVRule:
        files = find_model(str(folders[name]), overrides=config)
        return MiniCPMVRule.from_hf(
            files.config, {**files.processor, **processor}, Tokenizer.from_folder(folders[name])
        )

    return read


def lay_out(rule: MiniCPMVRule, width: int, height: int, **options: Any) -> MediaLayout:
    return rule.layout("image", width, height, 1, options)


@pytest.mark.parametrize("recorded", factory.recorded_slicing(), ids=["released", "tiny"])
def test_slices_over_sizes_equal_the_reference(recorded: dict[str, Any], read_rule: ReadRule):
    scale, patch_size = recorded["scale_resolution"], recorded["patch_size"]
    rule = replace(read_rule(), scale=scale, patch_size=patch_size)
    assert len(recorded["rows"]) == 1025
    num_narrow = 0
    for width, height, max_slices, *expected in recorded["rows"]:
        grid = slice_grid((width, height), scale, max_slices)
        overview = best_size(width, height, scale, patch_size, enlarge=grid is None)
        assert overview == tuple(expected[:2])
        assert grid == (tuple(expected[2:4]) or None)
        sizes = [overview, *([tuple(expected[4:])] if grid else [])]
        if max(w * h for w, h in sizes) > 8 * scale**2:
            num_narrow += 1
            with pytest.raises(MediaError, match="too narrow"):
                lay_out(rule, width, height, max_slice_nums=max_slices)
            continue
        layout = lay_out(rule, width, height, max_slice_nums=max_slices)
        assert [(view.width, view.height) for view in layout.plan.views] == sizes
        assert [(view.cols, view.rows) for view in layout.plan.views[1:]] == ([grid] if grid else [])
        assert layout.num_features == factory.QUERIES * len(layout.plan.tile_sizes)
        assert layout.num_patches == sum(h * w for h, w in layout.plan.tile_sizes) // patch_size**2
    assert num_narrow < 30


@factory.needs_recorded_pillow
@pytest.mark.parametrize("name", factory.SHAPES)
def test_pixels_over_sizes_equal_the_reference(name: str, read_rule: ReadRule):
    rule = read_rule(name)
    place = Placement(KERNELS, torch.device("cpu"), torch.float32)
    patches = Patches(place, factory.PATCH_SIZE, rule.norm)
    for case in factory.recorded_sizes(name):
        layout = lay_out(rule, *case.image.size)
        assert [(h // factory.PATCH_SIZE, w // factory.PATCH_SIZE) for h, w in layout.plan.tile_sizes] == case.grids
        pixels = np.empty(layout.plan.num_bytes, np.uint8)
        make_tiles(case.image, layout.plan, pixels)
        ends = np.cumsum([0, *(h * w * 3 for h, w in layout.plan.tile_sizes)])
        tiles = [
            torch.from_numpy(pixels[start:end].reshape(1, *size, 3))
            for (start, end), size in zip(pairwise(ends), layout.plan.tile_sizes, strict=True)
        ]
        values = torch.cat([patches(tile)[0] for tile in tiles]).numpy()
        assert values[:2, :3].ravel().tolist() == case.first
        assert values[-1, -3:].tolist() == case.last
        assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == case.pixels


def written(rule: MiniCPMVRule, layout: MediaLayout, index: int = 1) -> str:
    """What stands for a picture, readable."""
    tags = {getattr(rule.tags, tag): rule.settings[tag] for tag in rule.tags.__dataclass_fields__}
    tags[rule.image_token_id] = "."
    runs = rule.expand("image", index, layout)
    return "".join(tags[run.token_id] * run.count if isinstance(run, TokenRun) else run for run in runs)


def test_expand_writes_numbers_overview_and_rows_of_slices(read_rule: ReadRule):
    rule = read_rule()
    assert written(rule, lay_out(rule, 30, 30), 12) == "<image_id>11</image_id><image>....</image>"
    whole, part = "<image>....</image>", "<slice>....</slice>"
    sliced = lay_out(rule, 64, 48, use_image_id=False)
    assert sliced.numbers == (2, 2, 0)
    assert written(rule, sliced) == f"{whole}{part}{part}\n{part}{part}"
    assert written(read_rule("dropped"), lay_out(read_rule("dropped"), 30, 30)) == whole


def test_video_is_one_overview_a_frame_whatever_the_options(read_rule: ReadRule):
    rule = read_rule()
    clip = Clip(width=100, height=60, num_frames=9, frames=(0, 4, 8))
    layout = rule.video_layout(clip, {"max_slice_nums": 9, "use_image_id": True})
    assert layout.plan.frames == (0, 4, 8)
    assert layout.plan.views == lay_out(rule, 100, 60, max_slice_nums=1).plan.views
    assert (layout.num_features, layout.num_patches) == (12, 3 * 15)
    feature = TokenRun(rule.image_token_id, 4, is_feature=True)
    frame = [TokenRun(rule.tags.im_start), feature, TokenRun(rule.tags.im_end)]
    assert rule.expand("video", 2, layout) == frame * 3
    with pytest.raises(RequestError, match="num_crops"):
        rule.video_layout(clip, {"num_crops": 4})


@pytest.mark.parametrize("max_slices", [1, 2, 3, 5, 7, 9, 16])
def test_embedding_layout_is_the_picture_s_without_its_pixels(max_slices: int, read_rule: ReadRule):
    """Under any limit on slices, which features do not come with."""
    rule = read_rule()
    for width, height in ((90, 70), (30, 30), (200, 33), (33, 200), (640, 480), (64, 64)):
        layout = lay_out(rule, width, height, max_slice_nums=max_slices)
        given = rule.embedding_layout("image", layout.num_features, {"image_sizes": (width, height)})
        assert given.numbers == layout.numbers
        assert written(rule, given) == written(rule, layout)
        assert (given.plan.views, given.num_patches) == ((), 0)


def test_embedding_that_no_picture_of_its_size_gives_is_refused(read_rule: ReadRule):
    rule = read_rule()
    for num_features, size, words in (
        (27, (90, 70), "27 features"),  # not whole slices
        (8, (90, 70), "none or 2 to 8"),  # one slice
        (40, (90, 70), "none or 2 to 8"),
        (12, (30, 30), "there are none"),
    ):
        with pytest.raises(RequestError, match=words):
            rule.embedding_layout("image", num_features, {"image_sizes": size})
    for modality, extras in (
        ("image", {}),
        ("image", {"image_grid_thw": (1, 2, 2)}),
        ("video", {"image_sizes": (9, 7)}),
    ):
        with pytest.raises(RequestError, match="image_size_list"):
            rule.embedding_layout(modality, 28, extras)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_slice_nums": 0}, "max_slice_nums is 0"),
        ({"max_slice_nums": 1000}, "from 1 to 256"),
        ({"max_slice_nums": "4"}, "'4'"),
        ({"use_image_id": 1}, "true or false"),
        ({"scale_resolution": 64}, "cannot change scale_resolution"),
        ({"num_crops": 4}, "num_crops"),
    ],
)
def test_option_that_cannot_be_is_refused(options: dict[str, Any], words: str, read_rule: ReadRule):
    with pytest.raises(RequestError, match=words):
        lay_out(read_rule(), 90, 70, **options)


@pytest.mark.parametrize(
    ("config", "processor", "words"),
    [
        ({}, {"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({}, {"do_pad": True}, "do_pad"),
        ({}, {"slice_mode": False}, "slice_mode"),
        ({}, {"max_slice_nums": 0}, "max_slice_nums"),
        ({}, {"im_start": "<picture>"}, "lacks <picture>"),
        ({}, {"unk_token": "<image>"}, "unk_token is '<image>', but unk is '<unk>'"),
        ({"query_num": 64}, {}, "image_feature_size is 4; the model is built for 64"),
        ({"vision_config": {"patch_size": 14}}, {}, "patch_size is 8; the model is built for 14"),
    ],
)
def test_checkpoint_that_is_not_implemented_is_refused(
    config: dict[str, Any], processor: dict[str, Any], words: str, read_rule: ReadRule
):
    with pytest.raises(UnsupportedModelError, match=words):
        read_rule(config=config, **processor)


def test_processor_config_that_was_saved_again_is_taken(read_rule: ReadRule):
    """``save_pretrained`` of the checkpoint's own class writes its attributes, too."""
    again = {"im_start_token": "<image>", "unk_token": "<unk>", "mean": [0.5] * 3, "std": [0.5] * 3}
    assert read_rule(**again) == read_rule()


def test_hub_processor_config_is_read_as_it_is(read_rule: ReadRule):
    """openbmb/MiniCPM-V-2_6's, with the settings of which nothing is tiny."""
    released = {"scale_resolution": 448, "patch_size": 14, "image_feature_size": 64, "max_slice_nums": 9}
    rule = read_rule(config={"query_num": 64, "vision_config": {"patch_size": 14}}, **released)
    layout = lay_out(rule, 1344, 1344)
    assert (layout.num_features, layout.numbers) == (640, (3, 3, 1))
    assert layout.plan.tile_sizes == [(448, 448)] * 10


def test_recorded_data_stays_small():
    assert sum(path.stat().st_size for path in Path(factory.RECORDED).iterdir()) < 300_000
