"""Videos from bytes: what their headers say, the frames that come of them, and files that are not what they seem."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.config import MediaConfig
from opsin.errors import MediaError, RequestError
from opsin.media import video as videos
from opsin.media.clips import EncodedVideo, FrameChoice, FrameSequence, open_video
from opsin.media.ops import make_tiles
from opsin.media.pool import MediaPool
from opsin.media.prober import VideoProber
from opsin.media.video import VideoHeader, decode_frames, detect_video_format, read_video_header
from opsin.types import PixelPlan, Resize, View
from tests.media import clips

CONFIG = MediaConfig(media_workers=0)
MOST = 10**8
FILES: dict[str, tuple[str, str]] = {  # container, codec
    "mov": ("mp4", "libx264"),
    "matroska": ("webm", "libvpx-vp9"),
    "avi": ("avi", "mpeg4"),
    "mpegts": ("mpegts", "mpeg2video"),
    "flv": ("flv", "flv1"),
}


def header_of(data: bytes) -> VideoHeader:
    return read_video_header(data, detect_video_format(data), max_pixels=MOST)


def opened(data: Any, choice: FrameChoice | None = None, config: MediaConfig = CONFIG) -> Any:
    return open_video(data, config, choice or FrameChoice(), VideoProber(config))


def decoded_whole(data: Any) -> None:
    source = opened(data)
    list(source.frames(source.clip.frames))


def animation(format: str, count: int = 6) -> bytes:
    buffer = io.BytesIO()
    first, *rest = clips.frames(count)
    first.save(buffer, format, save_all=True, append_images=rest, duration=250, loop=0, lossless=True)
    return buffer.getvalue()


def assert_same(made: list[Image.Image], expected: list[Image.Image]) -> None:
    assert len(made) == len(expected)
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# ----------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("format", FILES)
def test_header_and_frames_of_every_container(format: str) -> None:
    container, codec = FILES[format]
    data = clips.encode(clips.frames(23), container, codec, fps=8)
    header = header_of(data)
    assert header == VideoHeader(format, 64, 48, 23, 8.0)  # type: ignore[arg-type]
    every = clips.decoded(data)
    for wanted in ([0], [22], [0, 1, 2], [3, 9, 10, 22], list(range(23))):
        assert_same(list(decode_frames(data, header, wanted)), [every[i] for i in wanted])


@pytest.mark.parametrize("format", ["GIF", "WebP"])
def test_animations_are_videos(format: str) -> None:
    data = animation(format)
    header = header_of(data)
    assert header == VideoHeader(format, 64, 48, 6, 4.0)  # type: ignore[arg-type]
    made = list(decode_frames(data, header, [0, 3, 5]))
    shown = clips.frames(6)
    for ours, index in zip(made, (0, 3, 5), strict=True):
        difference = np.asarray(ours).astype(int) - np.asarray(shown[index])
        assert np.abs(difference).mean() < (1 if format == "WebP" else 12)


@pytest.mark.parametrize(("degrees", "turn"), [(90, "ROTATE_270"), (180, "ROTATE_180"), (270, "ROTATE_90")])
def test_video_that_asks_to_be_turned_is_upright(degrees: int, turn: str) -> None:
    """A phone held upright writes pictures that lie on their sides, and how to turn them, clockwise."""
    plain = clips.encode(clips.frames(3))
    data = clips.rotated(plain, degrees)
    header = header_of(data)
    assert (header.width, header.height) == ((64, 48) if degrees == 180 else (48, 64))
    expected = [frame.transpose(Image.Transpose[turn]) for frame in clips.decoded(plain)]
    assert_same(list(decode_frames(data, header, [0, 1, 2])), expected)


def test_frames_far_apart_are_reached_by_their_keyframes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clips.encode(clips.frames(200), codec="libx264", gop=10)
    every, header = clips.decoded(data), header_of(data)
    assert header.num_frames == 200
    decoded = 0
    inner = videos._at_times

    def counting(container: Any, stream: Any, *rest: Any) -> Iterator[Any]:
        class Counting:
            seek = container.seek

            def decode(self, stream: Any) -> Iterator[Any]:
                nonlocal decoded
                for frame in container.decode(stream):
                    decoded += 1
                    yield frame

        return inner(Counting(), stream, *rest)

    monkeypatch.setattr(videos, "_at_times", counting)
    wanted = [5, 61, 119, 199]
    assert_same(list(decode_frames(data, header, wanted)), [every[i] for i in wanted])
    assert decoded < 60


# --------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("choice", "total", "fps", "expected"),
    [
        (FrameChoice(), 10, 5.0, tuple(range(10))),
        (FrameChoice(4), 10, 5.0, (0, 3, 6, 9)),
        (FrameChoice(1), 10, 5.0, (0,)),
        (FrameChoice(None, 1.0), 20, 5.0, (0, 6, 12, 19)),
        (FrameChoice(3, 1.0), 20, 5.0, (0, 9, 19)),
        (FrameChoice(None, 0.01), 20, 5.0, (0,)),
        (FrameChoice(None, 99.0), 4, 5.0, (0, 1, 2, 3)),
        (FrameChoice(None, 1.0), 4, None, (0, 1, 2, 3)),
    ],
)
def test_frames_are_chosen_evenly(
    choice: FrameChoice, total: int, fps: float | None, expected: tuple[int, ...]
) -> None:
    assert choice.frames(total, fps) == expected


def test_choice_of_a_request_goes_over_the_engines() -> None:
    engine = {"video": {"num_frames": 8, "fps": 2}}
    assert FrameChoice.of() == FrameChoice.of({}, None, {"image": {}}) == (32, None)
    assert FrameChoice.of(engine) == (8, 2)
    assert FrameChoice.of(engine, {"video": {"num_frames": -1}}) == (None, 2)
    assert FrameChoice.of(engine, {"video": {"fps": -1}}) == (8, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"audio": {}},
        {"video": 3},
        {"video": {"frames": 3}},
        {"video": {"num_frames": 2.5}},
        {"video": {"num_frames": True}},
        {"video": {"fps": "2"}},
        {"video": {"fps": float("nan")}},
        {"image": {"image_mode": "L"}},
        [],
    ],
)
def test_choice_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="media_io_kwargs"):
        FrameChoice.of(wrong)


# ---------------------------------------------------------------------------------------------------- many forms


def test_forms_of_one_video_have_one_digest_and_clip(tmp_path: Path) -> None:
    data = clips.encode(clips.frames(40), fps=20)
    (tmp_path / "a.mp4").write_bytes(data)
    forms = [opened(form) for form in (data, bytearray(data), str(tmp_path / "a.mp4"), tmp_path / "a.mp4")]
    assert len({source.digest for source in forms}) == 1
    clip = forms[0].clip
    assert (clip.width, clip.height, clip.num_frames, clip.fps) == (64, 48, 40, 20.0)
    assert (len(clip.frames), clip.frames[0], clip.frames[-1]) == (32, 0, 39)
    assert clip.times[-1] == pytest.approx(39 / 20)
    assert clip.duration == pytest.approx(2.0)
    assert clip.chosen_fps == pytest.approx(16.0)


class Tensor:
    """What of a torch tensor is looked at."""

    def __init__(self, array: Any) -> None:
        self._array, self.ndim = array, array.ndim

    def numpy(self, *, force: bool) -> Any:
        return self._array


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("wrap", [np.asarray, Tensor])
def test_frames_as_transformers_has_them_are_the_same_video(kind: str, wrap: Callable[[Any], Any]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), np.uint8)
    expected = opened(frames)
    for array in (frames, frames.transpose(0, 3, 1, 2)):
        source = opened(wrap(array.astype(kind)))
        assert (source.digest, source.clip) == (expected.digest, expected.clip)


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 200.0), (0.0, 256.0), (float("nan"), 200.0)])
def test_frames_of_floats_that_are_no_pixels_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(MediaError, match="must hold uint8"):
        opened(np.resize(np.array(values, np.float32), (2, 24, 32, 3)))


def test_path_of_a_video_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"Cannot open the video's file.*pictures/clip\.mp4'"):
        opened(tmp_path / "pictures" / "clip.mp4")


def test_frames_are_told_apart_by_every_pixel_and_their_order() -> None:
    shown = clips.frames(4)
    changed = [*shown[:3], shown[3].copy()]
    changed[3].putpixel((0, 0), (1, 2, 3))
    variants = [shown, shown[::-1], shown[:3], changed, [*shown, shown[-1]]]
    assert len({opened(variant).digest for variant in variants}) == 5
    as_array = opened(np.stack([np.asarray(frame) for frame in shown]))
    assert isinstance(as_array, FrameSequence)
    assert_same(list(as_array.frames([0, 2])), [shown[0], shown[2]])


def test_metadata_places_frames_in_their_recording() -> None:
    source = opened((clips.frames(3), {"fps": 5.0, "total_num_frames": 50, "frames_indices": [0, 20, 45]}))
    assert source.clip.times == (0.0, 4.0, 9.0)
    assert source.clip.duration == 10.0
    assert source.clip.chosen_fps == pytest.approx(0.3)
    unknown = opened((clips.frames(3), None)).clip
    assert (unknown.fps, unknown.chosen_fps, unknown.times[1]) == (None, 24.0, 1 / 24)


# ---------------------------------------------------------------------------------------------------- hostile files


def _late_cut() -> bytes:
    return clips.encode(clips.frames(30), codec="libx264")[:-30]


def _early_index_cut() -> bytes:
    whole = clips.header_first(clips.encode(clips.frames(30), codec="libx264"))
    return whole[: len(whole) * 6 // 10]


def _cut_matroska() -> bytes:
    return clips.encode(clips.frames(30), "webm", "libvpx-vp9")[:60]


def _no_frames() -> bytes:
    data = bytearray(clips.encode(clips.frames(3)))
    for box in (b"stsz", b"stts", b"stsc", b"stco", b"stss"):
        at = data.find(box)
        if at > 0:
            count = at + 12 if box == b"stsz" else at + 8
            data[count : count + 4] = bytes(4)
    return bytes(data)


def _sound_alone() -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            output.mux(packet)
    return buffer.getvalue()


def _playlist() -> bytes:
    return b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


def _noise_in_a_container() -> bytes:
    data = bytearray(clips.encode(clips.frames(12), codec="libx264"))
    begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[begin:end] = np.random.default_rng(0).integers(0, 256, end - begin, dtype=np.uint8).tobytes()
    return bytes(data)


def _picture() -> bytes:
    buffer = io.BytesIO()
    clips.frames(1)[0].save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (_late_cut, "video_parse_error"),
        (_early_index_cut, "video_parse_error"),
        (_cut_matroska, "video_parse_error"),
        (_no_frames, "video_parse_error"),
        (_sound_alone, "video_parse_error"),
        (_noise_in_a_container, "video_parse_error"),
        (lambda: animation("GIF")[:700], "video_parse_error"),
        (_picture, "invalid_video_format"),
        (_playlist, "invalid_video_format"),
        (lambda: b"concat:/etc/passwd", "invalid_video_format"),
        (lambda: b"", "empty_video_file"),
    ],
)
def test_hostile_file_is_refused_with_a_code(make: Callable[[], bytes], code: str) -> None:
    data = make()
    with pytest.raises(MediaError) as caught:
        decoded_whole(data)
    assert caught.value.code == code
    assert "0x" not in str(caught.value)


def test_picture_given_as_a_video_says_so() -> None:
    with pytest.raises(MediaError, match="JPEG picture, not a video; send it as an image"):
        opened(_picture())


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_mp4_cut_anywhere_never_passes_for_whole(cut: int) -> None:
    whole = clips.header_first(clips.encode(clips.frames(12), codec="libx264"))
    with pytest.raises(MediaError):
        opened(whole[: len(whole) * cut // 40])


def test_durations_that_lie_change_nothing() -> None:
    data = bytearray(clips.encode(clips.frames(8), fps=4))
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        at = data.index(box) + offset
        data[at : at + 4] = b"\x7f\xff\xff\xf0"
    header = header_of(bytes(data))
    assert header.num_frames == 8
    assert len(list(decode_frames(bytes(data), header, range(8)))) == 8


def test_frame_above_the_pixel_limit_is_refused() -> None:
    data = clips.encode(clips.frames(2))
    with pytest.raises(MediaError, match=r"64 x 48 = 3072 pixels; at most 3000") as caught:
        read_video_header(data, "mov", max_pixels=3000)
    assert caught.value.code == "video_too_large"


def test_dimensions_that_lie_are_not_believed() -> None:
    """The sample description says 65,535 x 65,535; the stream inside has 64 x 48."""
    data = bytearray(clips.encode(clips.frames(2)))
    at = data.index(b"mp4v") + 4 + 24
    data[at : at + 4] = b"\xff\xff\xff\xff"
    header = header_of(bytes(data))
    assert (header.width, header.height) == (64, 48)


def test_more_frames_than_allowed_are_refused() -> None:
    data = clips.encode(clips.frames(12))
    config = MediaConfig(media_workers=0, max_video_frames=10)
    for video in (data, clips.frames(12)):
        with pytest.raises(MediaError, match="max_video_frames") as caught:
            opened(video, FrameChoice(None), config)
        assert caught.value.code == "video_too_large"
    assert len(opened(data, FrameChoice(10), config).clip.frames) == 10


def test_file_above_the_byte_limit_is_refused_as_a_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clips.encode(clips.frames(3)))
    config = MediaConfig(media_workers=0, max_media_bytes=100)
    for video in (tmp_path / "a.mp4", (tmp_path / "a.mp4").read_bytes()):
        with pytest.raises(MediaError, match="The video's file has") as caught:
            opened(video, config=config)
        assert caught.value.code == "video_file_too_large"


def test_missing_decoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MediaError, match=r"pip install 'opsin\[video\]'"):
        opened(clips.encode(clips.frames(1)))
    assert opened(animation("GIF")).clip.num_frames == 6  # Pillow's


# -------------------------------------------------------------------------------------------------- worker processes

_PLAN_VIEWS = (View((Resize(32, 24, "bicubic"),), height=24, width=32),)


def expected_tiles(pictures: list[Image.Image], plan: PixelPlan) -> np.ndarray:
    out = np.empty((len(pictures), plan.num_bytes // len(plan.frames)), np.uint8)
    for picture, part in zip(pictures, out, strict=True):
        make_tiles(picture, plan, part)
    return out.reshape(-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_pool_makes_tiles_of_every_frame_alike_in_and_out_of_processes(workers: int) -> None:
    """A frame that stands twice in a plan is decoded once."""
    data = clips.encode(clips.frames(9))
    shown = clips.frames(5, seed=2)
    plan = PixelPlan(64, 48, _PLAN_VIEWS, (0, 3, 4, 4))
    every = clips.decoded(data)
    with MediaPool(MediaConfig(media_workers=workers)) as pool:
        pool.submit("file", opened(data), plan)
        pool.submit("frames", opened(shown), plan)
        done = {}
        while len(done) < 2:
            done |= {finished.job_id: finished for finished in pool.wait(30)}
    for name, source in (("file", every), ("frames", shown)):
        assert done[name].error is None, done[name].error
        np.testing.assert_array_equal(done[name].pixels, expected_tiles([source[i] for i in (0, 3, 4, 4)], plan))


def test_video_file_goes_to_a_process_where_a_picture_need_not() -> None:
    with MediaPool(MediaConfig()) as pool:
        pool.submit("file", opened(clips.encode(clips.frames(2))), PixelPlan(64, 48, _PLAN_VIEWS, (0, 1)))
        (finished,) = pool.wait(30)
        assert finished.error is None
        assert len(pool.worker_pids) == 1


def test_frames_that_break_in_a_worker_fail_alone() -> None:
    data = _noise_in_a_container()
    header = VideoHeader("mov", 64, 48, 12, 10.0)
    good = opened(clips.encode(clips.frames(2)))
    bad = EncodedVideo(data, header, good.clip, b"bad")
    with MediaPool(MediaConfig(media_workers=1)) as pool:
        pool.submit("bad", bad, PixelPlan(64, 48, _PLAN_VIEWS, (0, 11)))
        pool.submit("good", good, PixelPlan(64, 48, _PLAN_VIEWS, (0, 1)))
        done = {}
        while len(done) < 2:
            done |= {finished.job_id: finished for finished in pool.wait(30)}
    error = done["bad"].error
    assert isinstance(error, MediaError)
    assert error.code == "video_parse_error"
    assert done["good"].error is None


@pytest.fixture
def prober() -> Iterator[VideoProber]:
    prober = VideoProber(MediaConfig(media_decode_timeout_s=1.0))
    yield prober
    prober.close()


def test_prober_reads_headers_in_one_process_after_another(prober: VideoProber) -> None:
    data = clips.encode(clips.frames(5))
    assert prober(data, "mov") == prober(data, "mov") == header_of(data)
    (worker,) = prober._idle
    with pytest.raises(MediaError, match="corrupt"):
        prober(data[:40], "matroska")
    assert [w.process.pid for w in prober._idle] == [worker.process.pid]


def test_prober_outlives_a_process_that_dies_or_hangs(prober: VideoProber) -> None:
    data = clips.encode(clips.frames(5))
    prober(data, "mov")
    os.kill(prober._idle[0].process.pid, signal.SIGKILL)
    prober._idle[0].process.wait()
    with pytest.raises(MediaError, match="died on this video") as caught:
        prober(data, "mov")
    assert caught.value.code == "video_parse_error"
    assert prober(data, "mov").num_frames == 5
    os.kill(prober._idle[0].process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(MediaError, match="timed out after 1 s"):
        prober(data, "mov")
    assert time.monotonic() - started < 5
    assert prober._idle == []
    assert prober(data, "mov").num_frames == 5


def test_prober_closed_starts_no_process_that_stays(prober: VideoProber) -> None:
    prober.close()
    assert prober(clips.encode(clips.frames(2)), "mov").num_frames == 2
    assert prober._idle == []


def test_mutated_videos_are_read_or_fail_with_a_code(prober: VideoProber) -> None:
    rng = np.random.default_rng(0)
    outcomes: set[str | None] = set()
    for format, (container, codec) in FILES.items():
        whole = np.frombuffer(clips.encode(clips.frames(6), container, codec), np.uint8)
        for _ in range(12):
            data = whole.copy()
            at = rng.integers(0, len(data), 24)
            data[at] = rng.integers(0, 256, 24)
            try:
                header = prober(data.tobytes(), format)  # type: ignore[arg-type]
                assert header.num_frames >= 1
                outcomes.add(None)
            except MediaError as error:
                outcomes.add(error.code)
    assert None in outcomes
    assert outcomes <= {None, "video_parse_error", "video_too_large"}
    assert len(outcomes) > 1
