"""Scenes made from other scenes, for questions about two pictures."""

from __future__ import annotations

import copy
import random

from opsin.demo import pack
from opsin.demo.scenes.colors import sample_color, shade_for
from opsin.demo.scenes.held_out import is_held_out_combination, is_held_out_pair
from opsin.demo.scenes.pictograms import make_pictogram
from opsin.demo.scenes.scene import SHAPES, Scene, Split, Thing
from opsin.demo.scenes.shapes import make_shape

_LOOK_ALIKE = ({"circle", "oval"}, {"square", "rectangle"})
"""Shapes that must not replace one another: the difference would be hard to see."""


def changed(scene: Scene, rng: random.Random, split: Split) -> Scene | None:
    """Return the scene with one visible thing recoloured, replaced or removed; None where nothing can be."""
    other = copy.deepcopy(scene)
    things = other.solid
    if not things:
        return None
    thing = rng.choice(things)
    place = other.things.index(thing)
    draw = rng.random()
    if draw < 0.25 and len(things) > 1:
        del other.things[place]
        return other
    if thing.kind == "shape":
        new = _other_shape(other, thing, rng, split, recolor=draw < 0.65)
    else:
        new = _other_pictogram(other, thing, rng, split)
    if new is None:
        return None
    other.things[place] = new
    return other


def _size_of(thing: Thing, aspect: float) -> float:
    return max(0.14, min(thing.w * min(1.0, aspect), thing.h * min(1.0, 1 / aspect)))


def _other_shape(scene: Scene, thing: Thing, rng: random.Random, split: Split, *, recolor: bool) -> Thing | None:
    """Return a shape for the place of ``thing``, with another colour or another form."""
    aspect = scene.width / scene.height
    for _ in range(20):
        name, color = thing.name, thing.color or ""
        if recolor:
            color = sample_color(rng, scene.background) or color
        else:
            name = rng.choice(SHAPES)
        if (name, color) == (thing.name, thing.color) or {name, thing.name} in _LOOK_ALIKE:
            continue
        if split == "train" and is_held_out_combination(name, color):
            continue
        if name == thing.name:
            new = copy.copy(thing)
            new.color, new.rgb = color, shade_for(rng, color, scene.background)
        else:
            new = make_shape(rng, name, color, _size_of(thing, aspect), aspect, scene.background)
        new.x = min(max(thing.x, new.w / 2), 1 - new.w / 2)
        new.y = min(max(thing.y, new.h / 2), 1 - new.h / 2)
        return new
    return None


def _other_pictogram(scene: Scene, thing: Thing, rng: random.Random, split: Split) -> Thing | None:
    """Return a pictogram that is not in the scene, for the place of ``thing``."""
    aspect = scene.width / scene.height
    present = {other.index for other in scene.pictograms}
    for _ in range(20):
        candidate = rng.choice(pack.pictograms().things)
        clash = any(is_held_out_pair(candidate.index, index) for index in present if index != thing.index)
        if candidate.index in present or (split == "train" and clash):
            continue
        new = make_pictogram(rng, candidate, _size_of(thing, aspect), aspect, (thing.style,))
        new.x, new.y, new.w, new.h = thing.x, thing.y, thing.w, thing.h
        return new
    return None


def redrawn(scene: Scene, rng: random.Random) -> Scene:
    """Return the same scene at another size and with other noise and compression."""
    other = copy.deepcopy(scene)
    scale = rng.uniform(0.8, 1.25)
    other.width, other.height = round(scene.width * scale), round(scene.height * scale)
    other.jpeg_quality = 0 if rng.random() < 0.6 else rng.randint(40, 92)
    other.noise = 0.0 if rng.random() < 0.6 else rng.uniform(2, 12)
    other.seed = rng.getrandbits(31)
    return other
