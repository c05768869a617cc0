"""The reference of the resize's passes: Pillow's bytes, from pictures that are cut out of larger ones, too."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.kernels import reference
from opsin.media.resample import make_taps, passes
from opsin.types import Resize


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    "sizes", [(40, 30, 28, 56), (33, 70, 31, 9), (5, 4, 64, 3), (1, 9, 9, 1), (64, 48, 64, 50)], ids=str
)
def test_resample_equals_pillow(sizes: tuple[int, int, int, int], name: Literal["bilinear", "bicubic", "lanczos"]):
    width, height, new_width, new_height = sizes
    large = np.random.default_rng(0).integers(0, 256, (height + 3, width + 5, 3), dtype=np.uint8)
    pixels = large[2 : 2 + height, 4 : 4 + width]
    picture = torch.from_numpy(large)[2 : 2 + height, 4 : 4 + width]
    for step in passes(Resize(new_width, new_height, name), width, height):
        shape = list(picture.shape)
        shape[step.axis] = step.num_out
        out = torch.empty(shape, dtype=torch.uint8)
        reference.resample(picture, torch.from_numpy(make_taps(*step[1:])), step.axis, out)
        picture = out
    resampling = Image.Resampling[name.upper()]
    expected = Image.fromarray(np.ascontiguousarray(pixels)).resize((new_width, new_height), resampling)
    np.testing.assert_array_equal(picture.numpy(), np.asarray(expected))
