"""Linear layers in e4m3: rows are quantised in one pass, together with the activation ahead (norms do it themselves,
in ``elementwise``); cuBLAS multiplies many, kernels of our own multiply few.

For few rows all that counts is how fast the weight is read, and there is half as much of it as in half precision. e4m3
widens to float16 without loss, so few rows are multiplied by the tensor cores of any GPU that has e4m3 at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from opsin.kernels.quantized import QuantizedRows
from opsin.kernels.triton.elementwise import (
    ACTIVATIONS,
    activate,
    activation,
    empty_rows,
    gated_activation,
    row_scale,
)
from opsin.kernels.triton.overlap import can_overlap, follow

_FEW_ROWS = 16  # what one step of a tensor core takes; cuBLAS's tiles for more leave processors idle
_CHUNK = 4096  # of one row's weights


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, x_stride, width,
    KIND: tl.constexpr, IS_GATED: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    x_at = x_ptr + row * x_stride
    dtype = x_ptr.dtype.element_ty
    chunks = ()  # in the dtype, which is half of what float32 would take of the registers
    largest = tl.zeros([BLOCK], tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_at + column, mask=column < width, other=0.0)
        if KIND is not None:
            x = activate(x.to(tl.float32), KIND).to(dtype)
        if IS_GATED:
            up = tl.load(x_at + width + column, mask=column < width, other=0.0)
            x = (x.to(tl.float32) * up.to(tl.float32)).to(dtype)
        chunks += (x,)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    scale = row_scale(largest)
    tl.store(scale_ptr + row, scale)
    for chunk in tl.static_range(NUM_CHUNKS):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        values = chunks[chunk].to(tl.float32) / scale
        tl.store(out_ptr + row * width + column, values.to(out_ptr.dtype.element_ty), mask=column < width)


def quantize_rows(x_TI: torch.Tensor) -> QuantizedRows:
    """As ``quantized.quantize_rows``; divisions that are rounded otherwise may move a value to its neighbour."""
    return _quantize(x_TI, x_TI.shape[-1], None)


def quantized_activation(x_TF: torch.Tensor, name: str) -> QuantizedRows:
    """As ``quantize_rows`` of ``activation``, which is neither written nor read."""
    if name not in ACTIVATIONS:
        return quantize_rows(activation(x_TF, name))
    return _quantize(x_TF, x_TF.shape[-1], name)


def quantized_gated_activation(gate_up_T2F: torch.Tensor, name: str) -> QuantizedRows:
    """As ``quantize_rows`` of ``gated_activation``, which is neither written nor read."""
    if name not in ACTIVATIONS:
        return quantize_rows(gated_activation(gate_up_T2F, name))
    return _quantize(gate_up_T2F, gate_up_T2F.shape[-1] // 2, name)


def _quantize(x: torch.Tensor, width: int, act: str | None) -> QuantizedRows:
    """Rows of ``width`` values, made of twice as many where these are gates and what they gate."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    rows = empty_rows((*x.shape[:-1], width), x.device)
    if len(flat):
        num_warps = 4 if width <= 8192 else 8 if width <= 16384 else 16
        block = 256 * num_warps  # 16 bytes of half precision for each thread at once
        overlaps = can_overlap(x.device)
        _quantize_kernel[(len(flat),)](
            flat, *rows, flat.stride(0), width,
            KIND=None if act is None else ACTIVATIONS[act], IS_GATED=flat.shape[1] != width,
            NUM_CHUNKS=triton.cdiv(width, block), BLOCK=block, PDL=overlaps, launch_pdl=overlaps, num_warps=num_warps,
        )  # fmt: skip
    return rows


@triton.jit
def _one_row_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_in, num_out,
    HAS_BIAS: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    weight_at = weight_ptr + o.to(tl.int64)[:, None] * num_in
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for chunk in tl.static_range(NUM_CHUNKS):
        i = chunk * BLOCK_I + tl.arange(0, BLOCK_I)
        x = tl.load(x_ptr + i, mask=i < num_in, other=0.0).to(tl.float32)
        weight = tl.load(weight_at + i[None, :], mask=(o < num_out)[:, None] & (i < num_in)[None, :], other=0.0)
        acc += weight.to(tl.float32) * x[None, :]
    result = tl.sum(acc, axis=1) * tl.load(x_scale_ptr) * tl.load(scale_ptr + o, mask=o < num_out, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + o, mask=o < num_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + o, result.to(out_ptr.dtype.element_ty), mask=o < num_out)


