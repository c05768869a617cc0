"""From logits to tokens, for a whole batch in one pass on the device.

Each row's randomness is a pure function of its request's seed, of how many tokens it has generated, and of the
vocabulary index, so an answer depends neither on the rest of the batch nor on preemption. The order of the steps is
vLLM's: allowed ids, bad words, bias and minimum length, penalties, temperature, min-p, top-k, top-p, draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opsin.layers.staging import upload
from opsin.params import PoolingParams, SamplingParams
from opsin.types import PositionLogprobs, TokenLogprob

_NEG_INF = float("-inf")
_PROMPT_LOGPROBS_ROWS = 256  # positions whose (rows, V) logits are in memory at once


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the sampler must know of one row.

    Attributes:
        slot: row of the token table that holds prompt and answer so far.
        num_tokens: how many ids of that row are known before this draw.
        num_prompt_tokens: how many of those are the prompt.
        stop_token_ids: masked until ``params.min_tokens`` are generated.
        mask: as ``RowPlan.mask``.
    """

    slot: int
    num_tokens: int
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    mask: bytes | None = None

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Device tensors of one step's draw; nothing has waited for them.

    Attributes:
        ids_B: int64 tokens.
        finite_B: whether the row's logits were usable.
        top: (ids_BK, logprobs_BK, chosen_B, rank_B) where any row wants log-probabilities.
    """

    ids_B: torch.Tensor
    finite_B: torch.Tensor
    top: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None


def is_plain(params: SamplingParams | PoolingParams, stop_token_ids: frozenset[int]) -> bool:
    """The likeliest token is wanted and nothing else, so that rows need not be looked at one by one."""
    return (
        isinstance(params, SamplingParams)
        and params.greedy
        and params.logprobs is None
        and params.prompt_logprobs is None
        and params.structured_outputs is None
        and params.allowed_token_ids is None
        and not params.bad_words_token_ids
        and not params.logit_bias
        and not (params.min_tokens and stop_token_ids)
        and params.repetition_penalty == 1.0
        and not params.frequency_penalty
        and not params.presence_penalty
    )


def sample(logits_BV: torch.Tensor, rows: Sequence[SampleRow], tokens_SL: torch.Tensor) -> SampledTokens:
    """Draw one token per row.

    Args:
        logits_BV: float32; modified in place.
        rows: one per logits row.
        tokens_SL: the token table on the same device, int64.
    """
    top = None
    max_logprobs = max((r.params.logprobs for r in rows if r.params.logprobs is not None), default=None)
    raw_BV = logits_BV.log_softmax(dim=-1) if max_logprobs is not None else None
    finite_B = logits_BV.amax(dim=-1).isfinite()

    _keep_allowed(logits_BV, rows)
    _mask_and_bias(logits_BV, rows, tokens_SL)
    _penalise(logits_BV, rows, tokens_SL)
    ids_B = logits_BV.argmax(dim=-1)
    random = [i for i, row in enumerate(rows) if not row.params.greedy]
    if random:
        index = None if len(random) == len(rows) else _device_ints(random, logits_BV.device)
        drawn = _draw(logits_BV if index is None else logits_BV[index], [rows[i] for i in random])
        ids_B = drawn if index is None else ids_B.index_copy(0, index, drawn)

    if raw_BV is not None:
        assert max_logprobs is not None
        top = top_logprobs(raw_BV, ids_B, max_logprobs)
    return SampledTokens(ids_B, finite_B, top)


def top_logprobs(
    logprobs_BV: torch.Tensor, chosen_B: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids_BK, logprobs_BK) of the ``count`` most likely tokens, and the chosen one's log-probability and rank."""
    values_BK, ids_BK = logprobs_BV.topk(count, dim=-1) if count else (logprobs_BV[:, :0], chosen_B[:, None][:, :0])
    chosen = logprobs_BV.gather(1, chosen_B[:, None])
    rank_B = (logprobs_BV > chosen).sum(dim=-1) + 1
    return ids_BK, values_BK, chosen[:, 0], rank_B


