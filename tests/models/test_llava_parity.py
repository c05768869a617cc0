"""The mistakes that comparing LLaVA with transformers would show."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.factories.families import LLAVA as FAMILY
from tests.models.driver import TOLERANCE, Driver, Piece, Row, flip_channels, pictures


@pytest.mark.parametrize("name", FAMILY.shapes)
def test_llava_prompt_has_the_shape_s_features_per_picture(tiny, name):
    driver = Driver(tiny(FAMILY, name))
    row = driver.prompt(FAMILY.question, pictures(FAMILY.sizes))
    assert row.ids.count(driver.image_token_id) == 2 * FAMILY.shapes[name].num_features


def _swapped(driver: Driver, images: list[Image.Image]) -> Row:
    return driver.prompt(FAMILY.question, images[::-1])


def _shifted(driver: Driver, images: list[Image.Image]) -> Row:
    """All tokens but the first one position late: a shift of every one would change nothing."""
    row = driver.prompt(FAMILY.question, images)
    driver.run([Piece(row, 1)])
    driver.position_shift = 1
    return row


def _permuted(driver: Driver, images: list[Image.Image]) -> Row:
    row = driver.prompt(FAMILY.question, images)
    assert row.features is not None
    row.features = row.features.roll(1, dims=0)
    return row


def _transposed(driver: Driver, images: list[Image.Image]) -> Row:
    return driver.prompt(FAMILY.question, [image.transpose(Image.Transpose.TRANSPOSE) for image in images])


def _wrong_channels(driver: Driver, images: list[Image.Image]) -> Row:
    return driver.prompt(FAMILY.question, flip_channels(images))


@pytest.mark.parametrize("mistake", [_swapped, _shifted, _permuted, _transposed, _wrong_channels])
def test_llava_mistakes_move_logits_by_1000_tolerances(tiny, mistake):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, "gqa"))
    images = pictures([(32, 32), (32, 32)])  # the tower's size
    expected = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    wrong = driver.prefill(mistake(driver, images))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE
