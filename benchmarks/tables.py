"""Figures of several engines side by side, with the ratio in which opsin is ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """A row: ``key`` in the reports, and which way is better; None compares nothing."""

    key: str
    title: str
    is_rate: bool | None


def best(value: Any, is_rate: bool) -> float:
    """Of several runs the better one."""
    values = value if isinstance(value, list) else [value]
    return max(values) if is_rate else min(values)


def side_by_side(figures: Sequence[Figure], reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a column per engine, and per peer how many times better opsin is."""
    peers = [name for name in reports if name != "opsin"] if "opsin" in reports else []
    width = max([len(figure.title) for figure in figures], default=0)
    head = "".join(f"{name:>20}" for name in reports) + "".join(f"{'opsin / ' + peer:>21}" for peer in peers)
    lines = [" " * width + head]
    for figure in figures:
        if not any(figure.key in report for report in reports.values()):
            continue
        cells = "".join(f"{_shown(report.get(figure.key)):>20}" for report in reports.values())
        ratios = "".join(f"{_ratio(figure, reports, peer):>21}" for peer in peers)
        lines.append(f"{figure.title:<{width}}{cells}{ratios}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return "not run"
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def _ratio(figure: Figure, reports: Mapping[str, Mapping[str, Any]], peer: str) -> str:
    ours, theirs = reports["opsin"].get(figure.key), reports[peer].get(figure.key)
    if figure.is_rate is None or not ours or not theirs:
        return ""
    ratio = best(ours, figure.is_rate) / best(theirs, figure.is_rate)
    return f"{ratio if figure.is_rate else 1 / ratio:.2f}"
