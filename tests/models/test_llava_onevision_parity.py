"""What only LLaVA-OneVision does, and the mistakes that comparing it with transformers would show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel as HFModel

from opsin.errors import UnsupportedModelError
from opsin.models.hub import find_model
from opsin.models.llava_onevision import model as onevision
from tests.factories.families import LLAVA_ONEVISION as FAMILY
from tests.models.driver import TOLERANCE, Driver, meta_model, pictures


def _antialiased(x_BRCD, size):
    return F.interpolate(x_BRCD.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _nearest(x_BRCD, size):
    return F.interpolate(x_BRCD.permute(0, 3, 1, 2), size=size, mode="nearest").permute(0, 2, 3, 1)


def _aligned(x_BRCD, size):
    return F.interpolate(x_BRCD.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def _cropped(x_BRCD, size):
    return x_BRCD[:, : size[0], : size[1]]


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


@pytest.mark.parametrize("grid", [4, 5, 27])
def test_frames_at_half_their_rows_equal_transformers(grid):
    """Also of the hub's 27 rows, which are not even."""
    frames_FPD = torch.randn(2, grid**2, 3, generator=torch.Generator().manual_seed(0))
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=grid, patch_size=1))
    pool: Any = HFModel.apply_pooling
    expected = pool(SimpleNamespace(config=config), frames_FPD)
    model: Any = SimpleNamespace(
        tower=SimpleNamespace(config=config.vision_config), image_newline=torch.full((3,), 7.0)
    )
    features_MD = onevision.LlavaOnevisionModel._video(model, frames_FPD)
    assert features_MD[-1].tolist() == [7.0] * 3
    torch.testing.assert_close(features_MD[:-1], expected.flatten(0, 1), atol=0, rtol=0)
