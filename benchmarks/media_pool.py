"""Pictures per second through the media pool: worker processes against the one background thread.

    python benchmarks/media_pool.py --workers 2

Decodes a photo-like JPEG and makes one 336 x 336 CLIP view of it, over and over.
"""

from __future__ import annotations

import argparse
import io
import time

import numpy as np
from PIL import Image, ImageFilter

from opsin.config import MediaConfig
from opsin.media.pool import MediaPool
from opsin.media.source import PictureSource, open_encoded
from opsin.types import Crop, PixelPlan, Resize, View


def photo_like_jpeg(width: int, height: int) -> bytes:
    """Blurred noise over coarse blobs: about the file size of a photograph, at quality 85."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 64, width // 64, 3), dtype=np.uint8))
    blobs = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    Image.blend(blobs, noise.filter(ImageFilter.GaussianBlur(1)), 0.25).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def clip_plan(width: int, height: int, edge: int = 336) -> PixelPlan:
    """Short edge to ``edge``, then the middle square: what LLaVA-1.5 makes of a picture."""
    scale = edge / min(width, height)
    resized = Resize(int(width * scale), int(height * scale))
    crop = Crop((resized.width - edge) // 2, (resized.height - edge) // 2, edge, edge)
    return PixelPlan(width=width, height=height, views=(View(ops=(resized, crop), height=edge, width=edge),))


def pictures_per_second(pool: MediaPool, source: PictureSource, plan: PixelPlan, count: int) -> float:
    start = time.perf_counter()
    for job_id in range(count):
        pool.submit(job_id, source, plan)
    done = 0
    while done < count:
        finished = pool.wait()
        assert all(item.error is None for item in finished)
        done += len(finished)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=768)
    arguments = parser.parse_args()

    data = photo_like_jpeg(arguments.width, arguments.height)
    plan = clip_plan(arguments.width, arguments.height)
    print(f"{arguments.width} x {arguments.height} JPEG, {len(data) / 1000:.0f} kB, to 336 x 336")
    for workers in (0, arguments.workers):
        config = MediaConfig(media_workers=workers)
        source = open_encoded(data, config)
        with MediaPool(config) as pool:
            start = time.perf_counter()
            pictures_per_second(pool, source, plan, 1)
            first_s = time.perf_counter() - start
            pictures_per_second(pool, source, plan, 4 * max(1, workers))  # every worker has started
            rate = pictures_per_second(pool, source, plan, arguments.count)
        place = "one thread in process" if workers == 0 else f"{workers} worker processes"
        print(f"{place}: {rate:.0f} pictures/s (the first one after {1000 * first_s:.0f} ms)")


if __name__ == "__main__":
    main()
