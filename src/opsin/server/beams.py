"""``use_beam_search``: answers that are searched for instead of drawn."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from opsin.engine.beam import Beam, BeamSearch, Candidate
from opsin.errors import RequestError
from opsin.outputs import CompletionOutput, RequestOutput
from opsin.params import BeamSearchParams, SamplingParams
from opsin.processing.output import OutputKind
from opsin.processing.processor import ProcessedRequest
from opsin.server.client import EngineClient
from opsin.server.requests import SamplingRequest
from opsin.server.runs import all_of, run_whole

_FOR_DRAWING = (
    "stream",
    "logprobs",
    "prompt_logprobs",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "tools",
)
"""Fields that a search would have to ignore. Those that only say how to draw (temperature, top_p, seed) are no harm."""

_HARMLESS = {"repetition_penalty": 1.0, "response_format": {"type": "text"}}
"""Values by which clients ask for nothing."""


class Beams:
    """Runs each request as a search, through an engine that knows nothing of it; every answer comes whole.

    Args:
        length_penalty: scores are divided by an answer's length to this power.
    """

    def __init__(self, engine: EngineClient, length_penalty: float) -> None:
        self._engine = engine
        self._length_penalty = length_penalty

    async def stream(
        self, processed: ProcessedRequest, output_kind: OutputKind = "final"
    ) -> AsyncGenerator[RequestOutput, None]:
        """The ``n`` best answers, in one output. Closing it ends what runs."""
        given = processed.request.params
        assert isinstance(given, SamplingParams)
        assert given.max_tokens is not None, "resolved by the input processor"
        params = BeamSearchParams(
            beam_width=given.n,
            max_tokens=given.max_tokens,
            ignore_eos=given.ignore_eos,
            length_penalty=self._length_penalty,
            include_stop_str_in_output=given.include_stop_str_in_output,
        )
        search = BeamSearch(processed.request, params)
        num_cached: int | None = None
        while not search.done:
            requests = search.requests()
            outputs = await all_of(self._run(replace(processed, request=request)) for request in requests)
            if num_cached is None:
                num_cached = outputs[0].num_cached_tokens
            found = {
                r.request_id: _candidates(o, search.num_candidates) for r, o in zip(requests, outputs, strict=True)
            }
            search.advance(found, requests)
        skips = given.skip_special_tokens and not params.include_stop_str_in_output
        answers = [await self._answer(i, beam, params, skips) for i, beam in enumerate(search.best())]
        ids = processed.request.prompt_token_ids
        yield RequestOutput(
            processed.request.request_id, processed.prompt, ids, None, answers, True, num_cached_tokens=num_cached or 0
        )

    async def _run(self, processed: ProcessedRequest) -> RequestOutput:
        output = await run_whole(self._engine, processed)
        assert isinstance(output, RequestOutput)
        return output

    async def _answer(
        self, index: int, beam: Beam, params: BeamSearchParams, skip_special_tokens: bool
    ) -> CompletionOutput:
        shows_end = params.include_stop_str_in_output
        shown = beam.token_ids[:-1] if beam.finished and not shows_end else beam.token_ids
        return CompletionOutput(
            index,
            await self._engine.detokenize(shown, skip_special_tokens=skip_special_tokens),
            list(beam.token_ids),
            cumulative_logprob=beam.cumulative_logprob,
            finish_reason="stop" if beam.finished else "length",
        )


def beams_for(request: SamplingRequest, params: SamplingParams, engine: EngineClient) -> Beams | None:
    """What searches where a request asks for it; None where it does not.

    Raises:
        RequestError: it also asks for what a search cannot do.
    """
    if not request.use_beam_search:
        return None
    for name in _FOR_DRAWING:
        if _asks(name, getattr(request, name, None)):
            raise RequestError(f"{name} does not go with use_beam_search; leave one of them out.", param=name)
    if params.max_tokens is None:
        raise RequestError("use_beam_search needs max_tokens: a search goes on for so long.", param="max_tokens")
    length_penalty = 1.0 if request.length_penalty is None else request.length_penalty
    try:
        BeamSearchParams(beam_width=params.n, max_tokens=1, length_penalty=length_penalty)
    except RequestError as error:
        name = "n" if error.param == "beam_width" else error.param
        raise RequestError(str(error).replace("beam_width", "n"), param=name) from None
    return Beams(engine, length_penalty)


def _asks(name: str, value: Any) -> bool:
    if name in ("logprobs", "prompt_logprobs"):  # 0 asks for a token's own
        return value is not None and value is not False
    return bool(value) and value != _HARMLESS.get(name)


def _candidates(output: RequestOutput, count: int) -> list[Candidate]:
    (position,) = output.outputs[0].logprobs or ({},)
    ranked = sorted(position.items(), key=lambda item: item[1].rank or 0)
    return [Candidate(token, entry.logprob) for token, entry in ranked[:count]]
