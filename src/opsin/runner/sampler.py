"""From logits to tokens, for a whole batch in one pass on the device.

Each row's randomness is a pure function of its request's seed, of how many tokens it has generated, and of the
vocabulary index, so an answer depends neither on the rest of the batch nor on preemption. The order of the steps is
vLLM's: allowed ids, bad words, bias and minimum length, penalties, temperature, min-p, top-k, top-p, draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from opsin.layers.staging import upload
from opsin.params import PoolingParams, SamplingParams
from opsin.types import PositionLogprobs, TokenLogprob

_NEG_INF = float("-inf")
_MAX_NARROW = 512  # a top-k up to which the candidates alone are looked at
_PROMPT_LOGPROBS_ROWS = 256  # positions whose (rows, V) logits are in memory at once


NUMBERS = np.dtype(
    [
        ("seed", np.uint64),
        ("num_prompt", np.int64),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("temperature", np.float32),
        ("repetition", np.float32),
        ("frequency", np.float32),
        ("presence", np.float32),
    ]
)
"""What the sampler must know of a request, where numbers say it; ``top_k`` is 0 and ``top_p`` 2 where all are kept."""


def numbers_of(params: SamplingParams, num_prompt: int, seed: int) -> tuple[float, ...]:
    """A record of ``NUMBERS``."""
    return (
        seed & (2**64 - 1),
        num_prompt,
        max(params.top_k, 0),
        params.top_p if params.top_p < 1.0 else 2.0,
        params.min_p,
        0.0 if takes_likeliest(params) else max(params.temperature, 1e-5),
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
    )


@dataclass(frozen=True, slots=True)
class ParticularRow:
    """A row whose request asks for more than numbers can say, or for something to be read off its logits.

    Attributes:
        stop_token_ids: masked until ``params.min_tokens`` are generated.
        mask: as ``RowPlan.mask``.
    """

    params: SamplingParams
    stop_token_ids: frozenset[int]
    mask: bytes | None = None


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The rows of one draw.

    Attributes:
        slot_B: rows of the token table, which hold prompts and answers so far.
        num_tokens_B: how many ids of those are known before this draw.
        numbers_B: records of ``NUMBERS``.
        particular: by index, the rows that must be looked at one by one.
    """

    slot_B: np.ndarray
    num_tokens_B: np.ndarray
    numbers_B: np.ndarray
    particular: Mapping[int, ParticularRow]

    @property
    def num_generated_B(self) -> np.ndarray:
        return self.num_tokens_B - self.numbers_B["num_prompt"]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Device tensors of one step's draw; nothing has waited for them.

    Attributes:
        drawn_2B: int64, as ``kernels.ops.Greedy`` returns it: tokens, and whether the row's logits were usable.
        top: (ids_BK, logprobs_BK, chosen_B, rank_B) where any row wants log-probabilities.
    """

    drawn_2B: torch.Tensor
    top: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None

    @property
    def ids_B(self) -> torch.Tensor:
        return self.drawn_2B[0]


def takes_likeliest(params: SamplingParams) -> bool:
    """Nothing is left to chance."""
    return params.greedy or params.top_k == 1


def is_particular(params: SamplingParams | PoolingParams, stop_token_ids: frozenset[int]) -> bool:
    """The request's rows must be looked at one by one: it pools, or is a ``ParticularRow`` at some time."""
    return (
        isinstance(params, PoolingParams)
        or params.logprobs is not None
        or params.prompt_logprobs is not None
        or params.structured_outputs is not None
        or params.allowed_token_ids is not None
        or bool(params.bad_words_token_ids)
        or bool(params.logit_bias)
        or bool(params.min_tokens and stop_token_ids)
    )


def is_plain(params: SamplingParams | PoolingParams, stop_token_ids: frozenset[int]) -> bool:
    """The likeliest token is wanted and nothing else."""
    return (
        not is_particular(params, stop_token_ids)
        and isinstance(params, SamplingParams)
        and takes_likeliest(params)
        and params.repetition_penalty == 1.0
        and not params.frequency_penalty
        and not params.presence_penalty
    )


def sample(logits_BV: torch.Tensor, rows: SampleRows, tokens_SL: torch.Tensor) -> SampledTokens:
    """Draw one token per row.

    Args:
        logits_BV: float32; modified in place.
        rows: one per logits row.
        tokens_SL: the token table on the same device, int64.
    """
    top = None
    counts = [row.params.logprobs for row in rows.particular.values() if row.params.logprobs is not None]
    raw_BV = logits_BV.log_softmax(dim=-1) if counts else None
    finite_B = logits_BV.amax(dim=-1).isfinite()

    if rows.particular:
        _keep_allowed(logits_BV, rows.particular)
        _mask_and_bias(logits_BV, rows, tokens_SL)
    _penalise(logits_BV, rows, tokens_SL)
    ids_B = _choose(logits_BV, rows)

    if raw_BV is not None:
        top = top_logprobs(raw_BV, ids_B, max(counts))
    return SampledTokens(torch.stack((ids_B, finite_B)), top)


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


