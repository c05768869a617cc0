"""Words for places: the nine thirds of the picture."""

from __future__ import annotations

from opsin.demo.scenes import Thing

PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


def place_of(thing: Thing) -> tuple[int, int]:
    """Return row and column of the third of the picture that holds a thing's centre."""
    return min(2, int(3 * thing.y)), min(2, int(3 * thing.x))


def place_name(thing: Thing) -> str:
    """Return where a thing is: "top left", "center"."""
    row, column = place_of(thing)
    return PLACES[row][column]


def place_phrase(place: str) -> str:
    """Return "at the top left", "on the left", "in the center"."""
    if place == "center":
        return "in the center"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"