@triton.jit(do_not_specialize=["num_rows"])  # it is in masks of rows alone, which are never contiguous
def _few_rows_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, num_in, num_out,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_out = t < num_rows, o < num_out
    x_at = x_ptr + t[:, None] * num_in
    weight_at = weight_ptr + o.to(tl.int64)[:, None] * num_in
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for begin in range(0, num_in, BLOCK_I):
        i = begin + tl.arange(0, BLOCK_I)
        is_in = (i < num_in)[None, :]
        x = tl.load(x_at + i[None, :], mask=is_row[:, None] & is_in, other=0.0)
        weight = tl.load(weight_at + i[None, :], mask=is_out[:, None] & is_in, other=0.0)
        acc = tl.dot(x.to(tl.float16), tl.trans(weight.to(tl.float16)), acc)
    x_scale = tl.load(x_scale_ptr + t, mask=is_row, other=0.0)
    result = acc * x_scale[:, None] * tl.load(scale_ptr + o, mask=is_out, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias_ptr + o, mask=is_out, other=0.0).to(tl.float32)[None, :]
    out_mask = is_row[:, None] & is_out[None, :]
    tl.store(out_ptr + t[:, None] * num_out + o[None, :], result.to(out_ptr.dtype.element_ty), mask=out_mask)


def quantized_linear(
    x: QuantizedRows, weight_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """As ``quantized.quantized_linear``, the sum rounded once more before the bias where that is cuBLAS's way."""
    num_out, num_in = weight_OI.shape
    values_TI, scale_T1 = x.values_TI.view(-1, num_in), x.scale_T1.view(-1, 1)
    if values_TI.shape[0] <= _FEW_ROWS:
        out_TO = _few_rows(values_TI, scale_T1, weight_OI, scale_O, bias_O, dtype)
    else:
        out_TO = _many_rows(values_TI, scale_T1, weight_OI, scale_O, bias_O, dtype)
    return out_TO.view(*x.values_TI.shape[:-1], num_out)


def _many_rows(
    values_TI: torch.Tensor,
    scale_T1: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    # cuBLAS adds biases of the output's dtype, and none to float32. Sums are kept in fewer than 32 bits within a
    # tensor core's step ("fast accumulation"), as every engine has it: full ones cost a third of the speed.
    fused = None if dtype == torch.float32 else bias_O
    num_rows = len(values_TI)
    missing = -num_rows % 16  # cuBLAS has no kernel for 33 rows of 18,944 values
    if missing:
        values_TI = F.pad(values_TI.view(torch.uint8), (0, 0, 0, missing)).view(values_TI.dtype)
        scale_T1 = F.pad(scale_T1, (0, 0, 0, missing))
    out_TO = torch._scaled_mm(
        values_TI,
        weight_OI.t(),
        scale_a=scale_T1,
        scale_b=scale_O.unsqueeze(0),
        bias=fused,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    out_TO = out_TO[:num_rows]
    return out_TO if fused is bias_O else out_TO + bias_O


def _few_rows(
    values_TI: torch.Tensor,
    scale_T1: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_rows, num_in = values_TI.shape
    num_out = weight_OI.shape[0]
    out_TO = torch.empty((num_rows, num_out), dtype=dtype, device=values_TI.device)
    tensors = (values_TI, scale_T1, weight_OI, scale_O, out_TO if bias_O is None else bias_O, out_TO)
    if num_rows == 1:
        block_i = min(_CHUNK, triton.next_power_of_2(num_in))
        num_chunks = triton.cdiv(num_in, block_i)
        block_o = 4 if num_chunks == 1 and num_out >= 2048 else 2
        _one_row_kernel[(triton.cdiv(num_out, block_o),)](
            *tensors, num_in, num_out,
            HAS_BIAS=bias_O is not None, NUM_CHUNKS=num_chunks, BLOCK_O=block_o, BLOCK_I=block_i, num_warps=4,
        )  # fmt: skip
    elif num_rows:
        block_o = 32 if num_out >= 16384 else 16
        _few_rows_kernel[(triton.cdiv(num_out, block_o),)](
            *tensors, num_rows, num_in, num_out,
            HAS_BIAS=bias_O is not None, BLOCK_T=_FEW_ROWS, BLOCK_O=block_o, BLOCK_I=256, num_warps=4, num_stages=4,
        )  # fmt: skip
    return out_TO
