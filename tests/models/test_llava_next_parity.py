"""What only LLaVA-NeXT does, and the mistakes that comparing it with transformers would show."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from opsin.errors import UnsupportedModelError
from opsin.models.hub import find_model
from opsin.models.weights import _slots
from opsin.types import MediaLayout
from tests.factories.families import LLAVA_NEXT as FAMILY
from tests.models.driver import TOLERANCE, Driver, Encodable, Row, meta_model, pictures


def test_llava_next_without_newlines_is_refused(tiny):
    config = find_model(str(tiny(FAMILY, "mha"))).config
    with pytest.raises(UnsupportedModelError, match="use_image_newline_parameter"):
        meta_model({**config, "use_image_newline_parameter": False})


@pytest.mark.parametrize("name", FAMILY.hub_configs)
def test_llava_next_hub_config_has_a_newline(name):
    assert "image_newline" in _slots(meta_model(FAMILY.hub_configs[name]))


@torch.inference_mode()
def prompt(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    """The question about ``images``, with features of ``made`` in place of theirs."""
    row = driver.prompt(FAMILY.question, images)
    row.features = driver.model.encode(*made)
    return row


def _swapped_pictures(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    """The first picture's features where the second's belong; their numbers differ, so rows are only exchanged."""
    row = prompt(driver, images, made)
    assert row.features is not None
    row.features = row.features.roll(made.layouts[0].num_features, dims=0)
    return row


def _swapped_tiles(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    tiles, layouts = made
    first = [tiles[0][0], tiles[0][2], tiles[0][1], *tiles[0][3:]]
    return prompt(driver, images, Encodable([first, tiles[1]], layouts))


def _overview_last(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    tiles, layouts = made
    return prompt(driver, images, Encodable([[*item[1:], item[0]] for item in tiles], layouts))


def _mosaic_first(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    row = prompt(driver, images, made)
    assert row.features is not None
    parts = row.features.split([layout.num_features for layout in made.layouts])
    row.features = torch.cat([part.roll(-16, dims=0) for part in parts])
    return row


def _newline_before_each_row(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    row = prompt(driver, images, made)
    assert row.features is not None
    features = row.features.clone()
    start = 0
    for layout in made.layouts:
        rows, cols, cut_rows, cut_cols = layout.numbers
        shape = (4 * rows - 2 * cut_rows, 4 * cols - 2 * cut_cols + 1)
        mosaic = features[start + 16 : start + layout.num_features].unflatten(0, shape)
        features[start + 16 : start + layout.num_features] = mosaic.roll(1, dims=1).flatten(0, 1)
        start += layout.num_features
    row.features = features
    return row


def _no_newline(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    with torch.inference_mode():
        driver.model.image_newline.zero_()  # type: ignore[attr-defined]
    return prompt(driver, images, made)


def _tile_after_tile(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    """Rows of features that end with their tile, not with the mosaic: patches of tiles as they come."""
    row = prompt(driver, images, made)
    assert row.features is not None
    rows, cols, cut_rows, _ = made.layouts[0].numbers
    shape = (4 * rows - 2 * cut_rows, 4 * cols + 1)
    end = 16 + shape[0] * shape[1]
    mosaic = row.features[16:end].unflatten(0, shape)
    tiles = torch.cat([mosaic[:, 4 * i : 4 * i + 4].flatten(0, 1) for i in range(cols)])
    row.features = torch.cat([row.features[:16], tiles, mosaic[:, -1], row.features[end:]])
    return row


def _other_cut(driver: Driver, images: list[Image.Image], made: Encodable) -> Row:
    """The first mosaic's rows cut at its end alone."""
    tiles, layouts = made
    row = prompt(driver, images, made)
    rows, cols, cut_rows, _ = layouts[0].numbers
    assert cut_rows
    whole = MediaLayout(layouts[0].plan, 16 + 4 * rows * (4 * cols + 1), 0, (rows, cols, 0, 0))
    with torch.inference_mode():
        uncut = driver.model.encode(tiles[:1], [whole])
    assert row.features is not None
    row.features = torch.cat([uncut[: layouts[0].num_features], row.features[layouts[0].num_features :]])
    return row


@pytest.mark.parametrize(
    "mistake",
    [
        _swapped_pictures,
        _swapped_tiles,
        _overview_last,
        _mosaic_first,
        _newline_before_each_row,
        _no_newline,
        _tile_after_tile,
        _other_cut,
    ],
)
def test_llava_next_mistakes_move_logits_by_1000_tolerances(tiny, mistake):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, "mha"))
    images = pictures(FAMILY.sizes)
    made = driver.read(images)
    expected = driver.prefill(prompt(driver, images, made))[-1]
    wrong = driver.prefill(mistake(driver, images, made))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE
