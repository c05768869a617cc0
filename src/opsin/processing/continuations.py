"""Requests that go on where a prompt ends: samples, beams, and answers that are weighed against one another.

Weighing takes teacher forcing: a model tells each answer's probability if the answer is appended to the prompt. The
answers form a tree, and one request per leaf, short of its last token, passes every place where a token must be
scored; a single one does for answers of one token each. The requests share the prompt's blocks, as samples do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np

from opsin.errors import RequestError
from opsin.params import PoolingParams, SamplingParams
from opsin.processing.neutral import ControlStrings, Rendered
from opsin.processing.tokenizer import Tokenizer
from opsin.types import EngineRequest

_END_CHARS = 64  # of a prompt, in whose sight an answer is tokenised


def fan_out(request: EngineRequest, n: int) -> list[EngineRequest]:
    """``n`` requests for one prompt, named ``{id}-0``, ``{id}-1``, ..., each drawing with its own seed.

    ``n = 1`` is the request itself. The first child keeps the request's seed.
    """
    if n == 1:
        return [request]
    assert isinstance(request.params, SamplingParams)
    first = msgspec.structs.replace(
        request,
        request_id=f"{request.request_id}-0",
        params=msgspec.structs.replace(request.params, n=1),
        cache_namespace=request.request_id,
    )
    params = msgspec.structs.replace(request.params, n=1, prompt_logprobs=None)  # the first child reports them
    others = [
        msgspec.structs.replace(
            first, request_id=f"{request.request_id}-{i}", params=params, seed=derive_seed(request.seed, str(i))
        )
        for i in range(1, n)
    ]
    return [first, *others]


def derive_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on both."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def extended(
    prompt: EngineRequest, request_id: str, token_ids: Sequence[int], params: SamplingParams | PoolingParams
) -> EngineRequest:
    """The same request with some answer tokens appended to its prompt."""
    positions = prompt.positions
    if positions is not None and token_ids:
        length = len(prompt.prompt_token_ids)
        known_AP = np.frombuffer(positions, dtype=np.int32).reshape(-1, length)
        axes = known_AP.shape[0]
        new = np.arange(length, length + len(token_ids), dtype=np.int32) + prompt.position_delta
        positions = np.concatenate([known_AP, np.tile(new, (axes, 1))], axis=1).astype(np.int32).tobytes()
    return msgspec.structs.replace(
        prompt,
        request_id=request_id,
        prompt_token_ids=[*prompt.prompt_token_ids, *token_ids],
        params=params,
        positions=positions,
        stop_token_ids=frozenset[int](),
    )


def spelled(
    prompt: str, answers: Sequence[str], tokenizer: Tokenizer, controls: ControlStrings
) -> list[list[list[int]]]:
    """The tokens of the answers behind a prompt, in each of the ways in which they may be joined to it.

    Behind a word ("ASSISTANT:") some models begin their answer with a space and others do not, so both are to be
    scored; the likelier one is the model's. Behind white space or a special token there is one way only.
    """
    end = prompt[-_END_CHARS:]
    joints = [""] if not end or end[-1].isspace() or end.endswith(tokenizer.special_strings) else ["", " "]
    return [[continue_ids(end, joint + answer, tokenizer, controls) for answer in answers] for joint in joints]


def continue_ids(end: str, answer: str, tokenizer: Tokenizer, controls: ControlStrings) -> list[int]:
    """The tokens that ``answer`` has behind a text that ends in ``end``; control strings in it are plain text.

    Raises:
        RequestError: it has none.
    """
    before = tokenizer.encode(end, add_special_tokens=False)
    plain = [(len(end) + start, len(end) + stop) for start, stop in controls.find(answer)]
    both = tokenizer.encode_rendered(Rendered(end + answer, plain), add_special_tokens=False)
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    alone = tokenizer.encode_plain(answer, at_start=False)  # its first letters would merge with the prompt's
    if not alone:
        raise RequestError(f"The choice {answer!r} has no tokens in this model's vocabulary.", param="choices")
    return alone


def pick_requests(prompt: EngineRequest, answers: Sequence[Sequence[int]]) -> list[EngineRequest]:
    """The requests that score every token of ``answers`` behind ``prompt``; each reads what those before it do not."""
    assert isinstance(prompt.params, PoolingParams)
    wanted: dict[tuple[int, ...], set[int]] = {}  # what may follow each beginning of an answer
    for answer in answers:
        for i, token in enumerate(answer):
            wanted.setdefault(tuple(answer[:i]), set()).add(token)
    begun = sorted(wanted)  # whatever goes on from a beginning comes right behind it
    leaves = [this for this, after in pairwise([*begun, ()]) if after[: len(this)] != this or not after]
    last = len(prompt.prompt_token_ids) - 1
    requests: list[EngineRequest] = []
    for i, leaf in enumerate(leaves):
        beginnings = [leaf[:n] for n in range(len(leaf) + 1) if leaf[:n] in wanted]
        targets = [(last + len(beginning), sorted(wanted.pop(beginning))) for beginning in beginnings]
        params = msgspec.structs.replace(prompt.params, targets=targets)
        child = extended(prompt, f"{prompt.request_id}-{i}" if len(leaves) > 1 else prompt.request_id, leaf, params)
        child.cache_namespace = prompt.request_id
        requests.append(child)
    return requests


def answer_logprobs(
    answers: Sequence[Sequence[int]], requests: Sequence[EngineRequest], values: Sequence[Sequence[bytes]]
) -> list[float]:
    """The log-probability of each answer, from what ``pick_requests``'s requests read.

    Args:
        values: per request, float32 numbers per target.
    """
    prompt_len = min(request.params.targets[0][0] for request in requests if isinstance(request.params, PoolingParams))
    prompt_len += 1  # the first target of all is the prompt's last position
    table: dict[tuple[tuple[int, ...], int], float] = {}
    for request, read in zip(requests, values, strict=True):
        assert isinstance(request.params, PoolingParams)
        answer = request.prompt_token_ids[prompt_len:]
        for (position, ids), numbers in zip(request.params.targets, read, strict=True):
            beginning = tuple(answer[: position + 1 - prompt_len])
            for token, logprob in zip(ids, np.frombuffer(numbers, np.float32).tolist(), strict=True):
                table[beginning, token] = logprob
    return [sum(table[tuple(answer[:i]), token] for i, token in enumerate(answer)) for answer in answers]
