"""The generator: the same seed gives the same scene, and training never sees what the test holds back."""

from __future__ import annotations

import random

import numpy as np
import pytest

from opsin.demo import pack
from opsin.demo.evaluate import KINDS, examples_of, overlap_with_training, pictogram_examples
from opsin.demo.questions import (
    INTENTS,
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
)
from opsin.demo.scenes import COLOR_NAMES, GRID, RECIPES, Recipe, Split, label_grid, num_labels, render, sample_scene


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_scene_same_seed_same_pixels(recipe: Recipe, split: Split) -> None:
    first, second = (render(sample_scene(random.Random(11), split, recipe)) for _ in range(2))
    assert first.size == second.size
    assert first.tobytes() == second.tobytes()


def test_scene_other_seed_other_pixels() -> None:
    pictures = {render(sample_scene(random.Random(seed), "train", "shapes")).tobytes() for seed in range(8)}
    assert len(pictures) == 8


@pytest.mark.parametrize("split", ["train", "test"])
def test_questions_same_seed_same_words(split: Split) -> None:
    def ask() -> list[list[Question]]:
        rng = random.Random(5)
        return [questions_about(sample_scene(rng, split), rng, split, 6) for _ in range(20)] + [
            sample_pair(rng, split)[2]
        ]

    assert ask() == ask()


def test_overlap_of_training_and_test_is_zero() -> None:
    assert set(overlap_with_training(scenes=600).values()) == {0}


def test_held_out_examples_use_held_out_wordings_only() -> None:
    openings = {text.split("{")[0].split('"')[0] for _, held_out in PHRASES.values() for text in held_out}
    for example in examples_of("count", 20, seed=1) + examples_of("relation", 20, seed=1):
        assert any(example.question.startswith(opening) for opening in openings)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_every_kind_exist(kind: str) -> None:
    examples = examples_of(kind, 3, seed=3)
    assert len(examples) == 3
    assert all(example.answer and "\0" not in example.answer for example in examples)


def test_pictograms_are_several_hundred_distinct_names() -> None:
    things = pack.pictograms().things
    assert len({thing.name for thing in things}) == len(things) >= 300
    assert all(set(thing.tiles) & set(pack.pictograms().training_styles) for thing in things)
    for thing in things:
        for tiles in thing.tiles.values():
            for tile in tiles:
                assert np.asarray(tile.getchannel("A")).mean() > 8, thing.name


def test_pictogram_examples_ask_for_each_name_once() -> None:
    examples = pictogram_examples(seed=0)
    assert len({example.answer for example in examples}) == len(pack.pictograms().things)


def test_fonts_draw_every_letter() -> None:
    for held_out in (False, True):
        for name in pack.fonts(held_out=held_out):
            font = pack.font(name, 32, held_out=held_out)
            assert all(font.getlength(letter) > 0 for letter in "AZaz09"), name


@pytest.mark.parametrize("split", ["train", "test"])
def test_label_grid_names_what_is_drawn(split: Split) -> None:
    rng = random.Random(2)
    for _ in range(40):
        scene = sample_scene(rng, split)
        what, color = label_grid(scene)
        assert what.shape == color.shape == (GRID, GRID)
        assert what.max() < num_labels()
        assert color.max() <= len(COLOR_NAMES)
        assert (what.max() > 0) == bool(scene.things)


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
