"""The media pool: the same tiles from processes as in process, and nothing lost when a decoder hangs or dies."""

from __future__ import annotations

import errno
import gc
import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestFailedError
from opsin.media.pool import INLINE_PIXELS, Finished, MediaPool
from opsin.media.source import PictureSource, open_picture
from opsin.media.spawn import start_worker
from opsin.media.wire import KEPT_BYTES
from opsin.types import PixelPlan, View

from .pictures import encode, photo, slow_png, square_plan

SLOW_EDGE = 5_000


@pytest.fixture(scope="module")
def slow_source() -> PictureSource:
    """Decoding takes some tenths of a second; the file is small."""
    return open_picture(slow_png(SLOW_EDGE), MediaConfig())


@pytest.fixture(scope="module")
def shared_pool() -> Iterator[MediaPool]:
    with MediaPool(MediaConfig(media_workers=2)) as pool:
        yield pool


def sources() -> dict[str, PictureSource]:
    config = MediaConfig()
    rotated = photo(40, 30).getexif()
    rotated[0x0112] = 6
    return {
        "jpeg-rotated": open_picture(encode(photo(40, 30), "JPEG", exif=rotated), config),
        "png-alpha": open_picture(encode(photo(33, 21, "RGBA")), config),
        "pillow-alpha": open_picture(photo(33, 21, "RGBA"), config),
        "pillow-grey": open_picture(photo(5, 90, "L"), config),
        "array": open_picture(np.asarray(photo(64, 48)), config),
        "truncated": open_picture(encode(photo(64, 48))[:-4000], config),
    }


def run(pool: MediaPool, jobs: dict[str, PictureSource], edge: int = 32) -> dict[str, Finished]:
    for job_id, source in jobs.items():
        pool.submit(job_id, source, square_plan(source.size, edge))
    done: dict[str, Finished] = {}
    while len(done) < len(jobs):
        finished = pool.wait(20)
        assert finished, "the pool is stuck"
        done |= {str(item.job_id): item for item in finished}
    return done


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid))


def warm(pool: MediaPool) -> int:
    """The process id of the pool's only worker, idle."""
    run(pool, {"warm": open_picture(photo(4, 4), MediaConfig())})
    [pid] = pool.worker_pids
    return pid


def test_worker_yields_to_the_process_that_started_it() -> None:
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        assert os.getpriority(os.PRIO_PROCESS, warm(pool)) > os.getpriority(os.PRIO_PROCESS, 0)


def test_workers_and_inline_give_identical_results(shared_pool: MediaPool) -> None:
    in_workers = run(shared_pool, sources())
    with MediaPool(MediaConfig(media_workers=0)) as inline_pool:
        inline = run(inline_pool, sources())
        assert inline_pool.worker_pids == []
    assert in_workers.keys() == inline.keys()
    for job_id, expected in inline.items():
        got = in_workers[job_id]
        if expected.pixels is None:
            assert (str(got.error), got.error.__dict__) == (str(expected.error), expected.error.__dict__)
        else:
            np.testing.assert_array_equal(got.pixels, expected.pixels)
    assert {job_id for job_id, item in inline.items() if item.error} == {"truncated"}


def test_corrupt_picture_fails_alone_with_code(shared_pool: MediaPool) -> None:
    done = run(shared_pool, sources())
    error = done["truncated"].error
    assert isinstance(error, MediaError)
    assert error.code == "image_parse_error"
    assert error.__traceback__ is None
    assert error.__context__ is None


def test_tiles_are_writable_and_survive_the_pool() -> None:
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        pixels = run(pool, {"a": open_picture(photo(8, 8), MediaConfig())})["a"].pixels
    assert pixels is not None
    pixels += 1
    assert pixels.shape == (32 * 32 * 3,)


@pytest.mark.parametrize("size", [(8, 8), (2048, 1600)], ids=["kept-memory", "large-source"])
def test_results_that_wait_hold_no_descriptors(size: tuple[int, int]) -> None:
    source = open_picture(photo(*size), MediaConfig())
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        run(pool, {"first": open_picture(photo(8, 8), MediaConfig())})  # its worker has started, and has its memory
        before = len(os.listdir("/proc/self/fd"))
        waiting = run(pool, {str(i): source for i in range(10)})
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(waiting) == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_picture_closed_too_early_fails_alone(workers: int) -> None:
    pictures = {name: photo(40, 30) for name in ("before", "closed", "behind")}
    jobs: dict[str, PictureSource] = {name: open_picture(one, MediaConfig()) for name, one in pictures.items()}
    pictures["closed"].close()
    with MediaPool(MediaConfig(media_workers=workers)) as pool:
        done = run(pool, jobs)
    assert isinstance(done["closed"].error, MediaError)
    assert "was closed" in str(done["closed"].error)
    assert done["before"].error is done["behind"].error is None


