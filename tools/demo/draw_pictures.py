"""Draw the sample pictures under ``src/opsin/demo/pictures``: ``python tools/demo/draw_pictures.py``."""

from __future__ import annotations

from pathlib import Path

from opsin.demo import pack
from opsin.demo.scenes import Background, Scene, Thing, render

PICTURES = Path(__file__).resolve().parents[2] / "src" / "opsin" / "demo" / "pictures"
WIDTH, HEIGHT = 480, 360
WHITE, CREAM, SAND = (255, 255, 255), (250, 246, 232), (240, 230, 210)


def shape(name: str, color: str, rgb: tuple[int, int, int], x: float, y: float, size: float) -> Thing:
    """Place a filled shape; ``size`` is its height as a fraction of the picture's."""
    return Thing(kind="shape", name=name, color=color, rgb=rgb, x=x, y=y, w=size * HEIGHT / WIDTH, h=size)


def pictogram(name: str, x: float, y: float, size: float, style: str = "fluent") -> Thing:
    """Place a pictogram by name."""
    thing = next(thing for thing in pack.pictograms().things if thing.name == name)
    return Thing(kind="pictogram", name=name, index=thing.index, style=style, x=x, y=y, w=size * HEIGHT / WIDTH, h=size)


def scene(things: list[Thing], background: Background) -> Scene:
    """Put things on a background."""
    return Scene(things=things, background=background, width=WIDTH, height=HEIGHT, recipe="mixed")


SCENES = {
    "animals.png": scene(
        [
            pictogram("dog", 0.2, 0.25, 0.4),
            pictogram("elephant", 0.75, 0.28, 0.44),
            pictogram("penguin", 0.5, 0.74, 0.42),
        ],
        Background(family="gradient", colors=(CREAM, SAND), seed=3),
    ),
    "lunch.jpg": scene(
        [
            pictogram("pizza", 0.22, 0.3, 0.42, "noto"),
            pictogram("burger", 0.78, 0.3, 0.42, "noto"),
            pictogram("coffee", 0.22, 0.76, 0.4, "noto"),
            pictogram("strawberry", 0.78, 0.76, 0.34, "noto"),
        ],
        Background(family="plain", colors=(WHITE,), color="white"),
    ),
    "shapes.png": scene(
        [
            shape("circle", "red", (220, 30, 30), 0.17, 0.25, 0.3),
            shape("circle", "red", (220, 30, 30), 0.5, 0.22, 0.2),
            shape("star", "blue", (30, 60, 210), 0.8, 0.3, 0.38),
            shape("triangle", "green", (20, 150, 60), 0.24, 0.74, 0.34),
            shape("square", "orange", (255, 140, 0), 0.76, 0.76, 0.3),
        ],
        Background(family="dots", colors=(CREAM, SAND), seed=1),
    ),
    "sign.png": scene(
        [
            Thing(
                kind="text",
                name="OPSIN",
                color="blue",
                rgb=(30, 60, 200),
                style="cabin-700.ttf",
                x=0.5,
                y=0.48,
                w=0.72,
                h=0.4,
            )
        ],
        Background(family="radial", colors=(WHITE, SAND), seed=2),
    ),
}


def main() -> None:
    """Draw every picture."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, content in SCENES.items():
        picture = render(content)
        path = PICTURES / name
        if path.suffix == ".jpg":
            picture.save(path, quality=88)
        else:
            picture.save(path, optimize=True)
        print(f"{name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
