"""Norms, activations, rotation and cache write: memory-bound, so each reads its input once and writes its output
once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from opsin.kernels import reference
from opsin.kernels.inputs import LayerCache
from opsin.kernels.quantized import FP8, FP8_MAX, SMALLEST, QuantizedRows
from opsin.kernels.triton.overlap import can_overlap, follow

ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu_fast": 1,
    "quick_gelu": 2,
    "gelu": 3,
}

_FP8_MAX, _SMALLEST = tl.constexpr(FP8_MAX), tl.constexpr(SMALLEST)


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == 0:
        return x * tl.sigmoid(x)
    elif KIND == 1:  # 0.5 * (1 + tanh(u)) is sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == 2:
        return x * tl.sigmoid(1.702 * x)
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def row_scale(magnitudes):
    """As in ``quantized.quantize_rows``, of the magnitudes of one row, or of the largest of several parts of it."""
    return tl.maximum(tl.max(magnitudes, axis=0), _SMALLEST) / _FP8_MAX


def empty_rows(shape: tuple[int, ...], device: torch.device) -> QuantizedRows:
    """What a kernel writes quantised rows to."""
    values = torch.empty(shape, dtype=FP8, device=device)
    return QuantizedRows(values, torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device))


@triton.jit
def _store_row(x, out_ptr, scale_ptr, row, width, column):
    """As it is; or, where there is a pointer for its scale, quantised."""
    values = x
    if scale_ptr is not None:
        values = x.to(tl.float32)
        scale = row_scale(tl.abs(values))
        tl.store(scale_ptr + row, scale)
        values = (values / scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, values, mask=column < width)


def _is_row_by_row(residual_TD: torch.Tensor | None) -> bool:
    return residual_TD is None or residual_TD.is_contiguous()


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, scale_ptr, sum_ptr, x_stride, num_columns, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * num_columns + column, mask=inside, other=0.0)
        tl.store(sum_ptr + row * num_columns + column, x, mask=inside)
    x32 = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x32 * x32) / num_columns + eps)
    _store_row((x32 * inverse * weight).to(x.dtype), out_ptr, scale_ptr, row, num_columns, column)


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.rms_norm``: the sum is rounded to the dtype before it is normalised, as there."""
    if x_TD.stride(1) != 1 or not _is_row_by_row(residual_TD):
        return reference.rms_norm(x_TD, weight_D, eps, residual_TD)
    out_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    return out_TD, _rms_norm(x_TD, weight_D, eps, residual_TD, out_TD, None)


def quantized_rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> tuple[QuantizedRows, torch.Tensor]:
    """As ``quantize_rows`` of ``rms_norm``, which is neither written nor read."""
    if x_TD.stride(1) != 1 or not _is_row_by_row(residual_TD):
        return reference.quantized_rms_norm(x_TD, weight_D, eps, residual_TD)
    rows = empty_rows(x_TD.shape, x_TD.device)
    return rows, _rms_norm(x_TD, weight_D, eps, residual_TD, *rows)


