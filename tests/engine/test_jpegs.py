"""JPEGs decoded on the device, with Pillow behind nvJPEG's interface: the same answers, whoever decodes."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.config import MediaConfig
from opsin.engine import build, jpegs
from opsin.engine.jpegs import JpegThread, check_decoder, find_nvjpeg, open_decoder
from opsin.errors import ConfigError, EngineDeadError, MediaError
from opsin.kernels.nvjpeg import WORKSPACE_BYTES, Jpeg, JpegDecoder
from opsin.media.raw import MAX_RAW_PIXELS
from opsin.media.source import EncodedPicture, open_encoded
from tests.engine.conftest import asked, assert_idle, picture
from tests.kernels.nvjpeg_stand_in import StandIn

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def encoded(seed: int, width: int = 90, height: int = 61, *, orientation: int = 1, **settings: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image = picture(seed, width, height)
    image.save(buffer, **{"format": "JPEG", "exif": exif, **settings})
    return buffer.getvalue()


def about(image: Any) -> Any:
    return asked(0) | {"multi_modal_data": {"image": image}}


class Roads(NamedTuple):
    """Engines over one checkpoint: workers do all, and the device resizes and decodes what it can."""

    by_workers: LLM
    by_device: LLM
    library: StandIn

    def answers(self, *images: Any) -> tuple[list[Any], list[Any], int]:
        """Of either, and how many pictures the device decoded for them."""
        prompts = [about(image) for image in images]
        before = self.by_device.stats()["num_pictures_decoded_on_device_total"]
        theirs, ours = (
            [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
            for llm in (self.by_workers, self.by_device)
        )
        return theirs, ours, int(self.by_device.stats()["num_pictures_decoded_on_device_total"] - before)


def decoding(folder: Path, decoder: JpegDecoder, **settings: Any) -> LLM:
    """An engine that takes its device for one that resizes and decodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "most_raw_pixels", lambda device: MAX_RAW_PIXELS)
        patch.setattr(build, "find_nvjpeg", lambda wanted, device: wanted if wanted == "gpu" else None)
        patch.setattr(build, "open_decoder", lambda library, device, most: decoder)
        return LLM(str(folder), jpeg_decoder="gpu", max_num_batched_patches=1, **settings)


DAMAGED = encoded(99)


@pytest.fixture(scope="module")
def roads(folder: Path) -> Iterator[Roads]:
    library = StandIn(damaged=lambda data: data == DAMAGED)
    with (
        LLM(str(folder), media_workers=0, max_num_batched_patches=1) as by_workers,
        decoding(folder, JpegDecoder(library, CPU, None), media_workers=0) as by_device,
    ):
        yield Roads(by_workers, by_device, library)
        assert_idle(by_device)
    assert not library.open_handles


def test_answers_are_those_of_pictures_that_workers_decode(roads: Roads):
    images = [encoded(seed, *size) for seed, size in enumerate([(90, 61), (33, 80), (300, 200), (61, 90)])]
    theirs, ours, num_on_device = roads.answers(*images, encoded(5, subsampling=0), encoded(6, optimize=True))
    assert ours == theirs
    assert num_on_device == 6
    assert len({tuple(answer) for answer in ours}) > 1


@pytest.mark.parametrize(
    "image",
    [
        encoded(10, progressive=True),
        encoded(11, orientation=6),
        encoded(12, format="PNG"),
        picture(13, 90, 61),
        encoded(14) + b"trailer",
        encoded(15, keep_rgb=True),
        encoded(16, 32, 32),
    ],
    ids=["progressive", "turned", "PNG", "a PIL.Image", "trailer", "RGB", "of the size that the tower takes"],
)
def test_all_other_pictures_are_decoded_by_workers(roads: Roads, image: Any):
    theirs, ours, num_on_device = roads.answers(image)
    assert (ours, num_on_device) == (theirs, 0)


def test_picture_that_the_device_finds_damaged_is_the_workers_to_judge(roads: Roads):
    theirs, ours, num_on_device = roads.answers(encoded(41), DAMAGED, encoded(42))
    assert (ours, num_on_device) == (theirs, 2)


