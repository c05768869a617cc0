"""What the print says."""

from __future__ import annotations

import random

from opsin.demo.questions.phrasing import phrase
from opsin.demo.questions.question import Question, spelled
from opsin.demo.scenes import Scene, Split


def ask_read(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for the printed text, or for one of its two lines."""
    texts = scene.texts
    if not texts:
        return None
    kind = f"read {scene.text_kind}"
    if len(texts) == 2:
        if rng.random() < 0.5 and scene.text_kind == "word":
            line = rng.randrange(2)
            which = rng.choice((("first", "top", "upper"), ("second", "bottom", "lower"))[line])
            return Question(kind, phrase(rng, split, "read line", which=which), spelled(texts[line].name))
        return Question(kind, phrase(rng, split, "read"), spelled(f"{texts[0].name} {texts[1].name}"))
    intent = "read" if rng.random() < 0.5 else kind
    return Question(kind, phrase(rng, split, intent), spelled(texts[0].name))