def test_large_result_is_mapped_and_freed_with_its_array(shared_pool: MediaPool) -> None:
    source = open_picture(photo(8, 8), MediaConfig())

    def mapped() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("opsin-media")

    before = mapped()
    edge = math.isqrt(KEPT_BYTES // 3) + 1
    done = run(shared_pool, {"large": source}, edge)
    assert done["large"].pixels is not None
    assert done["large"].pixels.reshape(edge, edge, 3).any()
    assert mapped() == before + 1
    del done
    assert mapped() == before


def test_results_outlive_the_jobs_that_go_through_the_same_memory_after_them() -> None:
    edges = (64, 1700, 32, 8)  # the second one has memory of its own
    pictures = {edge: photo(40 + edge % 7, 30) for edge in edges}
    done: dict[str, Finished] = {}
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        for edge, picture in pictures.items():
            done |= run(pool, {str(edge): open_picture(encode(picture), MediaConfig())}, edge)
    for edge, picture in pictures.items():
        pixels = done[str(edge)].pixels
        assert pixels is not None
        assert np.array_equal(pixels, np.asarray(picture.resize((edge, edge), Image.Resampling.BICUBIC)).reshape(-1))


def test_worker_past_its_deadline_is_killed_and_replaced() -> None:
    source = open_picture(photo(8, 8), MediaConfig())
    with MediaPool(MediaConfig(media_workers=1, media_decode_timeout_s=1.0)) as pool:
        pid = warm(pool)
        freeze(pid)
        done = run(pool, {"frozen": source, "next": source})
        assert isinstance(done["frozen"].error, MediaError)
        assert done["frozen"].error.code == "image_parse_error"
        assert "timed out after 1 s" in str(done["frozen"].error)
        assert done["next"].pixels is not None
        assert pid not in pool.worker_pids


def test_slow_picture_is_cut_off_at_the_deadline(slow_source: PictureSource) -> None:
    quick = open_picture(photo(8, 8), MediaConfig())
    with MediaPool(MediaConfig(media_workers=1, media_decode_timeout_s=0.1)) as pool:
        done = run(pool, {"slow": slow_source, "quick": quick})
    assert "timed out" in str(done["slow"].error)
    assert done["quick"].pixels is not None


def test_worker_killed_mid_job_fails_that_job_alone(slow_source: PictureSource) -> None:
    quick = open_picture(photo(8, 8), MediaConfig())
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        pid = warm(pool)
        idle = resident_bytes(pid)
        pool.submit("dying", slow_source, square_plan(slow_source.size))
        pool.submit("waiting", quick, square_plan(quick.size))
        wait_until(lambda: resident_bytes(pid) > idle + SLOW_EDGE**2)  # it decodes
        os.kill(pid, signal.SIGKILL)
        done: dict[object, Finished] = {}
        while len(done) < 2:
            done |= {item.job_id: item for item in pool.wait(20)}
    assert isinstance(done["dying"].error, MediaError)
    assert done["dying"].error.code == "image_parse_error"
    assert "died" in str(done["dying"].error)
    assert done["waiting"].pixels is not None


def test_worker_killed_before_it_read_its_job_costs_no_job() -> None:
    source = open_picture(photo(8, 8), MediaConfig())
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        pid = warm(pool)
        freeze(pid)
        for job_id in ("given", "waiting"):
            pool.submit(job_id, source, square_plan(source.size))
        wait_until(lambda: pool.num_waiting == 1)
        os.kill(pid, signal.SIGKILL)
        done: dict[object, Finished] = {}
        while len(done) < 2:
            done |= {item.job_id: item for item in pool.wait(20)}
    assert [item.error for item in done.values()] == [None, None]


def test_idle_worker_killed_costs_no_job() -> None:
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        os.kill(warm(pool), signal.SIGKILL)
        assert run(pool, {"a": open_picture(photo(8, 8), MediaConfig())})["a"].pixels is not None


def test_picture_that_changed_since_its_header_was_read_fails() -> None:
    image = photo(64, 48)
    source = open_picture(image, MediaConfig())
    image.thumbnail((16, 16))
    for workers in (0, 1):
        with MediaPool(MediaConfig(media_workers=workers)) as pool:
            error = run(pool, {"a": source})["a"].error
        assert isinstance(error, MediaError), error
        assert "64 x 48" in str(error)


def test_cancelled_jobs_are_never_reported(slow_source: PictureSource) -> None:
    quick = open_picture(photo(8, 8), MediaConfig())
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        warm(pool)
        pool.submit("running", slow_source, square_plan(slow_source.size))
        wait_until(lambda: pool.num_waiting == 0)
        pool.submit("queued", quick, square_plan(quick.size))
        pool.cancel("queued")
        pool.cancel("running")
        pool.cancel("unknown")
        assert pool.num_pending == 0
        assert pool.wait(5) == []
        assert run(pool, {"running": quick})["running"].pixels is not None


def test_small_load_stays_in_process_and_large_load_starts_workers() -> None:
    small = open_picture(photo(64, 64), MediaConfig())
    large = open_picture(slow_png(3000), MediaConfig())
    assert 3000 * 3000 > INLINE_PIXELS
    with MediaPool(MediaConfig()) as pool:
        run(pool, {str(i): small for i in range(5)})
        assert pool.worker_pids == []
        run(pool, {"large": large})
        assert len(pool.worker_pids) == 1


def test_submit_past_the_bound_is_refused_and_room_comes_back() -> None:
    source = open_picture(photo(8, 8), MediaConfig())
    with MediaPool(MediaConfig(media_workers=0), max_pending=2) as pool:
        for job_id in range(2):
            pool.submit(job_id, source, square_plan(source.size))
        with pytest.raises(RequestFailedError, match="2 pictures wait"):
            pool.submit(2, source, square_plan(source.size))
        while pool.num_pending:
            pool.wait(5)
        pool.submit(2, source, square_plan(source.size))


@pytest.mark.parametrize("workers", [0, 1])
def test_on_finished_is_called_once_a_result_can_be_polled(workers: int) -> None:
    called = threading.Event()
    source = open_picture(photo(8, 8), MediaConfig())
    with MediaPool(MediaConfig(media_workers=workers), on_finished=called.set) as pool:
        assert pool.poll() == []
        pool.submit("a", source, square_plan(source.size))
        assert called.wait(10)
        assert [item.job_id for item in pool.poll()] == ["a"]
        assert pool.poll() == []


def test_workers_that_cannot_start_fail_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        error = run(pool, {"a": open_picture(photo(8, 8), MediaConfig())})["a"].error
    assert isinstance(error, RequestFailedError)
    assert "do not start" in str(error)


def test_job_for_which_no_descriptor_is_left_fails_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(num_bytes: int) -> tuple[int, mmap.mmap]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    source = open_picture(encode(photo(8, 8)), MediaConfig())
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        with monkeypatch.context() as context:
            context.setattr("opsin.media.pool.allocate", allocate)
            refused = run(pool, {"refused": source})["refused"]
        assert type(refused.error) is RequestFailedError
        assert run(pool, {"next": source})["next"].error is None


def test_close_mid_job_leaves_no_process_thread_or_descriptor(slow_source: PictureSource) -> None:
    def descriptors() -> set[str]:
        gc.collect()
        return set(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    pool = MediaPool(MediaConfig(media_workers=2))
    done = run(pool, sources())
    pids = pool.worker_pids
    pool.submit("slow", slow_source, square_plan(slow_source.size))
    pool.close()
    pool.close()
    del done
    assert descriptors() == before
    assert threading.active_count() == threads
    assert pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_worker_whose_pool_has_gone_meanwhile_ends_quietly() -> None:
    process, connection = start_worker(MediaConfig())
    connection.close()
    assert process.wait(20) == 0


def test_workers_end_when_the_parent_is_killed() -> None:
    program = """
import time
from PIL import Image
from opsin.config import MediaConfig
from opsin.media.pool import MediaPool
from opsin.media.source import open_picture
from opsin.types import PixelPlan, View
pool = MediaPool(MediaConfig(media_workers=1))
plan = PixelPlan(width=4, height=4, views=(View(ops=(), height=4, width=4),))
pool.submit("a", open_picture(Image.new("RGB", (4, 4)), MediaConfig()), plan)
pool.wait()
print(*pool.worker_pids, flush=True)
time.sleep(60)
"""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        parent.kill()
        parent.wait()

    def is_gone() -> bool:
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_until(is_gone)


def test_workers_start_where_memory_is_limited_below_their_own_limit() -> None:
    program = """
import resource
import numpy as np
from opsin.config import MediaConfig
from opsin.media.pool import MediaPool
from opsin.media.source import open_picture
from opsin.types import PixelPlan, View
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
with MediaPool(MediaConfig(media_workers=1)) as pool:
    plan = PixelPlan(width=4, height=4, views=(View(ops=(), height=4, width=4),))
    pool.submit("a", open_picture(np.zeros((4, 4, 3), np.uint8), MediaConfig()), plan)
    pool.wait()
    print(len(pool.worker_pids))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_decoded_pictures_that_fail_or_need_no_worker_leave_it_to_the_next_in_line() -> None:
    shrunk = photo(30, 20)
    source = open_picture(shrunk, MediaConfig())
    shrunk.thumbnail((10, 10))  # a caller who changes a picture that it has handed over
    whole = np.asarray(photo(21, 13))
    plan = PixelPlan(21, 13, (View((), height=13, width=21),))
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        run(pool, {"ready": open_picture(encode(photo(8, 8)), MediaConfig())})
        with pool._changed:  # so that one look at the queue finds them all
            pool.submit("changed", source, square_plan((30, 20)))
            pool.submit("raw", open_picture(whole, MediaConfig()), plan)
            pool.submit("last", open_picture(encode(photo(9, 9)), MediaConfig()), square_plan((9, 9)))
        done: dict[object, Finished] = {}
        while len(done) < 3:
            finished = pool.wait(20)
            assert finished, "the pool is stuck"
            done |= {item.job_id: item for item in finished}
    assert isinstance(done["changed"].error, MediaError)
    raw = done["raw"].pixels
    assert raw is not None
    np.testing.assert_array_equal(raw.reshape(13, 21, 3), whole)
    assert raw.flags.writeable
    assert done["last"].error is None
