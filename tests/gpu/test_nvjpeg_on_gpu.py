"""nvJPEG itself: how far its pixels are from Pillow's, and that damaged files hurt nobody. ``-s`` shows the figures."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from opsin import LLM, SamplingParams
from opsin.cli.synthetic import photo
from opsin.engine.jpegs import check_decoder
from opsin.errors import ConfigError, MediaError
from opsin.kernels import select
from opsin.kernels.nvjpeg import Backend, Jpeg, JpegDecoder, load_library
from opsin.media.jpeg import is_plain
from opsin.media.ops import make_frames
from opsin.runner.executor import Pixels
from opsin.runner.pixels import PixelLoader
from opsin.types import PixelPlan, Resize, View
from tests.engine.conftest import asked

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SIZES = [(640, 480), (1024, 768), (333, 251), (1920, 1081)]
# Without loss in the chroma only two roundings differ. Where chroma is interpolated, so may the weights and the edges.
MAX_ERROR = {"4:4:4": 3, "grey": 3, "4:2:2": 255, "4:2:0": 255}
MEAN_ERROR = {"4:4:4": 0.6, "grey": 0.6, "4:2:2": 2.0, "4:2:0": 2.0}


def jpeg(sampling: str, width: int = 640, height: int = 480, seed: int = 1) -> Jpeg:
    with Image.open(io.BytesIO(photo(width, height, seed))) as image:
        image.load()
    buffer = io.BytesIO()
    if sampling == "grey":
        image.convert("L").save(buffer, "JPEG", quality=90)
    else:
        image.save(buffer, "JPEG", quality=90, subsampling=sampling)
    return Jpeg(buffer.getvalue(), width, height)


def pillow(jpeg: Jpeg) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg.data)) as image:
        return np.array(image.convert("RGB"))


@pytest.fixture(scope="module")
def library() -> Any:
    try:
        return load_library()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["hardware", "gpu_hybrid"])
def decoder(request: pytest.FixtureRequest, library: Any) -> Iterator[JpegDecoder]:
    backend: Backend = request.param
    try:
        decoder = JpegDecoder(library, CUDA, torch.cuda.Stream(CUDA), backends=[backend])
    except ConfigError as error:
        pytest.skip(str(error))
    yield decoder
    decoder.close()


@pytest.fixture
def any_decoder(library: Any) -> Iterator[JpegDecoder]:
    """What an engine uses."""
    decoder = JpegDecoder(library, CUDA, torch.cuda.Stream(CUDA))
    yield decoder
    decoder.close()


def taken(decoder: JpegDecoder, jpegs: list[Jpeg]) -> list[torch.Tensor]:
    made = [picture for picture in decoder.decode(jpegs) if picture is not None]
    assert len(made) == len(jpegs)
    return made


@pytest.mark.parametrize("sampling", list(MAX_ERROR))
def test_pixels_are_pillows_to_within_rounding(decoder: JpegDecoder, sampling: str):
    jpegs = [jpeg(sampling, *size) for size in SIZES]
    worst, means = 0, []
    for one, made in zip(jpegs, taken(decoder, jpegs), strict=True):
        error = np.abs(made.cpu().numpy().astype(np.int16) - pillow(one))
        means.append(float(error.mean()))
        worst = max(worst, int(error.max()))
    shown = " ".join(f"{mean:.3f}" for mean in means)
    print(f"\n{decoder.backend} {sampling}: off by {worst} at most; on average, by size: {shown}")
    assert worst <= MAX_ERROR[sampling]
    assert max(means) <= MEAN_ERROR[sampling]


def test_start_check_finds_pillows_picture(decoder: JpegDecoder):
    check_decoder(decoder)


def test_batch_makes_what_its_pictures_make_alone(decoder: JpegDecoder):
    jpegs = [jpeg(sampling, *size) for sampling in MAX_ERROR for size in SIZES]
    together = taken(decoder, jpegs)
    for one, made in zip(jpegs, together, strict=True):
        assert torch.equal(taken(decoder, [one])[0], made)


def test_decoded_pictures_are_resized_as_uploaded_ones_are_while_more_are_decoded(any_decoder: JpegDecoder):
    loader = PixelLoader(select(CUDA, "triton").resample, CUDA)
    plan = PixelPlan(640, 480, (View((Resize(644, 476),), height=476, width=644),))
    made: list[torch.Tensor] = []
    expected: list[npt.NDArray[np.uint8]] = []
    for seed in range(24):  # each round may get the memory of a former one, which is still being read
        (picture,) = taken(any_decoder, [jpeg("4:2:0", seed=seed)])
        tiles = np.empty(plan.num_bytes, np.uint8)
        make_frames([Image.fromarray(picture.cpu().numpy())], plan, tiles)
        expected.append(tiles)
        made.append(loader.load(Pixels(picture, is_raw=True), plan))
        del picture
    for got, wanted in zip(made, expected, strict=True):
        assert torch.equal(got.cpu(), torch.from_numpy(wanted))


def test_engine_decodes_on_the_device_from_nearly_the_same_features(tiny_llava: Any, library: Any):
    from tests.factory import LlavaShape

    folder: Path = tiny_llava(LlavaShape(num_kv_heads=2))
    images = [jpeg("4:2:0", width, height, seed).data for seed, (width, height) in enumerate(SIZES * 4)]
    prompts = [asked(0) | {"multi_modal_data": {"image": image}} for image in images]
    features: list[dict[bytes, torch.Tensor]] = []
    for decoder in ("cpu", "gpu"):
        settings: Any = {"jpeg_decoder": decoder, "dtype": "float32", "kv_cache_memory_bytes": 2**26}
        with LLM(str(folder), **settings) as llm:
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
            on_device = llm.stats()["num_pictures_decoded_on_device_total"]
            assert on_device == (len(images) if decoder == "gpu" else 0)
            with pytest.raises(MediaError) as caught:
                llm.generate([asked(0) | {"multi_modal_data": {"image": images[0][:-500]}}], GREEDY, use_tqdm=False)
            assert caught.value.code == "image_parse_error"
            core: Any = llm._front.engine.core  # type: ignore[attr-defined]
            stored = core.executor._runner.vision._features
            entries = core._scheduler._features._entries
            features.append({key: stored[e.feature_id].cpu() for key, e in entries.items() if e.feature_id is not None})
    by_workers, by_device = features
    assert by_workers.keys() == by_device.keys()
    assert len(by_workers) == len(images)
    for key, expected in by_workers.items():
        off = (by_device[key] - expected).abs().mean() / expected.abs().mean()
        assert off < 0.1, f"{off:.3f}"


def test_damaged_codes_break_neither_the_device_nor_the_pictures_after_them(any_decoder: JpegDecoder):
    random = np.random.default_rng(7)
    good = jpeg("4:2:0")
    (expected,) = taken(any_decoder, [good])
    num_taken = 0
    for i in range(60):
        data = bytearray(jpeg("4:2:0", seed=i % 5).data)
        begin = data.index(b"\xff\xda") + 14
        for at in random.integers(begin, len(data) - 2, 1 + i % 9).tolist():
            data[at] = int(random.integers(0, 255))
        if i % 3 == 0:  # cut short, and closed as if it were whole
            data = data[: begin + int(random.integers(0, len(data) - begin))] + b"\xff\xd9"
        bad = good._replace(data=bytes(data))
        if is_plain(*bad):
            num_taken += 1
            any_decoder.decode([good, bad])
    assert num_taken > 20
    torch.cuda.synchronize()
    (again,) = taken(any_decoder, [good])
    assert torch.equal(again, expected)
