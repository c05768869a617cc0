"""From a scene to its picture: background, things in order, then noise and compression."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageDraw

from opsin.demo.scenes.backgrounds import draw_background
from opsin.demo.scenes.lettering import draw_text
from opsin.demo.scenes.noise import noise_window
from opsin.demo.scenes.pictograms import draw_pictogram
from opsin.demo.scenes.scene import Scene
from opsin.demo.scenes.shapes import draw_shape


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture of ``scene.width`` by ``scene.height`` pixels."""
    return _degrade(_compose(scene), scene)


def _compose(scene: Scene) -> Image.Image:
    width, height = scene.width, scene.height
    # Shapes are polygons without antialiasing; drawn twice as large and reduced they get it.
    factor = 2 if scene.smooth and max(width, height) <= 320 and scene.shapes else 1
    canvas = draw_background(scene.background, width, height)
    if factor == 2:
        canvas = canvas.resize((2 * width, 2 * height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        if thing.kind == "shape":
            draw_shape(draw, thing, canvas.width, canvas.height)
        elif thing.kind == "pictogram":
            draw_pictogram(canvas, thing)
        else:
            draw_text(canvas, thing)
    return canvas.reduce(2) if factor == 2 else canvas


def _degrade(picture: Image.Image, scene: Scene) -> Image.Image:
    """Add the scene's noise and compression."""
    if scene.noise:
        pixels = np.asarray(picture, dtype=np.float32)
        pixels = pixels + scene.noise * noise_window(random.Random(scene.seed), scene.height, scene.width)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if scene.jpeg_quality:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=scene.jpeg_quality)
        picture = Image.open(buffer).convert("RGB")
    return picture
