"""Beam search, as many one-token requests.

Each step runs every live beam for one token and looks at its 2 * width likeliest continuations. Beams of one prompt
share its blocks and picture features through the caches, so a step costs about one decode row a beam.

Scores are summed log-probabilities divided by (generated length) ** length_penalty, as transformers does. Unlike there,
and as in vLLM, an end token counts as a finished hypothesis whatever its rank among a step's candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from opsin.engine.front import Front
from opsin.outputs import BeamSearchOutput, BeamSearchSequence
from opsin.params import BeamSearchParams, SamplingParams
from opsin.processing.continuations import extended
from opsin.processing.prompts import Prompt
from opsin.processing.tokenizer import Tokenizer
from opsin.types import EngineRequest, RequestUpdate


@dataclass(frozen=True, slots=True)
class Beam:
    """One hypothesis: the tokens after the prompt and the sum of their log-probabilities."""

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    finished: bool = False

    def score(self, length_penalty: float) -> float:
        return self.cumulative_logprob / max(1, len(self.token_ids)) ** length_penalty


class Candidate(NamedTuple):
    """A token that may come next."""

    token_id: int
    logprob: float


class BeamSearch:
    """The beams of one prompt. Call ``requests``, run them, hand the answers to ``advance``; until ``done``."""

    def __init__(self, prompt: EngineRequest, params: BeamSearchParams) -> None:
        self._prompt = prompt
        self._params = params
        self._ends = frozenset[int]() if params.ignore_eos else prompt.stop_token_ids
        self._live = [Beam()]
        self._finished: list[Beam] = []
        self._step = 0

    @property
    def num_candidates(self) -> int:
        """Tokens that are looked at behind each beam."""
        return 2 * self._params.beam_width

    @property
    def done(self) -> bool:
        return not self._live or self._step >= self._params.max_tokens

    def requests(self) -> list[EngineRequest]:
        """One-token requests, one for each live beam, in the order in which ``advance`` wants the answers."""
        one_token = SamplingParams(
            temperature=self._params.temperature,
            max_tokens=1,
            logprobs=self.num_candidates,
            ignore_eos=True,
            detokenize=False,
        )
        return [
            extended(self._prompt, f"{self._prompt.request_id}-beam-{self._step}-{i}", beam.token_ids, one_token)
            for i, beam in enumerate(self._live)
        ]

    def advance(self, answers: Mapping[str, Sequence[Candidate]], requests: Sequence[EngineRequest]) -> None:
        """Keep the best continuations of ``requests``.

        Args:
            answers: the ``num_candidates`` likeliest next tokens of each request, by its id.
        """
        grown: list[Beam] = []
        for beam, request in zip(self._live, requests, strict=True):
            for token_id, logprob in answers[request.request_id]:
                ends = token_id in self._ends
                new = Beam((*beam.token_ids, token_id), beam.cumulative_logprob + logprob, ends)
                (self._finished if ends else grown).append(new)
        grown.sort(key=lambda beam: beam.cumulative_logprob, reverse=True)
        self._live = grown[: self._params.beam_width]
        self._step += 1

    def best(self) -> list[Beam]:
        """The ``beam_width`` best hypotheses, best first."""
        everyone = self._finished + self._live
        everyone.sort(key=lambda beam: beam.score(self._params.length_penalty), reverse=True)
        return everyone[: self._params.beam_width]


def beam_search(
    front: Front,
    prompts: Sequence[tuple[str, Prompt]],
    params: BeamSearchParams,
    interrupted: Callable[[], bool],
) -> list[BeamSearchOutput]:
    """Search all prompts side by side.

    Args:
        prompts: each with a request id of its own.
        interrupted: asked between steps; True ends the search with KeyboardInterrupt.
    """
    probe = SamplingParams(max_tokens=params.max_tokens, temperature=params.temperature, ignore_eos=params.ignore_eos)
    processed = [front.inputs.process(request_id, prompt, probe) for request_id, prompt in prompts]
    searches = [BeamSearch(p.request, within_context(params, p.request)) for p in processed]
    while any(not search.done for search in searches):
        asked = [
            (search, p, search.requests()) for search, p in zip(searches, processed, strict=True) if not search.done
        ]
        answers = front.run([(request, p) for _, p, requests in asked for request in requests])
        for search, _, requests in asked:
            search.advance({r.request_id: _candidates(answers[r.request_id]) for r in requests}, requests)
        if interrupted():
            raise KeyboardInterrupt
    keep_end = params.include_stop_str_in_output
    return [
        _output(search, p.request, front.inputs.tokenizer, keep_end)
        for search, p in zip(searches, processed, strict=True)
    ]


def _candidates(update: RequestUpdate) -> list[Candidate]:
    (logprobs,) = update.logprobs or ([],)  # the first entry is the drawn token; the likeliest ones follow
    return [Candidate(entry.token_id, entry.logprob) for entry in logprobs[1:]]


def within_context(params: BeamSearchParams, request: EngineRequest) -> BeamSearchParams:
    """With no more tokens than the context holds behind this prompt, as ``generate`` does."""
    assert isinstance(request.params, SamplingParams)
    assert request.params.max_tokens is not None, "resolved by the input processor"
    return msgspec.structs.replace(params, max_tokens=request.params.max_tokens)


def _output(search: BeamSearch, request: EngineRequest, tokenizer: Tokenizer, keep_end: bool) -> BeamSearchOutput:
    def text(beam: Beam) -> str:
        shown = beam.token_ids[:-1] if beam.finished and not keep_end else beam.token_ids
        return tokenizer.decode(list(shown), skip_special_tokens=not keep_end)

    return BeamSearchOutput(
        [
            BeamSearchSequence(
                tokens=[*request.prompt_token_ids, *beam.token_ids],
                cum_logprob=beam.cumulative_logprob,
                text=text(beam),
                finish_reason="stop" if beam.finished else "length",
            )
            for beam in search.best()
        ]
    )
