"""Linear layers in e4m3: rows are quantised in one pass; cuBLAS multiplies many, kernels of our own multiply few.

For few rows all that counts is how fast the weight is read, and there is half as much of it as in half precision. e4m3
widens to float16 without loss, so few rows are multiplied by the tensor cores of any GPU that has e4m3 at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from opsin.kernels.quantized import FP8, FP8_MAX, SMALLEST, QuantizedRows

_FEW_ROWS = 16  # what one step of a tensor core takes; cuBLAS's tiles for more leave processors idle
_CHUNK = 4096  # of one row's weights


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, x_stride, width, MAX: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST) / MAX
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + column, (x / scale).to(out_ptr.dtype.element_ty), mask=inside)


def quantize_rows(x_TI: torch.Tensor) -> QuantizedRows:
    """As ``quantized.quantize_rows``; divisions that are rounded otherwise may move a value to its neighbour."""
    width = x_TI.shape[-1]
    flat_TI = x_TI.reshape(-1, width)
    if flat_TI.stride(1) != 1:
        flat_TI = flat_TI.contiguous()
    num_rows = flat_TI.shape[0]
    values_TI = torch.empty((num_rows, width), dtype=FP8, device=x_TI.device)
    scale_T1 = torch.empty((num_rows, 1), dtype=torch.float32, device=x_TI.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        _quantize_kernel[(num_rows,)](
            flat_TI, values_TI, scale_T1, flat_TI.stride(0), width,
            MAX=FP8_MAX, LEAST=SMALLEST, BLOCK=block, num_warps=min(16, max(4, block // 1024)),
        )  # fmt: skip
    shape = x_TI.shape[:-1]
    return QuantizedRows(values_TI.view(x_TI.shape), scale_T1.view(*shape, 1))


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
