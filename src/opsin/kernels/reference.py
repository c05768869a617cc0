"""Plain torch: the definition of correct, and what any device without kernels of its own runs.

Nothing here waits for the device: sizes come from the host copies in ``AttentionInputs``. Softmax and norms
accumulate in float32 whatever the dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.kernels.ops import GatedActivation, Kernels, Linear, NormedLinear, RmsNorm
from opsin.kernels.quantized import FP8, QuantizedRows, int8_linear, narrowed, quantize_rows, quantized_linear


def pack_linear(weight_OI: torch.Tensor) -> torch.Tensor:
    return weight_OI


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x_TI, weight_OI, bias_O)


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm after an optional residual add, arXiv:1910.07467.

    ``weight_D`` may be float32 beside lower-precision activations (for norms that multiply by 1 + weight).
    """
    if residual_TD is not None:
        x_TD = x_TD + residual_TD
    if weight_D.dtype == x_TD.dtype:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps), x_TD
    return (F.rms_norm(x_TD.float(), weight_D.shape, None, eps) * weight_D).to(x_TD.dtype), x_TD


def layer_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm after an optional residual add, arXiv:1607.06450."""
    if residual_TD is not None:
        x_TD = x_TD + residual_TD
    return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps), x_TD


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
}
"""By the names of transformers' ACT2FN. Three spellings of the tanh approximation differ there in rounding alone."""


def activation(x_TF: torch.Tensor, name: str) -> torch.Tensor:
    return ACTIVATIONS[name](x_TF)


def gated_activation(gate_up_T2F: torch.Tensor, name: str) -> torch.Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return ACTIVATIONS[name](gate_TF).mul_(up_TF)


def quantized_rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, residual_TD: torch.Tensor | None = None
) -> tuple[QuantizedRows, torch.Tensor]:
    normed_TD, sum_TD = rms_norm(x_TD, weight_D, eps, residual_TD)
    return quantize_rows(normed_TD), sum_TD


def quantized_layer_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
) -> tuple[QuantizedRows, torch.Tensor]:
    normed_TD, sum_TD = layer_norm(x_TD, weight_D, bias_D, eps, residual_TD)
    return quantize_rows(normed_TD), sum_TD


def quantized_activation(x_TF: torch.Tensor, name: str) -> QuantizedRows:
    return quantize_rows(activation(x_TF, name))


def quantized_gated_activation(gate_up_T2F: torch.Tensor, name: str) -> QuantizedRows:
    return quantize_rows(gated_activation(gate_up_T2F, name))


