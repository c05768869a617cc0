"""Photo-like JPEGs that no two requests share, made once and kept in a folder."""

from __future__ import annotations

import multiprocessing
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

Sizes = tuple[tuple[int, int], ...]

MIXED: Sizes = ((448, 448), (640, 480), (1024, 768))
VGA: Sizes = ((640, 480),)
XGA: Sizes = ((1024, 768),)


def make(folder: Path, tag: str, count: int, sizes: Sizes) -> list[Path]:
    """``count`` files, the sizes in turn; equal tags give equal pictures."""
    return make_sets(folder, {tag: (count, sizes)})[tag]


def make_sets(folder: Path, sets: Mapping[str, tuple[int, Sizes]]) -> dict[str, list[Path]]:
    """The files of several tags, made by all cores together."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, list[Path]] = {}
    missing: list[tuple[Path, int, int, tuple[int, int]]] = []
    for tag, (count, sizes) in sets.items():
        paths[tag] = []
        for index in range(count):
            width, height = sizes[index % len(sizes)]
            path = folder / f"{tag}_{index:04d}_{width}x{height}.jpg"
            paths[tag].append(path)
            if not path.exists():
                missing.append((path, width, height, (zlib.crc32(tag.encode()), index)))
    if missing:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
            list(processes.map(_write, missing, chunksize=4))
    return paths


def _write(job: tuple[Path, int, int, tuple[int, int]]) -> None:
    from opsin.cli.synthetic import photo  # here, since peers' processes import this file without opsin

    path, width, height, seed = job
    path.write_bytes(photo(width, height, seed=seed))
