"""All questions about one scene, and how often training asks each."""

from __future__ import annotations

import random

from opsin.demo.questions.comparing import ask_comparison
from opsin.demo.questions.counting import ask_count
from opsin.demo.questions.describing import ask_caption, ask_list
from opsin.demo.questions.existence import ask_absent, ask_exist
from opsin.demo.questions.naming import ask_background, ask_category, ask_color, ask_shape, ask_what
from opsin.demo.questions.placing import ask_direction, ask_position, ask_relation
from opsin.demo.questions.question import Intent, Question
from opsin.demo.questions.reading import ask_read
from opsin.demo.scenes import Scene, Split

INTENTS: dict[str, Intent] = {
    "name": ask_what,
    "category": ask_category,
    "shape": ask_shape,
    "color": ask_color,
    "background": ask_background,
    "count": ask_count,
    "position": ask_position,
    "direction": ask_direction,
    "relation": ask_relation,
    "comparison": ask_comparison,
    "exist": ask_exist,
    "absent": ask_absent,
    "read": ask_read,
    "list": ask_list,
    "caption": ask_caption,
}

INTENT_WEIGHTS: dict[str, float] = {
    "name": 4.0,
    "category": 1.6,
    "shape": 1.0,
    "color": 1.0,
    "background": 1.0,
    "count": 1.8,
    "position": 1.4,
    "direction": 2.2,
    "relation": 2.8,
    "comparison": 2.6,
    "exist": 1.2,
    "absent": 0.4,
    "read": 4.0,
    "list": 0.9,
    "caption": 0.9,
}
"""How often training tries each intent on a scene; a scene bears only some."""


def questions_about(
    scene: Scene, rng: random.Random, split: Split, count: int, weights: dict[str, float] = INTENT_WEIGHTS
) -> list[Question]:
    """Ask up to ``count`` different questions about one scene."""
    names, odds = list(weights), list(weights.values())
    asked: dict[str, Question] = {}
    for name in rng.choices(names, odds, k=3 * count):
        question = INTENTS[name](scene, rng, split)
        if question is not None:
            asked.setdefault(question.question, question)
        if len(asked) == count:
            break
    return list(asked.values())