def logprob_lists(
    top: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    chosen_ids: Sequence[int],
    counts: Sequence[int | None],
) -> list[PositionLogprobs | None]:
    """Host lists in the form of ``RowResult.logprobs``; None where a row asked for none."""
    ids, values, chosen, rank = (t.tolist() for t in top)
    lists: list[PositionLogprobs | None] = []
    for i, count in enumerate(counts):
        if count is None:
            lists.append(None)
            continue
        entries = [TokenLogprob(chosen_ids[i], chosen[i], rank[i])]
        entries += [TokenLogprob(ids[i][k], values[i][k], k + 1) for k in range(count)]
        lists.append(entries)
    return lists


def prompt_logprobs(
    hidden_TD: torch.Tensor, targets: Sequence[int], count: int, logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> list[PositionLogprobs]:
    """Log-probabilities of ``targets[i]`` after position i; a few positions' logits at a time.

    Args:
        logits_of: maps (B, D) to (B, V).
    """
    result: list[PositionLogprobs] = []
    for begin in range(0, len(targets), _PROMPT_LOGPROBS_ROWS):
        chunk = list(targets[begin : begin + _PROMPT_LOGPROBS_ROWS])
        logits = logits_of(hidden_TD[begin : begin + len(chunk)])
        chosen = _device_ints(chunk, logits.device)
        top = top_logprobs(logits.log_softmax(dim=-1), chosen, count)
        result += [entry for entry in logprob_lists(top, chunk, [count] * len(chunk)) if entry is not None]
    return result


def _keep_allowed(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Leave the tokens that a grammar allows, for the rows that have one."""
    masked = [b for b, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return
    device = logits_BV.device
    packed = np.stack([np.frombuffer(row.mask, np.uint8) for row in rows if row.mask is not None])
    bytes_MW, index = upload([packed, np.array(masked)], device)
    bits_MV = bytes_MW[:, :, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=device)) & 1
    banned_MV = bits_MV.flatten(1)[:, : logits_BV.shape[1]] == 0
    logits_BV[index] = logits_BV[index].masked_fill(banned_MV, _NEG_INF)


def _mask_and_bias(logits_BV: torch.Tensor, rows: Sequence[SampleRow], tokens_SL: torch.Tensor) -> None:
    """Allowed ids, bad words, logit bias and the minimum length, for the rows that ask for them."""
    device = logits_BV.device
    at_row: list[int] = []
    at_token: list[int] = []
    amount: list[float] = []
    for b, row in enumerate(rows):
        params = row.params
        if params.allowed_token_ids is not None:
            allowed = _device_ints(params.allowed_token_ids, device)
            kept = logits_BV[b, allowed]
            logits_BV[b] = _NEG_INF
            logits_BV[b, allowed] = kept
        for word in params.bad_words_token_ids or ():
            # The last tokens may exist only on the device (two steps in flight), so compare there.
            prefix, last = word[:-1], word[-1]
            if len(prefix) > row.num_tokens:
                continue
            penalty: torch.Tensor | float = _NEG_INF
            if prefix:
                recent = tokens_SL[row.slot, row.num_tokens - len(prefix) : row.num_tokens]
                same = (recent == _device_ints(prefix, device)).all()
                penalty = torch.where(same, _NEG_INF, 0.0)
            logits_BV[b, last] += penalty
        if params.logit_bias:
            at_row += [b] * len(params.logit_bias)
            at_token += params.logit_bias.keys()
            amount += params.logit_bias.values()
        if row.num_generated < params.min_tokens and row.stop_token_ids:
            at_row += [b] * len(row.stop_token_ids)
            at_token += row.stop_token_ids
            amount += [_NEG_INF] * len(row.stop_token_ids)
    if at_row:
        row_I, token_I, amount_I = upload([np.array(at_row), np.array(at_token), np.array(amount, np.float32)], device)
        logits_BV.index_put_((row_I, token_I), amount_I, accumulate=True)


def _penalise(logits_BV: torch.Tensor, rows: Sequence[SampleRow], tokens_SL: torch.Tensor) -> None:
    """Repetition (prompt and answer), frequency and presence (answer alone) penalties."""
    wanted = [
        b
        for b, row in enumerate(rows)
        if row.params.repetition_penalty != 1.0 or row.params.frequency_penalty or row.params.presence_penalty
    ]
    if not wanted:
        return
    device, vocab_size = logits_BV.device, logits_BV.shape[1]
    chosen = [rows[b] for b in wanted]
    longest = max(row.num_tokens for row in chosen)
    ids_BL = tokens_SL[_device_ints([row.slot for row in chosen], device), :longest]
    at_L = torch.arange(longest, device=device)
    known_BL = at_L < _device_ints([row.num_tokens for row in chosen], device)[:, None]
    answer_BL = known_BL & (at_L >= _device_ints([row.num_prompt_tokens for row in chosen], device)[:, None])
    zeros_BV = torch.zeros(len(chosen), vocab_size, device=device)
    seen_BV = zeros_BV.scatter_add(1, ids_BL, known_BL.float()) > 0
    count_BV = zeros_BV.scatter_add(1, ids_BL, answer_BL.float())

    index = _device_ints(wanted, device)
    x_BV = logits_BV[index]
    repetition = _column(device, [row.params.repetition_penalty for row in chosen])
    x_BV = torch.where(seen_BV, torch.where(x_BV > 0, x_BV / repetition, x_BV * repetition), x_BV)
    x_BV -= _column(device, [row.params.frequency_penalty for row in chosen]) * count_BV
    x_BV -= _column(device, [row.params.presence_penalty for row in chosen]) * (count_BV > 0)
    logits_BV[index] = x_BV


def _draw(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Temperature, min-p, top-k and top-p, then one draw per row by the Gumbel-max trick."""
    device, vocab_size = logits_BV.device, logits_BV.shape[1]

    x_BV = logits_BV / _column(device, [max(row.params.temperature, 1e-5) for row in rows])
    if any(row.params.min_p > 0 for row in rows):
        # p >= min_p * p_max, in logits: x >= x_max + log(min_p)
        floor = x_BV.amax(dim=-1, keepdim=True) + _column(device, [row.params.min_p for row in rows]).log()
        x_BV = x_BV.masked_fill(x_BV < floor, _NEG_INF)
    top_k = [row.params.top_k if 0 < row.params.top_k < vocab_size else vocab_size for row in rows]
    if any(k < vocab_size for k in top_k) or any(row.params.top_p < 1.0 for row in rows):
        sorted_BV, order_BV = x_BV.sort(dim=-1, descending=True)
        drop_BV = torch.arange(vocab_size, device=device) >= _device_ints(top_k, device)[:, None]
        sorted_BV = sorted_BV.masked_fill(drop_BV, _NEG_INF)
        p_BV = sorted_BV.softmax(dim=-1)
        # Keep the smallest set whose mass reaches top_p: drop what comes after the mass was reached.
        drop_BV |= (p_BV.cumsum(dim=-1) - p_BV) >= _column(device, [row.params.top_p for row in rows])
        drop_BV[:, 0] = False
        x_BV = x_BV.masked_fill(torch.zeros_like(drop_BV).scatter(1, order_BV, drop_BV), _NEG_INF)
    keys = [_row_key(row.seed, row.num_generated) for row in rows]
    return (x_BV + _gumbel(_device_ints(keys, device), vocab_size)).argmax(dim=-1)


# SplitMix64 (Steele, Lea, Flood 2014), with constants as signed 64-bit integers because torch has no unsigned ones.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def _row_key(seed: int, draw: int) -> int:
    """A signed 64-bit key for one row's ``draw``-th token."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed & (2**64 - 1)) + np.uint64(draw + 1) * np.uint64(_GOLDEN + 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1 + 2**64)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2 + 2**64)
        return int((z ^ (z >> np.uint64(31))).view(np.int64))


def _gumbel(key_B: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise (B, V): element v of a row depends on its key and on v alone."""
    z = key_B[:, None] + torch.arange(1, vocab_size + 1, device=key_B.device) * _GOLDEN
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX1  # masks turn the arithmetic shifts into logical ones
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX2
    z = z ^ ((z >> 31) & (2**33 - 1))
    uniform = (((z >> 40) & (2**24 - 1)).float() + 0.5) * 2.0**-24
    return -(-uniform.log()).log()


def _device_ints(values: Sequence[int], device: torch.device) -> torch.Tensor:
    (ints,) = upload([np.array(values, dtype=np.int64)], device)
    return ints


def _column(device: torch.device, values: Sequence[float]) -> torch.Tensor:
    """float32 (B, 1)."""
    (floats,) = upload([np.array(values, dtype=np.float32)], device)
    return floats[:, None]