def _rms_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None,
    out_TD: torch.Tensor,
    scale_T1: torch.Tensor | None,
) -> torch.Tensor:
    """Fills ``out_TD``, and ``scale_T1`` where it is to be quantised; returns the sum."""
    num_rows, width = x_TD.shape
    sum_TD = x_TD if residual_TD is None else residual_TD.new_empty((num_rows, width))
    if num_rows:
        block = triton.next_power_of_2(width)
        added = x_TD if residual_TD is None else residual_TD
        overlaps = can_overlap(x_TD.device)
        _rms_norm_kernel[(num_rows,)](
            x_TD, weight_D, added, out_TD, scale_T1, sum_TD, x_TD.stride(0), width, eps,
            HAS_RESIDUAL=residual_TD is not None, BLOCK=block, PDL=overlaps, launch_pdl=overlaps,
            num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return sum_TD


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, scale_ptr, sum_ptr, num_columns, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = number * num_columns
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row + column, mask=inside, other=0.0)
        tl.store(sum_ptr + row + column, x, mask=inside)
    x32 = x.to(tl.float32)
    mean = tl.sum(x32) / num_columns
    centred = tl.where(inside, x32 - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / num_columns + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    _store_row((centred * inverse * weight + bias).to(x.dtype), out_ptr, scale_ptr, number, num_columns, column)


def layer_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.layer_norm``, which also takes what is not laid out row by row."""
    if not x_TD.is_contiguous() or not _is_row_by_row(residual_TD):
        return reference.layer_norm(x_TD, weight_D, bias_D, eps, residual_TD)
    out_TD = torch.empty_like(x_TD)
    return out_TD, _layer_norm(x_TD, weight_D, bias_D, eps, residual_TD, out_TD, None)


def quantized_layer_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
) -> tuple[QuantizedRows, torch.Tensor]:
    """As ``quantize_rows`` of ``layer_norm``, which is neither written nor read."""
    if not x_TD.is_contiguous() or not _is_row_by_row(residual_TD):
        return reference.quantized_layer_norm(x_TD, weight_D, bias_D, eps, residual_TD)
    rows = empty_rows(x_TD.shape, x_TD.device)
    return rows, _layer_norm(x_TD, weight_D, bias_D, eps, residual_TD, *rows)


def _layer_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None,
    out_TD: torch.Tensor,
    scale_T1: torch.Tensor | None,
) -> torch.Tensor:
    """As ``_rms_norm``."""
    width = x_TD.shape[-1]
    sum_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    if x_TD.numel():
        block = triton.next_power_of_2(width)
        _layer_norm_kernel[(x_TD.numel() // width,)](
            x_TD, weight_D, bias_D, x_TD if residual_TD is None else residual_TD, out_TD, scale_T1, sum_TD, width, eps,
            HAS_RESIDUAL=residual_TD is not None, BLOCK=block, num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return sum_TD


@triton.jit
def _activation_kernel(x_ptr, out_ptr, num_values, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, activate(x, KIND).to(out_ptr.dtype.element_ty), mask=inside)


def activation(x_TF: torch.Tensor, name: str) -> torch.Tensor:
    """As ``reference.activation``, which also takes the names that have no kernel here."""
    if name not in ACTIVATIONS or not x_TF.is_contiguous() or not x_TF.numel():
        return reference.activation(x_TF, name)
    out_TF = torch.empty_like(x_TF)
    block = 4096
    _activation_kernel[(triton.cdiv(x_TF.numel(), block),)](
        x_TF, out_TF, x_TF.numel(), KIND=ACTIVATIONS[name], BLOCK=block, num_warps=8
    )
    return out_TF


@triton.jit
def _gate_kernel(x_ptr, out_ptr, width, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0)
    # Rounded before the product, as the reference rounds.
    gate = activate(gate, KIND).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, gate * up, mask=inside)


def gated_activation(gate_up_T2F: torch.Tensor, name: str) -> torch.Tensor:
    """As ``reference.gated_activation``, which also takes the names that have no kernel here."""
    if name not in ACTIVATIONS or not gate_up_T2F.is_contiguous():
        return reference.gated_activation(gate_up_T2F, name)
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = torch.empty((num_rows, width), dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    if num_rows:
        block = min(1024, triton.next_power_of_2(width))
        overlaps = can_overlap(gate_up_T2F.device)
        _gate_kernel[(num_rows, triton.cdiv(width, block))](
            gate_up_T2F, out_TF, width,
            KIND=ACTIVATIONS[name], BLOCK=block, PDL=overlaps, launch_pdl=overlaps, num_warps=4,
        )  # fmt: skip
    return out_TF


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    NUM_Q: tl.constexpr, NUM_K: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    in_pairs = pair < PAIRS
    cos = tl.load(cos_ptr + token * PAIRS + pair, mask=in_pairs, other=0.0)
    sin = tl.load(sin_ptr + token * PAIRS + pair, mask=in_pairs, other=0.0)
    if tl.program_id(1) == 0:
        num_heads = NUM_Q
        source = q_ptr + token * q_stride_t + head * q_stride_h
        target = q_out_ptr + (token * NUM_Q + head) * SIZE
    else:
        num_heads = NUM_K
        source = k_ptr + token * k_stride_t + head * k_stride_h
        target = k_out_ptr + (token * NUM_K + head) * SIZE
    mask = (head < num_heads) & in_pairs
    first = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + pair + PAIRS, mask=mask, other=0.0).to(tl.float32)
    dtype = q_out_ptr.dtype.element_ty
    tl.store(target + pair, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + pair + PAIRS, (second * cos + first * sin).to(dtype), mask=mask)
    if 2 * PAIRS < SIZE:
        rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        mask = (head < num_heads) & (rest < SIZE)
        tl.store(target + rest, tl.load(source + rest, mask=mask), mask=mask)


def apply_rope(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.apply_rope``; queries and keys in one launch, read in place from the fused projection."""
    num_tokens, num_q, size = q_TNH.shape
    num_k, pairs = k_TKH.shape[1], cos_TR.shape[-1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TNH, k_TKH))
    if num_tokens:
        assert q_TNH.stride(2) == k_TKH.stride(2) == 1
        _rope_kernel[(num_tokens, 2)](
            q_TNH, k_TKH, q_out, k_out, cos_TR.contiguous(), sin_TR.contiguous(),
            q_TNH.stride(0), q_TNH.stride(1), k_TKH.stride(0), k_TKH.stride(1),
            NUM_Q=num_q, NUM_K=num_k, SIZE=size, PAIRS=pairs,
            BLOCK_HEADS=triton.next_power_of_2(max(num_q, num_k)), BLOCK_PAIRS=triton.next_power_of_2(pairs),
            BLOCK_REST=triton.next_power_of_2(max(1, size - 2 * pairs)), num_warps=2,
        )  # fmt: skip
    return q_out, k_out


