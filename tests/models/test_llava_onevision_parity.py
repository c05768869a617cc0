"""What only LLaVA-OneVision does, and the mistakes that comparing it with transformers would show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opsin.errors import UnsupportedModelError
from opsin.models.hub import find_model
from opsin.models.llava_onevision import model as onevision
from tests.factories.families import LLAVA_ONEVISION as FAMILY
from tests.models.driver import TOLERANCE, Driver, meta_model, pictures


def _antialiased(mosaic_RCD, size):
    mosaic = mosaic_RCD.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(mosaic, size=size, mode="bilinear", antialias=True).squeeze(0).permute(1, 2, 0)


def _nearest(mosaic_RCD, size):
    mosaic = mosaic_RCD.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(mosaic, size=size, mode="nearest").squeeze(0).permute(1, 2, 0)


def _aligned(mosaic_RCD, size):
    mosaic = mosaic_RCD.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(mosaic, size=size, mode="bilinear", align_corners=True).squeeze(0).permute(1, 2, 0)


def _cropped(mosaic_RCD, size):
    return mosaic_RCD[: size[0], : size[1]]


@pytest.mark.parametrize("mistake", [_antialiased, _nearest, _aligned, _cropped])
def test_onevision_mistakes_move_logits_by_1000_tolerances(tiny, monkeypatch, mistake):
    """The comparison with transformers can fail."""
    driver = Driver(tiny(FAMILY, "qwen2"))
    images = pictures(FAMILY.sizes)
    expected = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    monkeypatch.setattr(onevision, "_resampled", mistake)
    wrong = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE


@torch.inference_mode()
def test_onevision_without_newlines_moves_logits_by_1000_tolerances(tiny):
    driver = Driver(tiny(FAMILY, "qwen2"))
    images = pictures(FAMILY.sizes)
    expected = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    driver.model.image_newline.zero_()  # type: ignore[attr-defined]
    wrong = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize(("key", "value"), [("vision_aspect_ratio", "pad"), ("use_image_newline_parameter", False)])
def test_onevision_setting_that_is_not_implemented_is_refused(tiny, key, value):
    config = find_model(str(tiny(FAMILY, "qwen2"))).config
    with pytest.raises(UnsupportedModelError, match=key):
        meta_model({**config, key: value})
