"""Refusing what could never run, before it is in line."""

from __future__ import annotations

from opsin.errors import ContextLengthError, RequestError
from opsin.scheduler.limits import SchedulerLimits
from opsin.scheduler.sequence import Sequence


def check_fits(seq: Sequence, limits: SchedulerLimits) -> None:
    """The liveness of the line rests on this: alone, every request that passes can run to its end.

    Raises:
        ContextLengthError: the prompt leaves no room for an answer.
        RequestError: it is empty, or needs more tokens in one step or more features at once than there can be.
    """
    if seq.num_prompt == 0:
        raise RequestError("The prompt is empty; it must have at least one token.", param="prompt")
    room = 0 if seq.pools else 1
    if seq.num_prompt + room > limits.context_len:
        pool_is_short = limits.context_len < limits.max_model_len
        cause = "all KV blocks together hold" if pool_is_short else "the context (max_model_len) holds"
        answer = "" if seq.pools else " and an answer of at least one"
        raise ContextLengthError(
            f"The prompt has {seq.num_prompt} tokens; {cause} {limits.context_len}, prompt{answer}. "
            "Shorten the prompt or use fewer or smaller pictures.",
            param="prompt",
        )
    longest = max((end - start for start, end in seq.request.bidirectional), default=0)
    if longest > limits.max_num_batched_tokens:
        raise RequestError(
            f"The prompt has a picture of {longest} tokens that must run in one step; a step has "
            f"max_num_batched_tokens={limits.max_num_batched_tokens}. Raise it or use a smaller picture."
        )
    needed = seq.peak_features() * limits.feature_row_bytes
    if needed > limits.feature_bytes:
        raise RequestError(
            f"The prompt needs {needed} bytes of vision features at once; the cache has {limits.feature_bytes}. "
            "Raise vision_cache_gb or use smaller pictures."
        )