@triton.jit
def _narrowed(x, dtype: tl.constexpr):
    """As ``quantized.narrowed``."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def _rope_and_write_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, key_cache_ptr, value_cache_ptr, cos_ptr, sin_ptr, slot_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    NUM_Q: tl.constexpr, NUM_K: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    cos = tl.load(cos_ptr + token * PAIRS + pair, mask=pair < PAIRS, other=0.0)
    sin = tl.load(sin_ptr + token * PAIRS + pair, mask=pair < PAIRS, other=0.0)
    rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
    dtype = q_out_ptr.dtype.element_ty

    head = tl.arange(0, BLOCK_Q)[:, None]
    source = q_ptr + token * q_stride_t + head * q_stride_h
    target = q_out_ptr + (token * NUM_Q + head) * SIZE
    mask = (head < NUM_Q) & (pair < PAIRS)
    first = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + pair + PAIRS, mask=mask, other=0.0).to(tl.float32)
    tl.store(target + pair, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target + pair + PAIRS, (second * cos + first * sin).to(dtype), mask=mask)
    if 2 * PAIRS < SIZE:
        mask = (head < NUM_Q) & (rest < SIZE)
        tl.store(target + rest, tl.load(source + rest, mask=mask), mask=mask)

    head = tl.arange(0, BLOCK_K)[:, None]
    source = k_ptr + token * k_stride_t + head * k_stride_h
    target = k_out_ptr + (token * NUM_K + head) * SIZE
    stored = key_cache_ptr + (slot * NUM_K + head) * SIZE
    mask = (head < NUM_K) & (pair < PAIRS)
    first = tl.load(source + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + pair + PAIRS, mask=mask, other=0.0).to(tl.float32)
    low = (first * cos - second * sin).to(dtype)
    high = (second * cos + first * sin).to(dtype)
    tl.store(target + pair, low, mask=mask)
    tl.store(target + pair + PAIRS, high, mask=mask)
    tl.store(stored + pair, _narrowed(low, key_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(stored + pair + PAIRS, _narrowed(high, key_cache_ptr.dtype.element_ty), mask=mask)
    if 2 * PAIRS < SIZE:
        mask = (head < NUM_K) & (rest < SIZE)
        same = tl.load(source + rest, mask=mask)
        tl.store(target + rest, same, mask=mask)
        tl.store(stored + rest, _narrowed(same, key_cache_ptr.dtype.element_ty), mask=mask)

    within = tl.arange(0, BLOCK_SIZE)[None, :]
    mask = (head < NUM_K) & (within < SIZE)
    value = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + within, mask=mask)
    value = _narrowed(value, value_cache_ptr.dtype.element_ty)
    tl.store(value_cache_ptr + (slot * NUM_K + head) * SIZE + within, value, mask=mask)


def rope_and_write(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    cache: LayerCache,
    slot_mapping_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.rope_and_write``, in one launch."""
    num_tokens, num_q, size = q_TNH.shape
    num_k, pairs = k_TKH.shape[1], cos_TR.shape[-1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TNH, k_TKH))
    if num_tokens:
        assert q_TNH.stride(2) == k_TKH.stride(2) == v_TKH.stride(2) == 1
        overlaps = can_overlap(q_TNH.device)
        _rope_and_write_kernel[(num_tokens,)](
            q_TNH, k_TKH, v_TKH, q_out, k_out, cache.key, cache.value,
            cos_TR.contiguous(), sin_TR.contiguous(), slot_mapping_T,
            q_TNH.stride(0), q_TNH.stride(1), k_TKH.stride(0), k_TKH.stride(1), v_TKH.stride(0), v_TKH.stride(1),
            NUM_Q=num_q, NUM_K=num_k, SIZE=size, PAIRS=pairs, BLOCK_Q=triton.next_power_of_2(num_q),
            BLOCK_K=triton.next_power_of_2(num_k), BLOCK_PAIRS=triton.next_power_of_2(pairs),
            BLOCK_REST=triton.next_power_of_2(max(1, size - 2 * pairs)), BLOCK_SIZE=triton.next_power_of_2(size),
            PDL=overlaps, launch_pdl=overlaps, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


@triton.jit
def _write_kv_kernel(
    k_ptr, v_ptr, key_cache_ptr, value_cache_ptr, slot_ptr, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    NUM_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    at = tl.arange(0, BLOCK)
    inside = at < NUM_HEADS * SIZE
    head, within = at // SIZE, at % SIZE
    target = slot * NUM_HEADS * SIZE + at
    key = tl.load(k_ptr + token * k_stride_t + head * k_stride_h + within, mask=inside)
    value = tl.load(v_ptr + token * v_stride_t + head * v_stride_h + within, mask=inside)
    tl.store(key_cache_ptr + target, _narrowed(key, key_cache_ptr.dtype.element_ty), mask=inside)
    tl.store(value_cache_ptr + target, _narrowed(value, value_cache_ptr.dtype.element_ty), mask=inside)


def write_kv(k_TKH: torch.Tensor, v_TKH: torch.Tensor, cache: LayerCache, slot_mapping_T: torch.Tensor) -> None:
    """As ``reference.write_kv``."""
    num_tokens, num_heads, size = k_TKH.shape
    if num_tokens:
        assert k_TKH.stride(2) == v_TKH.stride(2) == 1
        _write_kv_kernel[(num_tokens,)](
            k_TKH, v_TKH, cache.key, cache.value, slot_mapping_T,
            k_TKH.stride(0), k_TKH.stride(1), v_TKH.stride(0), v_TKH.stride(1),
            NUM_HEADS=num_heads, SIZE=size, BLOCK=triton.next_power_of_2(num_heads * size), num_warps=4,
        )  # fmt: skip
