"""The generator of scenes: the same seed gives the same scene, and training never sees what the test holds back."""

from __future__ import annotations

import random

import numpy as np
import pytest

from opsin.demo import pack
from opsin.demo.evaluate import overlap_with_training, pictogram_examples
from opsin.demo.scenes import COLOR_NAMES, GRID, RECIPES, Recipe, Split, label_grid, num_labels, render, sample_scene
from opsin.demo.scenes.variants import changed, redrawn


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_scene_same_seed_same_pixels(recipe: Recipe, split: Split) -> None:
    first, second = (render(sample_scene(random.Random(11), split, recipe)) for _ in range(2))
    assert first.size == second.size
    assert first.tobytes() == second.tobytes()


def test_scene_other_seed_other_pixels() -> None:
    pictures = {render(sample_scene(random.Random(seed), "train", "shapes")).tobytes() for seed in range(8)}
    assert len(pictures) == 8


def test_overlap_of_training_and_test_is_zero() -> None:
    assert set(overlap_with_training(scenes=600).values()) == {0}


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


@pytest.mark.parametrize("recipe", ["shapes", "pictograms"])
def test_changed_scene_differs_in_one_thing(recipe: Recipe) -> None:
    rng = random.Random(6)
    added = set()
    for _ in range(40):
        scene = sample_scene(rng, "train", recipe)
        other = changed(scene, rng, "train")
        if other is not None:
            kept = [thing for thing in scene.things if thing in other.things]
            assert len(kept) == len(scene.things) - 1
            added.add(len(other.things) - len(kept))
    assert added == {0, 1}


def test_redrawn_scene_holds_the_same_things() -> None:
    scene = sample_scene(random.Random(1), "train", "shapes")
    other = redrawn(scene, random.Random(2))
    assert other.things == scene.things
    assert render(other).tobytes() != render(scene).tobytes()
