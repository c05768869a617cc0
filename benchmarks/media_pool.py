"""Pictures to pixels: milliseconds of a core by stage, and pictures per second through the media pool.

    python benchmarks/media_pool.py [--workers 1,2] [--width 1024 --height 768] [--json FILE]

Photo-like JPEGs become what Qwen2-VL makes of them: sides rounded to multiples of 28 by a bicubic resize, which for
1024x768 makes 1036x756. The stages are run one by one on this thread; the pool runs all of them in its workers, and
bytes go in and pixels come out through shared memory. "0 workers" is the pool's one background thread. "Decode only" is
what is left of it where a GPU resizes; what that takes is shown where there is one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opsin.cli import environment
from opsin.cli.synthetic import photo
from opsin.config import MediaConfig
from opsin.media.ops import make_frames
from opsin.media.pool import MAX_PENDING, MediaPool
from opsin.media.raw import raw_plan
from opsin.media.source import EncodedPicture, open_encoded
from opsin.media.turbo import open_turbo
from opsin.types import PixelPlan, Resize, View

_NUM_PICTURES = 16
_ROUNDS = 5
_QWEN_UNIT = 28


def qwen_plan(width: int, height: int) -> PixelPlan:
    """The whole picture, with sides that are multiples of 28."""
    sides = [max(1, round(side / _QWEN_UNIT)) * _QWEN_UNIT for side in (width, height)]
    return PixelPlan(width, height, (View(ops=(Resize(sides[0], sides[1]),), height=sides[1], width=sides[0]),))


def as_it_is(plan: PixelPlan) -> PixelPlan:
    """What workers are asked for where the device resizes."""
    raw = raw_plan(plan, plan.width * plan.height * 4)
    assert raw is not None, "the picture has Qwen's sides already; choose others"
    return raw


def stages(sources: list[EncodedPicture], datas: list[bytes], plan: PixelPlan) -> dict[str, float]:
    """Milliseconds per picture on one core: the least of some rounds."""
    config = MediaConfig()
    decoded = [source.decode() for source in sources]
    (view,) = plan.views
    raw = as_it_is(plan)
    out, raw_out = np.empty(plan.num_bytes, np.uint8), np.empty(raw.num_bytes, np.uint8)
    resized = [picture.resize((view.width, view.height), Image.Resampling.BICUBIC) for picture in decoded]
    found = {
        "open (header, digest)": _least_ms([lambda data=data: open_encoded(data, config) for data in datas]),
        "decode": _least_ms([source.decode for source in sources]),
        "resize": _least_ms(
            [lambda p=p: p.resize((view.width, view.height), Image.Resampling.BICUBIC) for p in decoded]
        ),
        "copy out": _least_ms([lambda p=p: np.copyto(out, np.asarray(p).reshape(-1)) for p in resized]),
        "all": _least_ms([lambda s=s: make_frames([s.decode()], plan, out) for s in sources]),
        "decode only": _least_ms([lambda s=s: make_frames([s.decode()], raw, raw_out) for s in sources]),
    }
    turbo = open_turbo()
    if turbo is not None:
        fill = turbo.fill
        found["decode only, simplejpeg"] = _least_ms([lambda s=s: fill(s.data, s.header, raw_out) for s in sources])
    return found


def on_device(source: EncodedPicture, plan: PixelPlan) -> dict[str, float] | None:
    """Milliseconds that one decoded picture takes to the device and through its resize, there and of this thread."""
    import torch

    from opsin.kernels import select
    from opsin.runner.executor import Pixels
    from opsin.runner.pixels import PixelLoader

    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda")
    loader = PixelLoader(select(device).resample, device)
    pixels = Pixels(np.asarray(source.decode()).reshape(-1), is_raw=True)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    host_ms: list[float] = []
    device_ms: list[float] = []
    for _ in range(_ROUNDS * 10):
        torch.cuda.synchronize()
        begin.record()
        begun_s = time.perf_counter()
        loader.load(pixels, plan)
        host_ms.append(1e3 * (time.perf_counter() - begun_s))
        end.record()
        end.synchronize()
        device_ms.append(begin.elapsed_time(end))
    return {"this thread": round(min(host_ms), 3), "until it is done": round(min(device_ms), 3)}


def pictures_per_second(pool: MediaPool, sources: list[EncodedPicture], plan: PixelPlan, count: int) -> float:
    begun_s = time.perf_counter()
    given = done = 0
    while done < count:
        for job_id in range(given, min(count, done + MAX_PENDING)):
            pool.submit(job_id, sources[job_id % len(sources)], plan)
        given = min(count, done + MAX_PENDING)
        finished = pool.wait()
        assert all(item.error is None for item in finished)
        done += len(finished)
    return count / (time.perf_counter() - begun_s)


def _least_ms(calls: list[Callable[[], object]]) -> float:
    rounds: list[float] = []
    for _ in range(_ROUNDS):
        begun_s = time.perf_counter()
        for call in calls:
            call()
        rounds.append((time.perf_counter() - begun_s) / len(calls))
    return round(1e3 * min(rounds), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="0,1,2", help="comma-separated")
    parser.add_argument("--count", type=int, default=300, help="pictures through the pool")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=768)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    datas = [photo(args.width, args.height, seed) for seed in range(_NUM_PICTURES)]
    plan = qwen_plan(args.width, args.height)
    sources = [open_encoded(data, MediaConfig()) for data in datas]
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "picture": f"{args.width}x{args.height}, {sum(map(len, datas)) // len(datas)} bytes on average",
        "ms_per_picture": stages(sources, datas, plan),
        "pictures_per_s": {},
    }
    if (resized := on_device(sources[0], plan)) is not None:
        report["ms_to_the_device_and_resized"] = resized
    for workers in map(int, args.workers.split(",")):
        with MediaPool(MediaConfig(media_workers=workers)) as pool:
            pictures_per_second(pool, sources, plan, 4 * max(1, workers))  # every worker has started
            for what, wanted in (("", plan), (", decode only", as_it_is(plan))):
                rate = pictures_per_second(pool, sources, wanted, args.count)
                report["pictures_per_s"][f"{workers} workers{what}"] = round(rate, 1)
    print(environment.table(report))
    if args.json:
        report["environment"] = environment.collect()
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
