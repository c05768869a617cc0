"""Resizing pictures with Pillow's integers: a launch for each axis, whatever the sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_ROWS = 4  # of which each reads the same weights
_BLOCK_BYTES = 256

_SIZES = (
    "picture_ptr", "taps_ptr", "out_ptr", "row_stride", "num_taps", "num_made", "num_rows", "row_bytes", "num_blocks",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_SIZES)  # one kernel for all pictures
def _resample_kernel(
    picture_ptr, taps_ptr, out_ptr, row_stride, num_taps, num_made, num_rows, row_bytes, num_blocks,
    ACROSS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = (block // num_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    byte = (block % num_blocks) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    inside = (row < num_rows) & (byte < row_bytes)
    if ACROSS:
        made = byte // 3
        step = 3
        first = tl.load(taps_ptr + made, mask=byte < row_bytes, other=0)
        source = picture_ptr + row * row_stride + first * 3 + byte % 3
    else:
        made = row
        step = row_stride
        first = tl.load(taps_ptr + made, mask=row < num_rows, other=0)
        source = picture_ptr + first * row_stride + byte
    weights = taps_ptr + num_made + made
    total = tl.full((BLOCK_ROWS, BLOCK_BYTES), 1 << 21, tl.int32)
    for tap in range(num_taps):
        weight = tl.load(weights + tap * num_made, mask=made < num_made, other=0)
        total += tl.load(source + tap * step, mask=inside, other=0).to(tl.int32) * weight
    value = tl.minimum(tl.maximum(total >> 22, 0), 255)
    tl.store(out_ptr + row * row_bytes + byte, value.to(tl.uint8), mask=inside)


def resample(picture_YX3: torch.Tensor, taps: torch.Tensor, axis: int, out_YX3: torch.Tensor) -> None:
    """As ``reference.resample``. A picture is taken for rows of bytes, which neighbouring lanes read and write."""
    assert picture_YX3.stride()[1:] == (3, 1)
    assert out_YX3.is_contiguous()
    num_rows, width, _ = out_YX3.shape
    num_blocks = triton.cdiv(3 * width, _BLOCK_BYTES)
    _resample_kernel[(triton.cdiv(num_rows, _BLOCK_ROWS) * num_blocks,)](
        picture_YX3, taps, out_YX3, picture_YX3.stride(0), taps.shape[0] - 1, taps.shape[1],
        num_rows, 3 * width, num_blocks,
        ACROSS=axis == 1, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_BYTES=_BLOCK_BYTES, num_warps=4, num_stages=1,
    )  # fmt: skip
