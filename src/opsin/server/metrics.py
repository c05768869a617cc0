"""Prometheus metrics: under ``vllm:`` those that dashboards for vLLM ask for, under ``opsin:`` what only we tell.

The text format is simple enough to write. docs/grafana.json shows them all.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from opsin.engine.histogram import SECONDS, SHORT_SECONDS, TOKENS, Histogram
from opsin.outputs import RequestMetrics

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class _Family(NamedTuple):
    name: str
    help: str


_ENGINE_GAUGES = {
    "num_requests_running": _Family("vllm:num_requests_running", "Answers that run."),
    "num_requests_waiting": _Family("vllm:num_requests_waiting", "Answers that wait for their turn."),
    "kv_cache_usage": _Family("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1."),
    "feature_bytes_stored": _Family("opsin:feature_cache_bytes", "Vision features kept, in bytes."),
    "num_pictures_decoding": _Family("opsin:pictures_decoding", "Pictures that wait for a decoder, or are in one."),
    "engine_resident_bytes": _Family("opsin:engine_resident_memory_bytes", "Memory of the engine process on the host."),
}
_ENGINE_COUNTERS = {
    "num_preemptions_total": _Family("vllm:num_preemptions_total", "Answers set back to be computed again."),
    "prefix_cache_queried_tokens_total": _Family("vllm:prefix_cache_queries_total", "Prompt tokens looked up."),
    "prefix_cache_hit_tokens_total": _Family("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache."),
    "mm_cache_queries_total": _Family("vllm:mm_cache_queries_total", "Pictures that requests showed."),
    "mm_cache_hits_total": _Family("vllm:mm_cache_hits_total", "Those whose pixels were not needed."),
    "num_pictures_decoded_total": _Family("opsin:pictures_decoded_total", "Pictures decoded."),
    "num_pictures_decoded_on_device_total": _Family(
        "opsin:pictures_decoded_on_device_total", "Those that the GPU decoded."
    ),
    "num_pixels_decoded_total": _Family("opsin:pixels_decoded_total", "Pixels decoded, as the pictures came."),
    "num_engine_restarts_total": _Family("opsin:engine_restarts_total", "Engine processes started anew."),
}
_ENGINE_HISTOGRAMS = {
    "iteration_tokens": (_Family("vllm:iteration_tokens_total", "Tokens per step."), TOKENS),
    "step_seconds": (_Family("opsin:step_seconds", "Steps, from plan to commit."), SHORT_SECONDS),
    "encode_step_seconds": (_Family("opsin:encode_step_seconds", "Steps that encode pictures."), SHORT_SECONDS),
    "decode_seconds": (_Family("opsin:picture_decode_seconds", "From asking for a picture to its pixels."), SECONDS),
}
_HISTOGRAMS = {
    "e2e": (_Family("vllm:e2e_request_latency_seconds", "From arrival to the end of the answer."), SECONDS),
    "ttft": (_Family("vllm:time_to_first_token_seconds", "From arrival to the first token."), SECONDS),
    "itl": (_Family("vllm:inter_token_latency_seconds", "Time between tokens of streams."), SHORT_SECONDS),
    "tpot": (_Family("vllm:request_time_per_output_token_seconds", "Its mean per request."), SHORT_SECONDS),
    "queue": (_Family("vllm:request_queue_time_seconds", "From arrival to the first step."), SECONDS),
    "prefill": (_Family("vllm:request_prefill_time_seconds", "From there to the first token."), SECONDS),
    "decode": (_Family("vllm:request_decode_time_seconds", "From there to the last token."), SECONDS),
    "inference": (_Family("vllm:request_inference_time_seconds", "From the first step to the last token."), SECONDS),
    "prompt_tokens": (_Family("vllm:request_prompt_tokens", "Prompt tokens per request."), TOKENS),
    "generation_tokens": (_Family("vllm:request_generation_tokens", "Generated tokens per request."), TOKENS),
    "longest": (_Family("vllm:request_max_num_generation_tokens", "Tokens of a request's longest answer."), TOKENS),
    "loop_lag": (_Family("opsin:event_loop_lag_seconds", "How late the event loop came round."), SHORT_SECONDS),
}


class Metrics:
    """What the server saw of its requests.

    Args:
        model: the label that every sample carries.
    """

    def __init__(self, model: str) -> None:
        escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        self._label = f'model_name="{escaped}",engine="0"'
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._pictures = 0
        self._finished: Counter[str] = Counter(dict.fromkeys(("stop", "length", "abort", "error"), 0))
        self._refused: Counter[tuple[int, str]] = Counter()
        self._histograms = {name: Histogram.of(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}

    def admitted(self, num_prompt_tokens: int, num_pictures: int) -> None:
        """A prompt goes to the engine."""
        self._prompt_tokens += num_prompt_tokens
        self._pictures += num_pictures
        self._histograms["prompt_tokens"].observe(num_prompt_tokens)

    def generated(self, num_tokens: int, token_s: float | None = None) -> None:
        """Tokens have come back.

        Args:
            token_s: what each took; None where there are none before them.
        """
        self._generation_tokens += num_tokens
        if token_s is not None:
            self._histograms["itl"].observe(token_s, num_tokens)

    def finished(self, reason: str, timing: RequestMetrics | None, end_s: float, longest: int = 0) -> None:
        """A prompt's answers have ended.

        Args:
            reason: the finish reason; "error" for failures.
            longest: tokens of the longest of them.
        """
        self._finished[reason] += 1
        if timing is None:
            return
        observe = self._observe
        observe("e2e", timing.arrival_time, end_s)
        self._histograms["generation_tokens"].observe(timing.num_generation_tokens)
        self._histograms["longest"].observe(longest)
        scheduled, first, last = timing.first_scheduled_time, timing.first_token_time, timing.last_token_time
        observe("ttft", timing.arrival_time, first)
        observe("queue", timing.arrival_time, scheduled)
        observe("prefill", scheduled, first)
        observe("decode", first, last)
        observe("inference", scheduled, last)
        if first is not None and last is not None and longest > 1:
            self._histograms["tpot"].observe((last - first) / (longest - 1))

    def refused(self, status: int, code: str) -> None:
        """A request was answered with an error."""
        self._refused[status, code] += 1

    def lagged(self, seconds: float) -> None:
        """The event loop came round so much later than it was to."""
        self._histograms["loop_lag"].observe(seconds)

    def text(self, stats: Mapping[str, float], histograms: Mapping[str, Histogram], is_ready: bool) -> str:
        """Everything in Prometheus' text format.

        Args:
            stats: the engine's own gauges and counters.
            histograms: what the engine observed.
        """
        lines: list[str] = []
        stats = {**stats, "mm_cache_hits_total": _difference(stats, "mm_cache_queries_total", "mm_cache_misses_total")}
        for source, family in _ENGINE_GAUGES.items():
            lines += self._lines(family, "gauge", {"": stats.get(source, 0)})
        lines += self._lines(_Family("opsin:engine_ready", "1: the engine takes requests."), "gauge", {"": is_ready})
        lines += self._lines(
            _Family("opsin:front_resident_memory_bytes", "Memory of the HTTP server's process."),
            "gauge",
            {"": resident_bytes()},
        )
        for source, family in _ENGINE_COUNTERS.items():
            lines += self._lines(family, "counter", {"": stats.get(source, 0)})
        counts = {
            _Family("vllm:prompt_tokens_total", "Prompt tokens taken."): self._prompt_tokens,
            _Family("vllm:generation_tokens_total", "Tokens made."): self._generation_tokens,
            _Family("opsin:pictures_total", "Pictures in the prompts taken."): self._pictures,
        }
        for family, count in counts.items():
            lines += self._lines(family, "counter", {"": count})
        by_reason = {f',finished_reason="{reason}"': count for reason, count in self._finished.items()}
        answered = _Family("vllm:request_success_total", "Prompts answered, by how they ended.")
        lines += self._lines(answered, "counter", by_reason)
        by_code = {f',status="{status}",code="{code}"': n for (status, code), n in sorted(self._refused.items())}
        refusals = _Family("opsin:request_refusals_total", "Requests answered with an error, by its code.")
        lines += self._lines(refusals, "counter", by_code)
        for name, (family, bounds) in _ENGINE_HISTOGRAMS.items():
            lines += self._histogram_lines(family, histograms.get(name) or Histogram.of(bounds))
        for name, (family, _) in _HISTOGRAMS.items():
            lines += self._histogram_lines(family, self._histograms[name])
        return "\n".join(lines) + "\n"

    def _observe(self, name: str, begun_s: float | None, ended_s: float | None) -> None:
        if begun_s is not None and ended_s is not None:
            self._histograms[name].observe(ended_s - begun_s)

    def _lines(self, family: _Family, kind: str, samples: Mapping[str, float]) -> Iterator[str]:
        yield f"# HELP {family.name} {family.help}"
        yield f"# TYPE {family.name} {kind}"
        for labels, value in samples.items():
            yield f"{family.name}{{{self._label}{labels}}} {value:.17g}"

    def _histogram_lines(self, family: _Family, histogram: Histogram) -> Iterator[str]:
        yield f"# HELP {family.name} {family.help}"
        yield f"# TYPE {family.name} histogram"
        total = 0
        for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
            total += count
            yield f'{family.name}_bucket{{{self._label},le="{"+Inf" if bound is None else f"{bound:g}"}"}} {total}'
        yield f"{family.name}_sum{{{self._label}}} {histogram.total:g}"
        yield f"{family.name}_count{{{self._label}}} {total}"


class LoopClock:
    """Measures how late the event loop comes round, for as long as the loop runs.

    Args:
        period_s: between two looks.
    """

    def __init__(self, metrics: Metrics, period_s: float = 0.05) -> None:
        self._metrics = metrics
        self._period_s = period_s
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin on the running loop, unless it has begun there."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._expect(loop)

    def _expect(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(self._period_s, self._look, loop, loop.time() + self._period_s)

    def _look(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self._metrics.lagged(max(0.0, loop.time() - due_s))
        self._expect(loop)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


def _difference(stats: Mapping[str, float], all_of: str, some: str) -> float:
    return max(0.0, stats.get(all_of, 0.0) - stats.get(some, 0.0))