def test_picture_cut_short_fails_alone_with_the_workers_error(roads: Roads):
    data = encoded(51)
    errors: list[str] = []
    for llm in roads[:2]:
        with pytest.raises(MediaError) as caught:
            llm.generate([about(encoded(52)), about(data[:-40])], GREEDY, use_tqdm=False)
        errors.append(f"{caught.value.code}: {caught.value}")
    assert errors[0] == errors[1]
    assert "image_parse_error" in errors[0]
    theirs, ours, num_on_device = roads.answers(encoded(53))
    assert (ours, num_on_device) == (theirs, 1)


class Gated:
    """A decoder that waits to be let through."""

    def __init__(self) -> None:
        self.begun, self.gate, self.finished = (threading.Semaphore(0) for _ in range(3))
        self.library = StandIn()
        self.inner = JpegDecoder(self.library, CPU, None)
        self.batches: list[list[int]] = []
        self.error: Exception | None = None

    def decode(self, pictures: Sequence[Jpeg]) -> list[torch.Tensor | None]:
        self.batches.append([len(one.data) for one in pictures])
        self.begun.release()
        assert self.gate.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        return self.inner.decode(pictures)

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def gated() -> Iterator[tuple[Gated, JpegThread]]:
    decoder: Any = Gated()
    thread = JpegThread(decoder, decoder.finished.release, deadline_s=30.0)
    yield decoder, thread
    decoder.gate.release(100)
    thread.close()


def source(seed: int, width: int = 90, height: int = 61) -> EncodedPicture:
    return open_encoded(encoded(seed, width, height), MediaConfig())


def test_pictures_that_come_meanwhile_make_up_the_next_batch(gated: tuple[Gated, JpegThread]):
    decoder, thread = gated
    sources = [source(seed) for seed in range(5)]
    thread.submit(b"0", sources[0])
    assert decoder.begun.acquire(timeout=10)
    for i in (1, 2, 3, 4):
        thread.submit(b"%d" % i, sources[i])
    thread.cancel(b"2")
    decoder.gate.release(2)
    for _ in range(2):
        assert decoder.finished.acquire(timeout=10)
    made = dict(thread.poll())
    assert [len(batch) for batch in decoder.batches] == [1, 3]
    assert sorted(made) == [b"0", b"1", b"3", b"4"]
    for key, pixels in made.items():
        assert pixels is not None
        assert np.array_equal(pixels.numpy(), np.asarray(sources[int(key)].decode()))
    assert thread.poll() == []


def test_batch_holds_only_so_many_pixels(gated: tuple[Gated, JpegThread], monkeypatch: pytest.MonkeyPatch):
    decoder, thread = gated
    monkeypatch.setattr(jpegs, "MAX_BATCH_PIXELS", 2 * 90 * 61)
    sources = [source(1), source(2, 200, 150), source(3), source(4), source(5)]
    decoder.gate.release(10)
    assert [pixels is not None for pixels in thread._decode(sources)] == [True] * 5
    assert [len(batch) for batch in decoder.batches] == [1, 1, 2, 1]


def test_device_without_memory_for_a_batch_leaves_it_to_the_workers(gated: tuple[Gated, JpegThread]):
    decoder, thread = gated
    decoder.error = torch.OutOfMemoryError("no memory")
    decoder.gate.release()
    assert thread._decode([source(1), source(2)]) == [None, None]


def test_decoder_that_breaks_the_device_ends_the_engine(
    folder: Path, gated: tuple[Gated, JpegThread], caplog: pytest.LogCaptureFixture
):
    decoder: Any = gated[0]
    decoder.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    decoder.gate.release()
    with decoding(folder, decoder, media_workers=0) as llm:
        with pytest.raises(EngineDeadError, match=r"The JPEG decoder failed: .*illegal memory access"):
            llm.generate([about(encoded(1))], GREEDY, use_tqdm=False)
    assert "The JPEG decoder failed" in caplog.text


def test_decoder_that_does_not_come_back_ends_the_engine_and_is_left_behind(folder: Path):
    decoder: Any = Gated()
    with decoding(folder, decoder, media_workers=0, media_decode_timeout_s=0.05) as llm:
        with pytest.raises(EngineDeadError, match=r"The JPEG decoder has not come back for 0\.05 s"):
            llm.generate([about(encoded(1))], GREEDY, use_tqdm=False)
    assert decoder.library.open_handles, "freed while it is in use, or waited for"
    decoder.gate.release()


