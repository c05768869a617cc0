"""What a question is: its kind, its words and its true answer.

An answer may hold stretches between two ``SPELLED`` marks: printed text, which training spells letter by letter so that
reading never depends on how the tokenizer cuts a word. :func:`plain` removes the marks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from opsin.demo.scenes import Scene, Split

SPELLED = "\x00"

KINDS = (
    "name",
    "category",
    "shape",
    "color",
    "background",
    "count",
    "position",
    "direction",
    "relation",
    "comparison",
    "exist",
    "absent",
    "read word",
    "read number",
    "read letters",
    "list",
    "caption",
    "pair more",
    "pair which",
    "pair same",
    "pair ask",
    "chat",
)
"""Task kinds, in the order of the published table."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its true answer."""

    kind: str
    question: str
    answer: str


Intent = Callable[[Scene, random.Random, Split], Question | None]
"""Asks one question about a scene, or returns None where the scene cannot bear it."""


def plain(answer: str) -> str:
    """Return an answer as a reader sees it."""
    return answer.replace(SPELLED, "")


def spelled(text: str) -> str:
    """Mark printed text within an answer."""
    return f"{SPELLED}{text}{SPELLED}"


def yes_no(truth: bool) -> str:
    """Return "yes" or "no"."""
    return "yes" if truth else "no"
