"""Photo-like JPEGs that no two requests share, made once and kept in a folder."""

from __future__ import annotations

import multiprocessing
import os
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from opsin.cli.synthetic import photo

MIXED = ((448, 448), (640, 480), (1024, 768))
VGA = ((640, 480),)
XGA = ((1024, 768),)


def make(folder: Path, tag: str, count: int, sizes: tuple[tuple[int, int], ...]) -> list[Path]:
    """``count`` files, the sizes in turn; equal tags give equal pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[Path, int, int, tuple[int, int]]] = []
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        jobs.append(
            (folder / f"{tag}_{index:04d}_{width}x{height}.jpg", width, height, (zlib.crc32(tag.encode()), index))
        )
    missing = [job for job in jobs if not job[0].exists()]
    if missing:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as processes:
            list(processes.map(_write, missing, chunksize=4))
    return [job[0] for job in jobs]


def _write(job: tuple[Path, int, int, tuple[int, int]]) -> None:
    path, width, height, seed = job
    path.write_bytes(photo(width, height, seed=seed))