def test_request_that_ends_while_its_picture_is_decoded_leaves_nothing_behind(folder: Path):
    decoder: Any = Gated()
    with decoding(folder, decoder, media_workers=0) as llm:
        front: Any = llm._front
        processed = front.inputs.process("gone", front.read_prompt(about(encoded(1))), GREEDY)
        engine = front.engine
        engine.add([processed.request], processed.sources)
        while not decoder.begun.acquire(blocking=False):
            engine.step()
        engine.abort("gone")
        assert not engine.feeder.is_waiting
        again = front.inputs.process("again", front.read_prompt(about(encoded(1))), GREEDY)
        engine.add([again.request], again.sources)
        decoder.gate.release(10)
        tokens: list[int] = []
        while engine.has_work:
            for update in engine.step():
                assert update.error is None
                tokens += update.token_ids
        assert len(tokens) == GREEDY.max_tokens
        assert_idle(llm)


# ---------------------------------------------------------------------------------------- what is built


def test_decoder_is_opened_where_it_is_asked_for_and_the_device_resizes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cuda = torch.device("cuda")
    assert find_nvjpeg("cpu", cuda) is None
    with pytest.raises(ConfigError, match=r"jpeg_decoder is 'gpu' and the device 'cpu', which has no nvJPEG"):
        find_nvjpeg("gpu", CPU)

    def missing() -> Any:
        raise ConfigError("libnvjpeg is not found")

    monkeypatch.setattr(jpegs, "load_library", missing)
    with pytest.raises(ConfigError, match="is not found"):
        find_nvjpeg("gpu", cuda)
    monkeypatch.setattr(jpegs, "load_library", StandIn)
    library = find_nvjpeg("gpu", cuda)
    assert library is not None
    assert open_decoder(library, cuda, 0) is None
    assert "JPEGs are decoded on the CPU" in caplog.text

    def on_host(library: Any, device: torch.device, stream: Any) -> JpegDecoder:
        return JpegDecoder(library, CPU, None)

    monkeypatch.setattr(jpegs, "JpegDecoder", on_host)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    assert isinstance(open_decoder(library, cuda, MAX_RAW_PIXELS), JpegDecoder)


def test_decoder_that_cannot_be_had_is_told_before_weights_are_loaded(monkeypatch: pytest.MonkeyPatch):
    def load(*args: Any, **settings: Any) -> None:
        raise AssertionError("loaded all the same")

    monkeypatch.setattr(build, "load_model", load)
    with pytest.raises(ConfigError, match="has no nvJPEG"):
        LLM("demo", device="cpu", jpeg_decoder="gpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture.flip(2),  # BGR
        lambda picture: picture.flip(0),
        lambda picture: torch.zeros_like(picture),
        lambda picture: picture[:, :, :1].expand(-1, -1, 3),
    ],
)
def test_decoder_that_makes_other_pictures_is_refused(change: Callable[[torch.Tensor], torch.Tensor]):
    decoder: Any = JpegDecoder(StandIn(), CPU, None)
    check_decoder(decoder)
    decode = decoder.decode
    decoder.decode = lambda pictures: [change(one) for one in decode(pictures)]
    with pytest.raises(ConfigError, match=r"off Pillow's by \d+"):
        check_decoder(decoder)
    with pytest.raises(ConfigError, match="does not decode a plain JPEG"):
        check_decoder(JpegDecoder(StandIn(damaged=lambda data: True), CPU, None))


def test_memory_for_decoded_pictures_is_set_aside(roads: Roads):
    assert roads.by_workers.memory_plan.decoded_bytes == 0
    assert roads.by_device.memory_plan.decoded_bytes == 2**30 + WORKSPACE_BYTES


def test_engine_on_a_cpu_refuses_to_decode_on_a_gpu(folder: Path):
    with pytest.raises(ConfigError, match=r"jpeg_decoder is 'gpu' and the device 'cpu'"):
        LLM(str(folder), jpeg_decoder="gpu", device="cpu")
