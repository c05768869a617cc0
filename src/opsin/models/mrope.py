"""Positions in three axes (M-RoPE, arXiv:2409.12191): time, rows and columns. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from opsin.errors import RequestError
from opsin.models.picture_rule import given_features
from opsin.models.rule import Positions
from opsin.types import MediaLayout, Modality


def mrope_positions(token_ids: Sequence[int], runs: Iterable[tuple[int, np.ndarray]]) -> Positions:
    """Text counts on all three axes, a run of features as it says. What follows goes on behind the highest position so
    far, as in the papers and in training. Linear in the prompt.

    Args:
        runs: of each run of features, as they come in the prompt: its token, and what its positions count, (3, run
            length) from 0.
    """
    parts: list[np.ndarray] = []
    done = position = 0  # the next token, and its position
    for token_id, counted_3M in runs:
        start = token_ids.index(token_id, done)
        parts.append(_text(position, start - done))
        position += start - done
        parts.append(counted_3M + position)
        position += int(counted_3M.max()) + 1
        done = start + counted_3M.shape[1]
    parts.append(_text(position, len(token_ids) - done))
    return Positions(np.concatenate(parts, axis=1).tolist(), delta=position - done)


def _text(position: int, count: int) -> np.ndarray:
    """(3, count): all axes alike."""
    return np.tile(np.arange(position, position + count), (3, 1))


def counted(grid: Sequence[int], merge: int, tokens_per_second: float | None = None, step_s: float = 0.0) -> np.ndarray:
    """(3, features): time, row and column of each feature of a ``grid`` of patches (time, rows, columns), of which
    ``merge`` x ``merge`` are one feature.

    Args:
        tokens_per_second: time counts so fast, and each of its steps takes ``step_s`` seconds; by default it counts
            the steps.
    """
    steps, rows, cols = grid
    counted_3M = np.indices((steps, rows // merge, cols // merge)).reshape(3, -1)
    if tokens_per_second is not None:
        step = np.float32(tokens_per_second) * np.float32(step_s)  # rounded as torch does
        counted_3M[0] = (counted_3M[0].astype(np.float32) * step).astype(np.int64)
    return counted_3M


def steps_counted(grid: Sequence[int], merge: int) -> list[np.ndarray]:
    """``counted`` of each step in time by itself, for prompts that have text between them."""
    steps, *sides = grid
    return [counted((1, *sides), merge)] * steps


def given_grid(modality: Modality, num_features: int, extras: Mapping[str, Any], merge: int) -> MediaLayout:
    """The layout of features that the caller computed, with the grid (time, rows, columns) in patches that positions
    need: ``merge`` x ``merge`` patches are one feature.

    Raises:
        RequestError: there is no grid beside them, or one of another number of features.
    """
    key = f"{modality}_grid_thw"
    most_frames = "1" if modality == "image" else "time"
    if set(extras) != {key}:
        raise RequestError(
            f"{modality.capitalize()} embeddings of this model come with their grids, since positions depend on "
            f"them: {{'{modality}_embeds': tensor, '{key}': [({most_frames}, rows, columns)]}}, in patches.",
            param="multi_modal_data",
        )
    grid = extras[key]
    fits = math.prod(grid) == num_features * merge**2 and not any(size % merge for size in grid[1:])
    if not fits or (modality == "image" and grid[0] != 1):
        raise RequestError(
            f"{key} is {grid} for {num_features} features; it must be {most_frames} and two multiples of {merge}, "
            f"with a product of {merge**2} times the number of features.",
            param="multi_modal_data",
        )
    return given_features(num_features, tuple(grid))