def one_by_one(rms_norm: RmsNorm, linear: Linear, gated_activation: GatedActivation) -> NormedLinear:
    """A ``normed_linear`` of these."""

    def normed_linear(
        x_TI: torch.Tensor,
        residual_TI: torch.Tensor | None,
        norm_I: torch.Tensor,
        eps: float,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        gate: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed_TI, sum_TI = rms_norm(x_TI, norm_I, eps, residual_TI)
        y_TO = linear(normed_TI, weight_OI, bias_O)
        return y_TO if gate is None else gated_activation(y_TO, gate), sum_TI

    return normed_linear


def apply_rope(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    return _rotate(q_TNH, cos_T1R, sin_T1R), _rotate(k_TKH, cos_T1R, sin_T1R)


def _rotate(x_TNH: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor:
    size = cos_T1R.shape[-1]
    first, second = x_TNH[..., :size], x_TNH[..., size : 2 * size]
    # cos and sin are float32, so the products are too, and rounding happens once.
    parts = [first * cos_T1R - second * sin_T1R, second * cos_T1R + first * sin_T1R]
    if 2 * size < x_TNH.shape[-1]:
        parts.append(x_TNH[..., 2 * size :].to(parts[0].dtype))
    return torch.cat(parts, dim=-1).to(x_TNH.dtype)


def write_kv(k_TKH: torch.Tensor, v_TKH: torch.Tensor, cache: LayerCache, slot_mapping_T: torch.Tensor) -> None:
    for new_TKH, stored in ((k_TKH, cache.key), (v_TKH, cache.value)):
        flat = _indexable(stored).view(-1, *stored.shape[2:])
        flat.index_copy_(0, slot_mapping_T, _indexable(narrowed(new_TKH, stored.dtype)))


def _indexable(stored: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes, since not every torch and device can index the floats."""
    return stored.view(torch.uint8) if stored.dtype == FP8 else stored


def take(stored: torch.Tensor, index_L: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of some blocks, or slots, of one side of a cache, widened to ``dtype``."""
    taken = _indexable(stored).index_select(0, index_L)
    return taken if stored.dtype == dtype else taken.view(stored.dtype).to(dtype)


def rope_and_write(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    cache: LayerCache,
    slot_mapping_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_TNH, k_TKH = apply_rope(q_TNH, k_TKH, cos_TR, sin_TR)
    write_kv(k_TKH, v_TKH, cache, slot_mapping_T)
    return q_TNH, k_TKH


def paged_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cache: LayerCache,
    inputs: AttentionInputs,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One SDPA call per row.

    On a CPU that beats one padded call for the batch: 9 against 56 ms for 16 rows of 700 tokens and 16 heads of 64,
    equal with 2 key heads, since each row's gathered keys stay in the processor's cache.
    """
    out_TNH = torch.empty_like(q_TNH)
    begin = 0
    for b, (query_len, context_len) in enumerate(zip(inputs.query_lens, inputs.context_lens, strict=True)):
        end = begin + query_len
        if query_len == context_len and k_TKH.dtype == cache.key.dtype:
            first, k_CKH, v_CKH = 0, k_TKH[begin:end], v_TKH[begin:end]
        else:
            first = first_seen(query_len, context_len, window, inputs)
            k_CKH, v_CKH = _gather(cache, inputs.block_tables_BL[b], first, context_len, q_TNH.dtype)
        mask_TC = seen_mask(query_len, context_len, first, window, inputs, begin, q_TNH.device)
        out_TNH[begin:end] = _row_attention(q_TNH[begin:end], k_CKH, v_CKH, mask_TC, scale, softcap)
        begin = end
    return out_TNH


def _gather(
    cache: LayerCache, blocks_L: torch.Tensor, first: int, end: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions [first, end) of one row, each (C, K, H)."""
    block_size = cache.key.shape[1]
    low = first // block_size
    blocks = blocks_L[low : -(-end // block_size)]
    offset = low * block_size
    key, value = (
        take(stored, blocks, dtype).flatten(0, 1)[first - offset : end - offset] for stored in (cache.key, cache.value)
    )
    return key, value


def first_seen(query_len: int, context_len: int, window: int | None, inputs: AttentionInputs) -> int:
    """The first position that any token of a row sees."""
    if window is None or inputs.visible_begin_T is not None:
        return 0
    return max(0, context_len - query_len + 1 - window)


def seen_mask(
    query_len: int,
    context_len: int,
    first: int,
    window: int | None,
    inputs: AttentionInputs,
    begin: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Boolean (T, C) over a row's keys [first, context_len); None where SDPA's own causal rule, or no mask, says the
    same.

    Args:
        begin: the row's first token.
    """
    if query_len == 1 and inputs.is_causal:
        return None  # the last position sees all that was gathered; the window has cut the rest away
    if query_len == context_len and inputs.is_causal and (window is None or window >= context_len):
        return None
    begin_T1, end_T1 = (
        None if view_T is None else view_T[begin : begin + query_len].unsqueeze(1)
        for view_T in (inputs.visible_begin_T, inputs.visible_end_T)
    )
    key_C = torch.arange(first, context_len, device=device)
    query_T1 = torch.arange(context_len - query_len, context_len, device=device).unsqueeze(1)
    mask_TC = key_C <= query_T1 if end_T1 is None else key_C < end_T1
    if window is not None:
        recent_TC = key_C > query_T1 - window
        mask_TC &= recent_TC if begin_T1 is None else recent_TC | (key_C >= begin_T1)
    return mask_TC


def _row_attention(
    q_TNH: torch.Tensor,
    k_CKH: torch.Tensor,
    v_CKH: torch.Tensor,
    mask_TC: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Grouped-query attention of one row: (T, N, H).

    A single token's query heads become the rows of one small matrix per key head; several tokens' key heads are
    repeated by a stride of 0. Neither copies keys.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    num_kv_heads = k_CKH.shape[1]
    group = num_heads // num_kv_heads
    k_KCH, v_KCH = k_CKH.transpose(0, 1), v_CKH.transpose(0, 1)
    if softcap is not None:
        return _capped_attention(q_TNH, k_KCH, v_KCH, mask_TC, scale, softcap)
    if num_tokens == 1:
        q_1KGH = q_TNH.reshape(1, num_kv_heads, group, head_dim)
        mask = None if mask_TC is None else mask_TC.expand(group, -1)
        out = F.scaled_dot_product_attention(q_1KGH, k_KCH[None], v_KCH[None], attn_mask=mask, scale=scale)
        return out.reshape(1, num_heads, head_dim)
    q_KGTH = q_TNH.transpose(0, 1).unflatten(0, (num_kv_heads, group))
    k_KGCH, v_KGCH = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k_KCH, v_KCH))
    out_KGTH = F.scaled_dot_product_attention(
        q_KGTH, k_KGCH, v_KGCH, attn_mask=mask_TC, is_causal=mask_TC is None, scale=scale
    )
    return out_KGTH.flatten(0, 1).transpose(0, 1)


def _capped_attention(
    q_TNH: torch.Tensor,
    k_KCH: torch.Tensor,
    v_KCH: torch.Tensor,
    mask_TC: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """``_row_attention`` written out in float32, since SDPA cannot bend scores."""
    num_tokens, num_keys = len(q_TNH), k_KCH.shape[1]
    q_KGTH = q_TNH.transpose(0, 1).unflatten(0, (len(k_KCH), -1)).float()
    scores_KGTC = q_KGTH @ k_KCH.float().transpose(-1, -2).unsqueeze(1) * scale
    scores_KGTC = torch.tanh(scores_KGTC / softcap) * softcap
    if mask_TC is None and num_tokens > 1:
        mask_TC = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=q_TNH.device).tril()
    if mask_TC is not None:
        scores_KGTC = scores_KGTC.masked_fill(~mask_TC, -torch.inf)
    out_KGTH = scores_KGTC.softmax(-1) @ v_KCH.float().unsqueeze(1)
    return out_KGTH.flatten(0, 1).transpose(0, 1).to(q_TNH.dtype)


def varlen_attention(
    q_PNH: torch.Tensor,
    k_PNH: torch.Tensor,
    v_PNH: torch.Tensor,
    cu_seqlens_B1: torch.Tensor,
    seq_lens: tuple[int, ...] | None,
    scale: float,
) -> torch.Tensor:
    """Neighbours of equal length run as one dense batch. Lengths that the device alone knows cost a mask of pairs."""
    if seq_lens is None:
        at_P = torch.arange(len(q_PNH), dtype=torch.int32, device=q_PNH.device)
        sequence_P = torch.bucketize(at_P, cu_seqlens_B1, right=True)
        return _row_attention(q_PNH, k_PNH, v_PNH, sequence_P.unsqueeze(1) == sequence_P, scale, None)
    parts: list[torch.Tensor] = []
    begin = 0
    for length, run in itertools.groupby(seq_lens):
        count = len(list(run))
        end = begin + count * length
        q, k, v = (x[begin:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q_PNH, k_PNH, v_PNH))
        parts.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
        begin = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def patchify(tiles_BYX3: torch.Tensor, patch_size: int, table_3: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows and columns that fill no patch are cut off, as a strided convolution does."""
    rows, cols = tiles_BYX3.shape[1] // patch_size, tiles_BYX3.shape[2] // patch_size
    whole = tiles_BYX3[:, : rows * patch_size, : cols * patch_size]
    grid = whole.unflatten(2, (cols, patch_size)).unflatten(1, (rows, patch_size))  # B, rows, y, cols, x, 3
    bytes_PC = grid.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, patch_size * patch_size)
    table = table_3.to(dtype)
    channels = [table[:, c].take(bytes_PC[:, c].long()) for c in range(3)]
    return torch.cat(channels, dim=1)


def resample(picture_YX3: torch.Tensor, taps: torch.Tensor, axis: int, out_YX3: torch.Tensor) -> None:
    """The sum is kept in 32 bits, as Pillow's: of 255 and weights of 22 fractional bits."""
    first, weights = taps[0], taps[1:].unsqueeze(-1)
    if axis == 0:
        weights = weights.unsqueeze(-1)
    total = torch.full(out_YX3.shape, 1 << 21, dtype=torch.int32, device=out_YX3.device)
    for tap, weight in enumerate(weights):
        total += picture_YX3.index_select(axis, first + tap) * weight
    out_YX3.copy_((total >> 22).clamp_(0, 255))


def greedy(logits_BV: torch.Tensor) -> torch.Tensor:
    logits_BV = logits_BV.float()  # a CPU takes ten times as long over half precision
    return torch.stack((logits_BV.argmax(dim=-1), logits_BV.amax(dim=-1).isfinite()))


def compile_ahead(*works: Callable[[], None]) -> None:
    """There is nothing to compile."""


KERNELS = Kernels(
    pack_linear=pack_linear,
    linear=linear,
    quantize_rows=quantize_rows,
    quantized_linear=quantized_linear,
    int8_linear=int8_linear,
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    activation=activation,
    gated_activation=gated_activation,
    quantized_rms_norm=quantized_rms_norm,
    quantized_layer_norm=quantized_layer_norm,
    quantized_activation=quantized_activation,
    quantized_gated_activation=quantized_gated_activation,
    normed_linear=one_by_one(rms_norm, linear, gated_activation),
    apply_rope=apply_rope,
    write_kv=write_kv,
    rope_and_write=rope_and_write,
    paged_attention=paged_attention,
    varlen_attention=varlen_attention,
    patchify=patchify,
    resample=resample,
    greedy=greedy,
    compile_ahead=compile_ahead,
)