def _keep_allowed(logits_BV: torch.Tensor, rows: Mapping[int, ParticularRow]) -> None:
    """Leave the tokens that a grammar allows, for the rows that have one."""
    masks = {b: row.mask for b, row in rows.items() if row.mask is not None}
    if not masks:
        return
    device = logits_BV.device
    packed = np.stack([np.frombuffer(mask, np.uint8) for mask in masks.values()])
    bytes_MW, index = upload([packed, np.array(list(masks))], device)
    bits_MV = bytes_MW[:, :, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=device)) & 1
    banned_MV = bits_MV.flatten(1)[:, : logits_BV.shape[1]] == 0
    logits_BV[index] = logits_BV[index].masked_fill(banned_MV, _NEG_INF)


def _mask_and_bias(logits_BV: torch.Tensor, rows: SampleRows, tokens_SL: torch.Tensor) -> None:
    """Allowed ids, bad words, logit bias and the minimum length, for the rows that ask for them."""
    device = logits_BV.device
    at_row: list[int] = []
    at_token: list[int] = []
    amount: list[float] = []
    for b, row in rows.particular.items():
        params, num_tokens = row.params, int(rows.num_tokens_B[b])
        if params.allowed_token_ids is not None:
            allowed = _device_ints(params.allowed_token_ids, device)
            kept = logits_BV[b, allowed]
            logits_BV[b] = _NEG_INF
            logits_BV[b, allowed] = kept
        for word in params.bad_words_token_ids or ():
            # The last tokens may exist only on the device (two steps in flight), so compare there.
            prefix, last = word[:-1], word[-1]
            if len(prefix) > num_tokens:
                continue
            penalty: torch.Tensor | float = _NEG_INF
            if prefix:
                recent = tokens_SL[int(rows.slot_B[b]), num_tokens - len(prefix) : num_tokens]
                same = (recent == _device_ints(prefix, device)).all()
                penalty = torch.where(same, _NEG_INF, 0.0)
            logits_BV[b, last] += penalty
        if params.logit_bias:
            at_row += [b] * len(params.logit_bias)
            at_token += params.logit_bias.keys()
            amount += params.logit_bias.values()
        if row.stop_token_ids and num_tokens - rows.numbers_B["num_prompt"][b] < params.min_tokens:
            at_row += [b] * len(row.stop_token_ids)
            at_token += row.stop_token_ids
            amount += [_NEG_INF] * len(row.stop_token_ids)
    if at_row:
        row_I, token_I, amount_I = upload([np.array(at_row), np.array(at_token), np.array(amount, np.float32)], device)
        logits_BV.index_put_((row_I, token_I), amount_I, accumulate=True)


def _penalise(logits_BV: torch.Tensor, rows: SampleRows, tokens_SL: torch.Tensor) -> None:
    """Repetition (prompt and answer), frequency and presence (answer alone) penalties."""
    numbers_B = rows.numbers_B
    wanted = np.flatnonzero(
        (numbers_B["repetition"] != 1.0) | (numbers_B["frequency"] != 0.0) | (numbers_B["presence"] != 0.0)
    )
    if not len(wanted):
        return
    device, vocab_size = logits_BV.device, logits_BV.shape[1]
    numbers_R, num_tokens_R = numbers_B[wanted], rows.num_tokens_B[wanted]
    columns = [numbers_R[name] for name in ("num_prompt", "repetition", "frequency", "presence")]
    index, slots, known, *others = upload([wanted, rows.slot_B[wanted], num_tokens_R, *columns], device)
    prompt_R1, repetition_R1, frequency_R1, presence_R1 = (column[:, None] for column in others)
    longest = int(num_tokens_R.max())
    ids_RL = tokens_SL[slots, :longest]
    at_L = torch.arange(longest, device=device)
    known_RL = at_L < known[:, None]
    zeros_RV = torch.zeros(len(wanted), vocab_size, device=device)
    x_RV = logits_BV[index]
    if (numbers_R["repetition"] != 1.0).any():
        seen_RV = zeros_RV.scatter_add(1, ids_RL, known_RL.float()) > 0
        x_RV = torch.where(seen_RV, torch.where(x_RV > 0, x_RV / repetition_R1, x_RV * repetition_R1), x_RV)
    if numbers_R["frequency"].any() or numbers_R["presence"].any():
        answer_RL = known_RL & (at_L >= prompt_R1)
        count_RV = zeros_RV.scatter_add(1, ids_RL, answer_RL.float())
        x_RV -= frequency_R1 * count_RV
        x_RV -= presence_R1 * (count_RV > 0)
    logits_BV[index] = x_RV


