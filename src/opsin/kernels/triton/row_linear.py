"""Linear layers of a single row: all that counts is how fast the weight is read.

cuBLAS reads the weights of a 1.5B decoder at 0.9 to 2.3 TB/s for one row on an H100. Here a program takes a few output
features and asks for all of their weights before it uses the first, and, where it can (see ``overlap``), before the row
itself is there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from opsin.kernels.triton.elementwise import ACTIVATIONS, activate, gated_activation
from opsin.kernels.triton.overlap import can_overlap

_LARGEST_OUTPUT = 65536  # cuBLAS reads the weights of language-model heads at full speed
_CHUNK = 2048
_FEW_CHUNKS = 6  # that four warps have registers for


@triton.jit
def _row_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_in, num_out,
    HAS_BIAS: tl.constexpr, GATE: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    if GATE is not None:  # a gate, and beside it what it gates, which is half a weight away
        o = o // 2 + o % 2 * (num_out // 2)
    weight_at = weight_ptr + o.to(tl.int64)[:, None] * num_in
    weights = ()
    for chunk in tl.static_range(NUM_CHUNKS):
        i = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
        mask = (o < num_out)[:, None] & (i < num_in)[None, :]
        weights += (tl.load(weight_at + i[None, :], mask=mask, other=0.0),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < num_out, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        i = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
        x = tl.load(x_ptr + i, mask=i < num_in, other=0.0).to(tl.float32)
        acc += weights[chunk].to(tl.float32) * x[None, :]
    result = tl.sum(acc, axis=1)
    if HAS_BIAS:
        result += bias
    result = result.to(out_ptr.dtype.element_ty)
    if GATE is not None:  # rounded before the activation and before the product, as the reference rounds
        gate, up = tl.split(tl.reshape(result, [BLOCK_O // 2, 2]))
        result = activate(gate.to(tl.float32), GATE).to(out_ptr.dtype.element_ty) * up
        o = tl.program_id(0) * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
        num_out = num_out // 2
    tl.store(out_ptr + o, result, mask=o < num_out)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """As ``reference.linear``, which is cuBLAS, for anything but one row of half precision."""
    if x_TI.size(0) != 1 or not _is_row(x_TI, weight_OI):
        return F.linear(x_TI, weight_OI, bias_O)
    return _row_linear(x_TI, weight_OI, bias_O, None)


def gated_linear(x_TI: torch.Tensor, weight_2FI: torch.Tensor, bias_2F: torch.Tensor | None, name: str) -> torch.Tensor:
    """As ``reference.gated_linear``; a row's activation costs no launch of its own."""
    if x_TI.size(0) != 1 or name not in ACTIVATIONS or not _is_row(x_TI, weight_2FI):
        return gated_activation(linear(x_TI, weight_2FI, bias_2F), name)
    return _row_linear(x_TI, weight_2FI, bias_2F, ACTIVATIONS[name])


def _is_row(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether the kernel takes this single row, or picture."""
    return (
        x_TI.dim() == 2
        and x_TI.dtype != torch.float32
        and weight_OI.shape[0] <= _LARGEST_OUTPUT
        and weight_OI.shape[1] % 8 == 0
        and weight_OI.is_contiguous()
        and x_TI.stride(1) == 1
    )


def _row_linear(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, gate: int | None
) -> torch.Tensor:
    num_out, num_in = weight_OI.shape
    out_TO = x_TI.new_empty((1, num_out if gate is None else num_out // 2))
    block_i = min(_CHUNK, triton.next_power_of_2(num_in))
    num_chunks = triton.cdiv(num_in, block_i)
    block_o = 4 if num_chunks == 1 and num_out >= 2048 else 2
    overlaps = can_overlap(x_TI.device)
    _row_kernel[(triton.cdiv(num_out, block_o),)](
        x_TI, weight_OI, out_TO if bias_O is None else bias_O, out_TO, num_in, num_out,
        HAS_BIAS=bias_O is not None, GATE=gate, NUM_CHUNKS=num_chunks, BLOCK_O=block_o, BLOCK_I=block_i,
        PDL=overlaps, launch_pdl=overlaps, num_warps=4 if num_chunks <= _FEW_CHUNKS else 8,
    )  # fmt: skip
    return out_TO
