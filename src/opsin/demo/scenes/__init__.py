"""Scenes of shapes, pictograms and printed text, drawn from a seed. Questions are in :mod:`opsin.demo.questions`.

From data to pixels:

- ``scene``: what a scene holds. ``held_out``: what training keeps back for the test.
- ``sampling``: a whole scene at random. ``recipes``: its things. ``layout``: their places. ``variants``: a scene once
  more, the same or with one thing changed.
- ``shapes``, ``pictograms``, ``lettering``: one kind of thing each, made at random and drawn. ``colors`` and
  ``backgrounds`` likewise.
- ``render``: the picture, with its ``noise`` and compression. ``labels``: what each patch of it shows.
"""

from opsin.demo.scenes.backgrounds import TRAINING_BACKGROUNDS, draw_background, sample_background
from opsin.demo.scenes.colors import COLOR_NAMES, random_rgb
from opsin.demo.scenes.held_out import HELD_OUT_BACKGROUNDS, is_held_out_combination, is_held_out_pair
from opsin.demo.scenes.labels import CHARACTERS, GRID, label_grid, num_labels
from opsin.demo.scenes.render import render
from opsin.demo.scenes.sampling import RECIPE_WEIGHTS, sample_scene
from opsin.demo.scenes.scene import (
    MAX_SIDE,
    MOST_THINGS,
    RECIPES,
    RGB,
    SHAPES,
    TEXT_KINDS,
    Background,
    Recipe,
    Scene,
    Split,
    TextKind,
    Thing,
)

__all__ = [
    "CHARACTERS",
    "COLOR_NAMES",
    "GRID",
    "HELD_OUT_BACKGROUNDS",
    "MAX_SIDE",
    "MOST_THINGS",
    "RECIPES",
    "RECIPE_WEIGHTS",
    "RGB",
    "SHAPES",
    "TEXT_KINDS",
    "TRAINING_BACKGROUNDS",
    "Background",
    "Recipe",
    "Scene",
    "Split",
    "TextKind",
    "Thing",
    "draw_background",
    "is_held_out_combination",
    "is_held_out_pair",
    "label_grid",
    "num_labels",
    "random_rgb",
    "render",
    "sample_background",
    "sample_scene",
]