def _choose(logits_BV: torch.Tensor, rows: SampleRows) -> torch.Tensor:
    """The likeliest token of each row, or one drawn.

    Rows with a small top-k are drawn from few candidates, the others from the whole vocabulary.
    """
    numbers_B, vocab_size = rows.numbers_B, logits_BV.shape[1]
    is_random_B = numbers_B["temperature"] > 0.0
    is_narrow_B = (numbers_B["top_k"] > 0) & (numbers_B["top_k"] <= min(_MAX_NARROW, vocab_size // 2))
    keys_B = _row_key(numbers_B["seed"], rows.num_generated_B)
    ids_B = None if is_random_B.all() else logits_BV.argmax(dim=-1)
    for group_B in (is_random_B & is_narrow_B, is_random_B & ~is_narrow_B):
        group = np.flatnonzero(group_B)
        if len(group) == len(keys_B):
            return _draw(logits_BV, numbers_B, keys_B)
        if len(group):
            (index,) = upload([group], logits_BV.device)
            drawn = _draw(logits_BV[index], numbers_B[group], keys_B[group])
            ids_B = torch.zeros(len(keys_B), dtype=torch.int64, device=logits_BV.device) if ids_B is None else ids_B
            ids_B = ids_B.index_copy(0, index, drawn)
    assert ids_B is not None
    return ids_B


def _draw(logits_BV: torch.Tensor, numbers_B: np.ndarray, keys_B: np.ndarray) -> torch.Tensor:
    """Temperature, min-p, top-k and top-p, then one draw per row by the Gumbel-max trick.

    Among the tokens that are as likely as the last one kept, all are kept, so that the choice depends on nothing else.
    """
    vocab_size = logits_BV.shape[1]
    top_k_B = np.where(numbers_B["top_k"] > 0, numbers_B["top_k"], vocab_size).clip(max=vocab_size)
    columns = [top_k_B, keys_B, *(numbers_B[name] for name in ("temperature", "min_p", "top_p"))]
    uploaded = upload(columns, logits_BV.device)
    top_k_B1, key_B1, temperature_B1, min_p_B1, top_p_B1 = (column[:, None] for column in uploaded)

    x_BK = logits_BV / temperature_B1
    if (numbers_B["min_p"] > 0).any():
        # p >= min_p * p_max, in logits: x >= x_max + log(min_p)
        x_BK = x_BK.masked_fill(x_BK < x_BK.amax(dim=-1, keepdim=True) + min_p_B1.log(), _NEG_INF)
    ids_BK = None
    num_kept = int(top_k_B.max())
    if num_kept < vocab_size or (numbers_B["top_p"] < 1.0).any():
        num_candidates = _candidates(num_kept, vocab_size)
        if num_candidates < vocab_size:
            x_BK, ids_BK = x_BK.topk(num_candidates, dim=-1)
        else:
            x_BK, ids_BK = x_BK.sort(dim=-1, descending=True)
        last_B1 = x_BK.gather(1, top_k_B1 - 1)
        p_BK = x_BK.masked_fill(x_BK < last_B1, _NEG_INF).softmax(dim=-1)
        # Keep the smallest set whose mass reaches top_p: drop what comes after the mass was reached.
        is_kept_BK = (p_BK.cumsum(dim=-1) - p_BK < top_p_B1) & (x_BK >= last_B1)
        last_B1 = x_BK.gather(1, (is_kept_BK.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
        x_BK = x_BK.masked_fill(x_BK < last_B1, _NEG_INF)
    else:
        ids_BK = torch.arange(vocab_size, device=logits_BV.device)[None]
    at_B1 = (x_BK + _gumbel(key_B1, ids_BK)).argmax(dim=-1, keepdim=True)
    return ids_BK.expand_as(x_BK).gather(1, at_B1)[:, 0]


def _candidates(num_kept: int, vocab_size: int) -> int:
    """How many of the likeliest tokens to look at for the ``num_kept`` best; more, for the sake of ties.

    Where even more tokens than that are equally likely, torch chooses which of them are looked at.
    """
    return vocab_size if num_kept > _MAX_NARROW else min(max(64, 2 * num_kept), vocab_size)


# SplitMix64 (Steele, Lea, Flood 2014), with constants as signed 64-bit integers because torch has no unsigned ones.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64


def _row_key(seed_B: npt.ArrayLike, draw_B: npt.ArrayLike) -> np.ndarray:
    """int64 keys for the ``draw_B``-th tokens of requests with seeds ``seed_B``."""
    with np.errstate(over="ignore"):
        z = np.asarray(seed_B, np.uint64) + (np.asarray(draw_B, np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN + 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1 + 2**64)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2 + 2**64)
        return (z ^ (z >> np.uint64(31))).view(np.int64)


def _gumbel(key_B1: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise (B, K) of tokens: it depends on a row's key and on the token alone."""
    z = key_B1 + (ids_BK + 1) * _GOLDEN
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX1  # masks turn the arithmetic shifts into logical ones
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX2
    z = z ^ ((z >> 31) & (2**33 - 1))
    uniform = (((z >> 40) & (2**24 - 1)).float() + 0.5) * 2.0**-24
    return -(-uniform.log()).log()


def _device_ints(values: Sequence[int], device: torch.device) -> torch.Tensor:
    (ints,) = upload([np.array(values, dtype=np.int64)], device)
    return ints
