"""Prometheus metrics, under the names that dashboards for vLLM use. The text format is simple enough to write."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from opsin.outputs import RequestMetrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_ENGINE_GAUGES = {
    "num_requests_running": ("num_requests_running", "Answers that run."),
    "num_requests_waiting": ("num_requests_waiting", "Answers that wait for their turn."),
    "kv_cache_usage": ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1."),
}
_ENGINE_COUNTERS = {
    "num_preemptions_total": ("num_preemptions", "Answers that were set back to be computed again."),
    "prefix_cache_queried_tokens_total": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hit_tokens_total": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "num_pictures_decoded_total": ("pictures_decoded", "Pictures decoded; those that a cache knew are not."),
}


class Histogram:
    """Counts by upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, label: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{label},le="{"+Inf" if bound is None else f"{bound:g}"}"}} {total}'
        yield f"{name}_sum{{{label}}} {self._sum:g}"
        yield f"{name}_count{{{label}}} {total}"


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
        self._finished: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self._refused: dict[int, int] = {}
        self._histograms = {
            "e2e_request_latency_seconds": (Histogram(_SECONDS), "From arrival to the end of the answer."),
            "time_to_first_token_seconds": (Histogram(_SECONDS), "From arrival to the first token."),
            "inter_token_latency_seconds": (Histogram(_SHORT_SECONDS), "Mean time between tokens, per request."),
            "request_prompt_tokens": (Histogram(_TOKENS), "Prompt tokens per request."),
            "request_generation_tokens": (Histogram(_TOKENS), "Generated tokens per request."),
        }

    def admitted(self, num_prompt_tokens: int, num_pictures: int) -> None:
        """A prompt goes to the engine."""
        self._prompt_tokens += num_prompt_tokens
        self._pictures += num_pictures
        self._histograms["request_prompt_tokens"][0].observe(num_prompt_tokens)

    def generated(self, num_tokens: int) -> None:
        """Tokens have come back."""
        self._generation_tokens += num_tokens

    def finished(self, reason: str, timing: RequestMetrics | None, end_s: float) -> None:
        """A prompt's answers have ended.

        Args:
            reason: the finish reason; "error" for failures.
        """
        self._finished[reason] = self._finished.get(reason, 0) + 1
        if timing is None:
            return
        self._histograms["e2e_request_latency_seconds"][0].observe(end_s - timing.arrival_time)
        self._histograms["request_generation_tokens"][0].observe(timing.num_generation_tokens)
        if timing.time_to_first_token is not None:
            self._histograms["time_to_first_token_seconds"][0].observe(timing.time_to_first_token)
        first, last, count = timing.first_token_time, timing.last_token_time, timing.num_generation_tokens
        if first is not None and last is not None and count > 1:
            self._histograms["inter_token_latency_seconds"][0].observe((last - first) / (count - 1))

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused[status] = self._refused.get(status, 0) + 1

    def text(self, engine: Mapping[str, float]) -> str:
        """Everything in Prometheus' text format.

        Args:
            engine: the engine's own gauges and counters.
        """
        lines: list[str] = []
        for source, (name, help) in _ENGINE_GAUGES.items():
            lines += self._family(name, "gauge", help, {"": engine.get(source, 0)})
        for source, (name, help) in _ENGINE_COUNTERS.items():
            lines += self._family(f"{name}_total", "counter", help, {"": engine.get(source, 0)})
        lines += self._family("prompt_tokens_total", "counter", "Prompt tokens taken.", {"": self._prompt_tokens})
        lines += self._family("generation_tokens_total", "counter", "Tokens made.", {"": self._generation_tokens})
        lines += self._family("pictures_total", "counter", "Pictures in the prompts taken.", {"": self._pictures})
        by_reason = {f',finished_reason="{reason}"': count for reason, count in self._finished.items()}
        lines += self._family("request_success_total", "counter", "Prompts answered, by how they ended.", by_reason)
        by_status = {f',status="{status}"': count for status, count in sorted(self._refused.items())}
        lines += self._family("request_refusals_total", "counter", "Requests answered with an error.", by_status)
        for name, (histogram, help) in self._histograms.items():
            lines += [f"# HELP vllm:{name} {help}", f"# TYPE vllm:{name} histogram"]
            lines += histogram.lines(f"vllm:{name}", self._label)
        return "\n".join(lines) + "\n"

    def _family(self, name: str, kind: str, help: str, samples: Mapping[str, float]) -> Iterator[str]:
        yield f"# HELP vllm:{name} {help}"
        yield f"# TYPE vllm:{name} {kind}"
        for labels, value in samples.items():
            yield f"vllm:{name}{{{self._label}{labels}}} {value:.17g}"
