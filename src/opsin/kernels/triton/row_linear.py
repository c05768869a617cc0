"""Linear layers of a single row: all that counts is how fast the weight is read.

cuBLAS reads the weights of a 1.5B decoder at 0.9 to 2.3 TB/s for one row on an H100. Here a program takes a few output
features and asks for all of their weights before it uses the first, and, where it can (see ``overlap``), before the row
itself is there. What surrounds the product, the norm and the sum ahead of it and the gate behind it, are launches of
two microseconds each otherwise: a program computes the norm of the whole row along with its own few sums, which costs
next to nothing, since it reads that row anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from opsin.kernels import reference
from opsin.kernels.triton.elementwise import ACTIVATIONS, activate, gated_activation, rms_norm
from opsin.kernels.triton.overlap import can_overlap

_LARGEST_OUTPUT = 65536  # cuBLAS reads the weights of language-model heads at full speed
_CHUNK = 2048
_FEW_CHUNKS = 6  # that four warps have registers for


@triton.jit
def _row_kernel(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, num_in, num_out, eps,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, GATE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    if GATE is not None:  # a gate, and beside it what it gates, which is half a weight away
        o = o // 2 + o % 2 * (num_out // 2)
    weight_at = weight_ptr + o.to(tl.int64)[:, None] * num_in
    weights, norms = (), ()
    for chunk in tl.static_range(NUM_CHUNKS):
        i = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
        mask = (o < num_out)[:, None] & (i < num_in)[None, :]
        weights += (tl.load(weight_at + i[None, :], mask=mask, other=0.0),)
        if HAS_NORM:
            norms += (tl.load(norm_ptr + i, mask=i < num_in, other=0.0).to(tl.float32),)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, mask=o < num_out, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    squares = tl.zeros([BLOCK_I], tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        i = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
        x = tl.load(x_ptr + i, mask=i < num_in, other=0.0)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + i, mask=i < num_in, other=0.0)
            tl.store(sum_ptr + i, x, mask=(i < num_in) & (tl.program_id(0) == 0))
        x = x.to(tl.float32)
        if HAS_NORM:  # but for the factor that all values share, which is known when all have been read
            squares += x * x
            x *= norms[chunk]
        acc += weights[chunk].to(tl.float32) * x[None, :]
    result = tl.sum(acc, axis=1)
    if HAS_NORM:
        result *= 1.0 / tl.sqrt(tl.sum(squares) / num_in + eps)
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
    out_TO = x_TI.new_empty((1, weight_OI.shape[0]))
    _launch(x_TI, None, None, 0.0, weight_OI, bias_O, None, x_TI, out_TO)
    return out_TO


_one_by_one = reference.one_by_one(rms_norm, linear, gated_activation)


def normed_linear(
    x_TI: torch.Tensor,
    residual_TI: torch.Tensor | None,
    norm_I: torch.Tensor,
    eps: float,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    gate: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.normed_linear``, in one launch for one row, which is not rounded between norm and product."""
    if x_TI.size(0) != 1 or (gate is not None and gate not in ACTIVATIONS) or not _is_row(x_TI, weight_OI):
        return _one_by_one(x_TI, residual_TI, norm_I, eps, weight_OI, bias_O, gate)
    num_out = weight_OI.shape[0]
    out_TO = x_TI.new_empty((1, num_out if gate is None else num_out // 2))
    sum_TI = x_TI if residual_TI is None else torch.empty_like(x_TI)
    _launch(x_TI, residual_TI, norm_I, eps, weight_OI, bias_O, gate, sum_TI, out_TO)
    return out_TO, sum_TI


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


def _launch(
    x_TI: torch.Tensor,
    residual_TI: torch.Tensor | None,
    norm_I: torch.Tensor | None,
    eps: float,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    gate: str | None,
    sum_TI: torch.Tensor,
    out_TO: torch.Tensor,
) -> None:
    num_out, num_in = weight_OI.shape
    block_i = min(_CHUNK, triton.next_power_of_2(num_in))
    num_chunks = triton.cdiv(num_in, block_i)
    overlaps = can_overlap(x_TI.device)
    block_o, num_warps = program_size(num_out, num_chunks)
    _row_kernel[(triton.cdiv(num_out, block_o),)](
        x_TI, x_TI if residual_TI is None else residual_TI, x_TI if norm_I is None else norm_I,
        weight_OI, x_TI if bias_O is None else bias_O, sum_TI, out_TO, num_in, num_out, eps,
        HAS_NORM=norm_I is not None, HAS_RESIDUAL=residual_TI is not None, HAS_BIAS=bias_O is not None,
        GATE=None if gate is None else ACTIVATIONS[gate], NUM_CHUNKS=num_chunks, BLOCK_O=block_o, BLOCK_I=block_i,
        PDL=overlaps, launch_pdl=overlaps, num_warps=num_warps,
    )  # fmt: skip


def program_size(num_out: int, num_chunks: int) -> tuple[int, int]:
    """Rows of the weight, few, so that all processors have some and registers hold them; and warps."""
    return 4 if num_chunks == 1 and num_out >= 2048 else 2, 4 if num_chunks <= _FEW_CHUNKS else 8
