"""JPEGs by nvJPEG: pictures per second by backend and batch beside Pillow's on one core, and how far the pixels differ.

    python benchmarks/gpu_decode.py [--sizes 640x480,1024x768] [--batches 1,8,32,64] [--json FILE]

From bytes on the host to RGB on the device that a resize can read, waited for, as ``jpeg_decoder='gpu'`` has it;
Pillow's end in host memory. ``1-8`` is a batch of another size each time. Errors are absolute, of values from 0 to 255,
against Pillow's decode of the same bytes; one photo is written with each chroma sampling. Memory is what nvJPEG holds
on the device in the end, beside torch's. ``hardware`` needs the driver's video library.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from opsin.cli import environment
from opsin.cli.synthetic import photo
from opsin.errors import ConfigError
from opsin.kernels.nvjpeg import Backend, Jpeg, JpegDecoder, load_library
from opsin.media.jpeg import is_plain

_NUM_PICTURES = 32
_SECONDS = 0.4  # of each measurement
_SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def rate(make: Callable[[int], int], *, least_rounds: int = 5) -> dict[str, float]:
    """Pictures per second, and milliseconds per picture, of a call that is told its round and says how many it made.

    Of the median round, since others may want the machine, too.
    """
    for i in range(3):
        make(i)
    times: list[float] = []
    begun_s = time.perf_counter()
    while len(times) < least_rounds or time.perf_counter() - begun_s < _SECONDS:
        round_s = time.perf_counter()
        count = make(len(times))
        times.append((time.perf_counter() - round_s) / count)
    each_s = float(np.median(times))
    return {"pictures_per_s": round(1 / each_s, 1), "ms_per_picture": round(1e3 * each_s, 3)}


def pillow_pixels(jpeg: Jpeg) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg.data)) as image:
        return np.asarray(image.convert("RGB"))


def on_host(jpegs: Sequence[Jpeg]) -> dict[str, float]:
    """What these pictures take without a GPU, and what it takes to see whether they are for one."""

    def decode(round: int) -> int:
        pillow_pixels(jpegs[round % len(jpegs)])
        return 1

    def check(round: int) -> int:
        assert is_plain(*jpegs[round % len(jpegs)])
        return 1

    size = sum(len(jpeg.data) for jpeg in jpegs) // len(jpegs)
    return {**rate(decode), "bytes_per_picture": size, "ms_to_check": rate(check)["ms_per_picture"]}


def samplings(jpeg: Jpeg) -> Iterator[tuple[str, Jpeg]]:
    """The same photo, with each chroma sampling and in grey."""
    image = Image.fromarray(pillow_pixels(jpeg))
    for name, setting in _SAMPLINGS.items():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, subsampling=setting)
        yield name, jpeg._replace(data=buffer.getvalue())
    buffer = io.BytesIO()
    image.convert("L").save(buffer, "JPEG", quality=90)
    yield "grey", jpeg._replace(data=buffer.getvalue())


def pixel_error(decoder: JpegDecoder, jpeg: Jpeg) -> dict[str, float] | str:
    (made,) = decoder.decode([jpeg])
    if made is None:
        return "not taken"
    error = np.abs(made.cpu().numpy().astype(np.int16) - pillow_pixels(jpeg))
    return {"max": int(error.max()), "mean": round(float(error.mean()), 3), "share_off_by_over_3": _share(error > 3)}


def _share(which: np.ndarray) -> float:
    return round(float(which.mean()), 5)


def measure(decoder: JpegDecoder, jpegs: Sequence[Jpeg], batches: Sequence[int]) -> dict[str, Any]:
    """Rates of one backend at one size; what it does not take is told instead."""
    if any(made is None for made in decoder.decode(jpegs)):
        return {"not taken": True}

    def make(size: int, round: int) -> int:
        begin = round * size
        decoder.decode([jpegs[(begin + i) % len(jpegs)] for i in range(size)])
        return size

    rows: dict[str, Any] = {f"batches of {size}": rate(lambda round, size=size: make(size, round)) for size in batches}
    rows["batches of 1-8"] = rate(lambda round: make(1 + round % 8, round))
    return rows


def in_lines(rows: Any) -> Any:
    """Each group of figures in one line."""
    if not isinstance(rows, dict):
        return rows
    if any(isinstance(row, dict) for row in rows.values()):
        return {name: in_lines(row) for name, row in rows.items()}
    return ", ".join(f"{name} {figure}" for name, figure in rows.items())


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


def device_memory() -> int:
    """Bytes in use on the device that are not torch's."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="640x480,1024x768", help="comma-separated")
    parser.add_argument("--batches", default="1,8,32,64", help="comma-separated")
    parser.add_argument("--backends", default="hardware,gpu_hybrid", help=f"of {', '.join(get_args(Backend))}")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    try:
        library = load_library()
    except ConfigError as error:
        parser.error(str(error))

    device = torch.device("cuda")
    torch.zeros(1, device=device)
    sizes = [_size(size) for size in args.sizes.split(",")]
    photos = {size: [Jpeg(photo(*size, seed), *size) for seed in range(_NUM_PICTURES)] for size in sizes}
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "pillow, one core": {f"{w}x{h}": on_host(jpegs) for (w, h), jpegs in photos.items()},
    }
    for backend in args.backends.split(","):
        before = device_memory()
        try:
            decoder = JpegDecoder(library, device, torch.cuda.Stream(device), backends=[backend])
        except ConfigError as error:
            report[backend] = str(error)
            continue
        rows: dict[str, Any] = {}
        for (width, height), jpegs in photos.items():
            rows[f"{width}x{height}"] = measure(decoder, jpegs, [int(size) for size in args.batches.split(",")])
        rows["pixel error"] = {name: pixel_error(decoder, jpeg) for name, jpeg in samplings(photos[sizes[0]][0])}
        rows["MiB_on_device"] = round((device_memory() - before) / 2**20)
        report[backend] = rows
        decoder.close()
    print(environment.table({name: in_lines(rows) for name, rows in report.items()}))
    if args.json:
        report["environment"] = environment.collect()
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
