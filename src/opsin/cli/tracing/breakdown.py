"""What recorded spans add up to: by stage, by request, and for requests that ran one at a time a timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from opsin.cli.tracing.recorder import DEVICE, MEDIA, Recorder, RequestTimes, Span

_ON_TIME_MS = 0.1  # a device that ends so soon behind the host waited for its launches


def breakdown(recorder: Recorder) -> dict[str, Any]:
    """The run in numbers, in milliseconds.

    Returns:
        ``wall_ms``; ``host``: what the thread that steps did, one stage at a time, so that it adds up to ``wall_ms``;
        ``readers``: likewise of other threads, if they did anything; ``media``; ``device``: its stages and
        ``idle``, which add up to ``wall_ms``; ``steps``: the device's gaps between them; ``requests``: how each
        one's latency is made up; ``timeline``: of the request with the median time to its first token, where
        requests ran one at a time.
    """
    spans = [span for span in recorder.spans if span.begin_s >= recorder.begin_s]
    wall_s = recorder.end_s - recorder.begin_s
    stepping = next((span.lane for span in spans if span.stage == "plan"), "")
    on_device = [span for span in spans if span.lane == DEVICE]
    media = [span for span in spans if span.lane.startswith(MEDIA)]
    others = [span for span in spans if span.lane not in (DEVICE, stepping) and not span.lane.startswith(MEDIA)]
    report: dict[str, Any] = {"wall_ms": _ms(wall_s)}
    report["host"] = _stages([span for span in spans if span.lane == stepping], wall_s, "other")
    if others:
        report["readers"] = _stages(others, None, "")
    if media:
        report["media"] = {
            "pictures": len(media),
            "workers": len({span.lane for span in media}),
            "decode_and_resize_ms": _ms(sum(span.seconds for span in media)),
            "per_picture_ms": spread([span.seconds for span in media]),
            "waited_for_worker_ms": spread([span.facts["waited_ms"] / 1e3 for span in media]),
        }
    report["device"] = _stages(on_device, wall_s, "idle")
    report["steps"] = _steps(on_device)
    report["requests"] = _requests(recorder.requests)
    report["timeline"] = _timeline(recorder, spans)
    return report


def own_seconds(spans: Iterable[Span]) -> list[tuple[Span, float]]:
    """Each span with the part of its time that no span inside it took. They lie in one lane, so that they nest."""
    own: list[tuple[Span, float]] = []
    stack: list[list[Any]] = []  # [span, seconds of its own]
    for span in sorted(spans, key=lambda span: (span.begin_s, -span.end_s)):
        while stack and stack[-1][0].end_s <= span.begin_s:
            own.append(tuple(stack.pop()))
        if stack:
            stack[-1][1] -= min(span.end_s, stack[-1][0].end_s) - span.begin_s
        stack.append([span, span.seconds])
    own += [tuple(entry) for entry in reversed(stack)]
    return own


def spread(seconds: Sequence[float]) -> Mapping[str, float] | None:
    """Mean, median and greatest, in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return {"mean": _ms(sum(ordered) / len(ordered)), "p50": _ms(ordered[len(ordered) // 2]), "max": _ms(ordered[-1])}


def _stages(spans: Sequence[Span], wall_s: float | None, rest: str) -> dict[str, dict[str, float]]:
    """Times of each stage, spans inside counted out, the longest first; then what is left of ``wall_s``."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    late: dict[str, float] = defaultdict(float)
    for lane in dict.fromkeys(span.lane for span in spans):
        for span, own_s in own_seconds(span for span in spans if span.lane == lane):
            seconds[span.stage] += own_s
            counts[span.stage] += 1
            if span.facts.get("behind_ms", _ON_TIME_MS) < _ON_TIME_MS:
                late[span.stage] += own_s
    table: dict[str, dict[str, float]] = {}
    for stage in sorted(seconds, key=lambda stage: -seconds[stage]):
        table[stage] = {"count": counts[stage], "ms": _ms(seconds[stage])}
        if stage in late and spans[0].lane == DEVICE:
            table[stage]["launch_bound_ms"] = _ms(late[stage])
    if wall_s is not None:
        table[rest] = {"ms": _ms(wall_s - sum(seconds.values()))}
    return table


def _steps(on_device: Sequence[Span]) -> dict[str, Any]:
    steps = sorted((span for span in on_device if "step" in span.facts), key=lambda span: span.begin_s)
    gaps = [max(0.0, later.begin_s - earlier.end_s) for earlier, later in pairwise(steps)]
    decodes = [span.seconds for span in steps if span.stage == "decode" and not span.facts["pictures"]]
    others = [span.seconds for span in steps if span.stage != "decode" or span.facts["pictures"]]
    return {
        "count": len(steps),
        "gap_ms": spread(gaps),
        "gaps_ms": _ms(sum(gaps)),
        "decode_step_ms": spread(decodes),
        "other_step_ms": spread(others),
    }


def _requests(requests: Sequence[RequestTimes]) -> dict[str, Any]:
    """How long each phase took; for every request they add up to its ``latency_ms``."""
    return {
        "count": len(requests),
        "template_and_open_ms": spread([r.read_s - r.begin_s for r in requests]),
        "tokenise_ms": spread([r.processed_s - r.read_s for r in requests]),
        "to_pixels_ms": spread([r.pixels_s - r.processed_s for r in requests]),
        "to_first_token_ms": spread([r.first_s - r.pixels_s for r in requests]),
        "to_last_token_ms": spread([r.last_s - r.first_s for r in requests]),
        "latency_ms": spread([r.last_s - r.begin_s for r in requests]),
    }


def _timeline(recorder: Recorder, spans: Sequence[Span]) -> list[dict[str, Any]] | None:
    """What happened until the first token of a typical request; None where requests ran at the same time."""
    ordered = sorted(recorder.requests, key=lambda r: r.begin_s)
    if not ordered or any(later.begin_s < earlier.last_s for earlier, later in pairwise(ordered)):
        return None
    typical = sorted(ordered, key=lambda r: r.first_s - r.begin_s)[len(ordered) // 2]
    inside = [span for span in spans if span.end_s > typical.begin_s and span.begin_s < typical.first_s]
    rows = [
        {
            "begin_ms": _ms(span.begin_s - typical.begin_s),
            "end_ms": _ms(span.end_s - typical.begin_s),
            "lane": span.lane,
            "stage": span.stage,
        }
        for span in sorted(inside, key=lambda span: (span.begin_s, -span.end_s))
    ]
    first = {"begin_ms": _ms(typical.first_s - typical.begin_s), "end_ms": _ms(typical.first_s - typical.begin_s)}
    return [*rows, {**first, "lane": "", "stage": "first token"}]


def render(report: Mapping[str, Any]) -> str:
    """The breakdown as text."""
    wall_ms = report["wall_ms"]
    lines = [f"wall {wall_ms:.1f} ms"]
    titles = {"host": "the thread that steps", "readers": "other threads", "device": "the device"}
    for part, title in titles.items():
        if part in report:
            lines += ["", f"{title:<28}{'count':>8}{'ms':>11}{'of wall':>9}{'launch-bound ms':>17}"]
            lines += [_stage_line(stage, row, wall_ms) for stage, row in report[part].items()]
    for part in ("media", "steps", "requests"):
        if part in report:
            lines += ["", f"{part:<28}"]
            lines += [f"  {name:<26}{_shown(value)}" for name, value in report[part].items() if value is not None]
    if report["timeline"]:
        lines += ["", f"{'from ms':>9}{'to ms':>10}  until the first token"]
        lines += [
            f"{row['begin_ms']:>9.2f}{row['end_ms']:>10.2f}  {row['lane']:<20} {row['stage']}"
            for row in report["timeline"]
        ]
    return "\n".join(lines)


def _stage_line(stage: str, row: Mapping[str, float], wall_ms: float) -> str:
    late = f"{row['launch_bound_ms']:>17.1f}" if "launch_bound_ms" in row else ""
    return f"  {stage:<26}{row.get('count', ''):>8}{row['ms']:>11.1f}{row['ms'] / wall_ms:>9.1%}{late}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {number}" for name, number in value.items())
    return str(value)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
