"""Shapes: how one is made at random, its corners, and its drawing."""

from __future__ import annotations

import math
import random
from functools import cache

from PIL import ImageDraw

from opsin.demo.scenes.colors import shade_for
from opsin.demo.scenes.layout import shorter_side
from opsin.demo.scenes.scene import DIRECTIONS, Background, Thing

Point = tuple[float, float]


def make_shape(rng: random.Random, name: str, color: str, size: float, aspect: float, background: Background) -> Thing:
    """Make a shape whose larger side is about ``size`` of the picture's shorter; ``aspect`` is width over height."""
    angle, stretch, direction = rng.uniform(-10, 10), 1.0, None
    if name in ("rectangle", "oval"):
        # Elongated enough to stay so when the picture is stretched to a square, which divides the ratio by ``aspect``.
        stretch = rng.uniform(1.9, 3.0)
        lying, standing = stretch / aspect >= 1.55, stretch * aspect >= 1.55
        if not lying or (standing and rng.random() < 0.5):
            stretch = 1 / stretch
        angle *= 0.6
    elif name == "diamond":
        stretch = rng.uniform(0.62, 1.05)
        angle *= 0.5
    elif name in ("triangle", "heart", "star", "pentagon", "hexagon"):
        stretch = rng.uniform(0.85, 1.18)
    elif name == "cross":
        angle *= 0.6
    elif name == "arrow":
        direction = rng.choice(DIRECTIONS)
        stretch = rng.uniform(1.2, 1.9)
        if direction in ("up", "down"):
            stretch = 1 / stretch
    if name == "triangle" and rng.random() < 0.15:
        angle += rng.uniform(-180, 180)
    width, height = (size, size / stretch) if stretch >= 1 else (size * stretch, size)
    grow = 1.0 if name == "circle" else _growth(angle)
    short_w, short_h = shorter_side(aspect)
    draw = rng.random()
    style = "fill" if draw < 0.6 else "outline" if draw < 0.82 else "bordered"
    if size < 0.13 and style == "outline":
        style = "fill"
    return Thing(
        kind="shape",
        name=name,
        color=color,
        w=width * grow * short_w,
        h=height * grow * short_h,
        rgb=shade_for(rng, color, background),
        angle=angle,
        direction=direction,
        style=style,
        stretch=stretch,
        stroke=rng.uniform(0.022, 0.05),
        wobble=rng.getrandbits(20) if style == "outline" and rng.random() < 0.5 else 0,
    )


def _growth(angle: float) -> float:
    """Return how much more room a shape is given for being turned."""
    return 1 + 0.35 * min(abs(math.sin(math.radians(abs(angle)))), 0.5)


def _polygon(corners: int, start: float) -> list[Point]:
    turns = [start + 2 * math.pi * k / corners for k in range(corners)]
    return [(math.cos(turn), math.sin(turn)) for turn in turns]


def _star() -> list[Point]:
    outer, inner = _polygon(5, -math.pi / 2), _polygon(5, -math.pi / 2 + math.pi / 5)
    return [point for tip, (x, y) in zip(outer, inner, strict=True) for point in (tip, (0.42 * x, 0.42 * y))]


def _heart() -> list[Point]:
    def point(t: float) -> Point:
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        return math.sin(t) ** 3, -y / 16

    return [point(2 * math.pi * k / 40) for k in range(40)]


def _cross(a: float = 0.34) -> list[Point]:
    upper = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    return [*upper, (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


@cache
def _outline(name: str) -> tuple[Point, ...]:
    """Corners of a shape in a box from -1 to 1, y downwards."""
    if name in ("circle", "oval"):
        points = _polygon(40, 0.0)
    elif name in ("square", "rectangle"):
        points = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif name == "triangle":
        points = [(0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif name == "diamond":
        points = [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)]
    elif name == "pentagon":
        points = _polygon(5, -math.pi / 2)
    elif name == "hexagon":
        points = _polygon(6, 0.0)
    elif name == "star":
        points = _star()
    elif name == "heart":
        points = _heart()
    elif name == "cross":
        points = _cross()
    elif name == "arrow":
        points = [(-1, -0.38), (0.1, -0.38), (0.1, -1), (1, 0), (0.1, 1), (0.1, 0.38), (-1, 0.38)]
    else:
        raise ValueError(f"unknown shape {name!r}")
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    mid_x, mid_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    half_x, half_y = (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
    return tuple(((x - mid_x) / half_x, (y - mid_y) / half_y) for x, y in points)


def _corners(thing: Thing, width: int, height: int) -> list[Point]:
    """Corners of a shape in pixels."""
    points = _outline(thing.name)
    box_w, box_h = thing.w * width, thing.h * height
    if thing.name == "arrow":
        for _ in range(DIRECTIONS.index(thing.direction or "right")):
            points = tuple((-y, x) for x, y in points)
    if thing.name == "circle":
        half_w = half_h = min(box_w, box_h) / 2
    else:
        # The largest box of this stretch that stays inside the extent once turned.
        grow = _growth(thing.angle)
        half_h = min(box_h, box_w / thing.stretch) / 2
        half_w = half_h * thing.stretch
        half_w, half_h = half_w / grow, half_h / grow
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    cx, cy = thing.x * width, thing.y * height
    result = []
    for x, y in points:
        px, py = x * half_w, y * half_h
        result.append((cx + cos * px + sin * py, cy - sin * px + cos * py))
    return result


def _wobbly(points: list[Point], seed: int, amount: float) -> list[Point]:
    """Subdivide a closed line and push its points about, as a hand would."""
    rng = random.Random(seed)
    result = []
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        steps = 1 if len(points) > 20 else 4
        for k in range(steps):
            t = k / steps
            jitter_x, jitter_y = rng.gauss(0, amount), rng.gauss(0, amount)
            result.append((x0 + t * (x1 - x0) + jitter_x, y0 + t * (y1 - y0) + jitter_y))
    return result


def draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, width: int, height: int) -> None:
    """Draw a shape onto a canvas of ``width`` by ``height`` pixels."""
    points = _corners(thing, width, height)
    size = min(thing.w * width, thing.h * height)
    if thing.style == "outline":
        if thing.wobble:
            points = _wobbly(points, thing.wobble, 0.012 * size)
        stroke = max(2, round(thing.stroke * min(width, height)))
        draw.line([*points, points[0], points[1]], fill=thing.rgb, width=stroke, joint="curve")
        return
    draw.polygon(points, fill=thing.rgb)
    if thing.style == "bordered":
        dark = (20, 20, 20) if sum(thing.rgb) > 150 else (235, 235, 235)
        stroke = max(1, round(0.25 * thing.stroke * min(width, height)))
        draw.line([*points, points[0], points[1]], fill=dark, width=stroke, joint="curve")
