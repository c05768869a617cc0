"""Questions: worded from the right side of the split, in right English, with answers that are true."""

from __future__ import annotations

import random
import re

import pytest

from opsin.demo.evaluate import examples_of
from opsin.demo.questions import (
    INTENTS,
    KINDS,
    PHRASES,
    Question,
    caption_facts,
    caption_of,
    join,
    plain,
    plural,
    questions_about,
    recall,
    sample_pair,
    with_article,
    wordings,
)
from opsin.demo.scenes import COLOR_NAMES, Split, sample_scene


@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_same_seed_same_words(split: Split) -> None:
    def ask() -> list[list[Question]]:
        rng = random.Random(5)
        return [questions_about(sample_scene(rng, split), rng, split, 6) for _ in range(20)] + [
            sample_pair(rng, split)[2]
        ]

    assert ask() == ask()


def test_held_out_examples_use_held_out_wordings_only() -> None:
    openings = {text.split("{")[0].split('"')[0] for _, held_out in PHRASES.values() for text in held_out}
    for example in examples_of("count", 20, seed=1) + examples_of("relation", 20, seed=1):
        assert any(example.question.startswith(opening) for opening in openings)


def test_wordings_of_no_intent_are_given_twice() -> None:
    topics = [topic for topic in vars(wordings).values() if hasattr(topic, "WORDINGS")]
    assert len(topics) == 8
    assert sum(len(topic.WORDINGS) for topic in topics) == len(PHRASES)


@pytest.mark.parametrize("intent", PHRASES)
def test_wordings_of_training_and_test_have_the_same_slots(intent: str) -> None:
    def slots(texts: tuple[str, ...]) -> set[str]:
        return {slot.lower() for text in texts for slot in re.findall(r"{(\w+)}", text)} - {"pic", "color"}

    training, held_out = PHRASES[intent]
    assert slots(training) == slots(held_out)
    assert not set(training) & set(held_out)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_every_kind_exist(kind: str) -> None:
    examples = examples_of(kind, 3, seed=3)
    assert len(examples) == 3
    assert all(example.answer and "\0" not in example.answer for example in examples)


def test_caption_recall_of_itself_is_one_and_of_another_is_less() -> None:
    rng = random.Random(4)
    captions = [plain(caption_of(sample_scene(rng, "test", "shapes"))) for _ in range(6)]
    assert all(recall(caption, caption) == 1.0 for caption in captions)
    assert recall(captions[0], captions[1]) < 1.0


def test_caption_facts_split_things_places_and_background() -> None:
    facts = caption_facts("A red circle at the top, two dogs and fries on the left. The background is white.")
    assert facts == ["a red circle", "a red circle at the top", "two dogs", "fries", "fries on the left", *facts[-1:]]
    assert facts[-1] == "the background is white"


def test_counting_question_counts_what_is_there() -> None:
    rng = random.Random(9)
    for _ in range(60):
        scene = sample_scene(rng, "train", "count")
        question = INTENTS["count"](scene, rng, "train")
        if question is not None and " things" in question.question:
            colors = [name for name in COLOR_NAMES if f"{name} things" in question.question]
            expected = sum(not colors or thing.color == colors[0] for thing in scene.things)
            assert int(question.answer) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("circle", "circles"), ("fox", "foxes"), ("cherry", "cherries"), ("wolf", "wolves"), ("key", "keys")],
)
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


@pytest.mark.parametrize(("noun", "expected"), [("apple", "an apple"), ("unicorn", "a unicorn"), ("dog", "a dog")])
def test_article(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


def test_join_reads_as_english() -> None:
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"
