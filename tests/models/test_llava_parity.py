"""LLaVA against transformers on tiny random checkpoints."""

from __future__ import annotations

import pytest
import torch

from tests.factory import LlavaShape
from tests.models.driver import Driver, Oracle, Piece, Row, pictures, pixel_values

TOLERANCE = 1e-4
PROMPT = "USER: <image>\nWhat is in the picture, and <image> in this one? ASSISTANT:"

SHAPES = {
    "mha": LlavaShape(),
    "gqa": LlavaShape(num_kv_heads=2),
    "mqa-3-layers": LlavaShape(num_kv_heads=1, num_layers=3),
    "tied": LlavaShape(tied=True),
    "odd-size": LlavaShape(image_size=44),
    "full-last-layer": LlavaShape(strategy="full", feature_layer=-1),
    "several-layers": LlavaShape(feature_layer=(-2, 0, 3)),
    "siglip": LlavaShape(tower="siglip", strategy="full", feature_layer=-1),
    "siglip-default": LlavaShape(tower="siglip"),
    "qwen2": LlavaShape(text="qwen2", num_kv_heads=2),
    "qwen2-window": LlavaShape(
        text="qwen2",
        num_kv_heads=2,
        text_extra=(("use_sliding_window", True), ("sliding_window", 12), ("max_window_layers", 1)),
    ),
    "mistral": LlavaShape(text="mistral", num_kv_heads=2),
    "mistral-window": LlavaShape(text="mistral", num_kv_heads=2, window=12),
    "head-dim": LlavaShape(text_extra=(("head_dim", 24),)),
    "biases": LlavaShape(text_extra=(("attention_bias", True), ("mlp_bias", True))),
    "llama3-rope": LlavaShape(
        text_extra=(
            (
                "rope_parameters",
                {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
        )
    ),
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> LlavaShape:
    return request.param


def test_llava_logits_and_greedy_ids_equal_transformers(checkpoint, shape):
    folder = checkpoint(shape)
    driver, oracle = Driver(folder), Oracle(folder)
    tiles = pictures(2, shape.image_size)
    pixels = pixel_values(driver, tiles)
    row = driver.prompt(PROMPT, tiles)
    expected = oracle.logits(row.ids, pixels)
    assert expected.std(-1).min() >= 0.5

    assert row.ids.count(driver.image_token_id) == 2 * shape.num_features
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)
    fresh = Row(row.ids[: len(row.ids)], row.features)
    assert driver.generate(fresh, 16) == oracle.generate(row.ids[:], pixels, 16)


@pytest.mark.parametrize("kernels", ["reference", "packed"])
def test_llava_text_only_prompt_equals_transformers(checkpoint, kernels):
    folder = checkpoint(LlavaShape(num_kv_heads=2))
    driver, oracle = Driver(folder, kernels=kernels), Oracle(folder)
    row = driver.prompt("USER: How many cats are there? ASSISTANT:")
    torch.testing.assert_close(driver.prefill(row), oracle.logits(row.ids, None), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_llava_prefill_in_chunks_equals_whole(checkpoint, name, chunk):
    shape = SHAPES[name]
    driver = Driver(checkpoint(shape))
    tiles = pictures(2, shape.image_size)
    whole, chunked = driver.prompt(PROMPT, tiles), driver.prompt(PROMPT, tiles)
    expected = driver.prefill(whole)
    parts = []
    while chunked.done < len(chunked.ids):
        parts.append(driver.run([Piece(chunked, min(chunk, len(chunked.ids) - chunked.done))]))
    torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "mistral-window"])
def test_llava_rows_of_a_mixed_batch_equal_rows_alone(checkpoint, name):
    """One step with a whole prompt, a middle chunk, a last chunk and two decoding rows."""
    shape = SHAPES[name]
    driver = Driver(checkpoint(shape))
    tiles = pictures(3, shape.image_size)
    prompts = [
        ("USER: <image> What? ASSISTANT:", tiles[:1], 0),
        (PROMPT, tiles[1:], 5),
        (PROMPT, tiles[:2], 30),
        ("USER: Three? ASSISTANT:", [], None),
        ("USER: <image> Which? ASSISTANT:", tiles[2:], None),
    ]

    def prepared() -> list[Piece]:
        pieces = []
        for text, own, done in prompts:
            row = driver.prompt(text, own)
            if done is None:
                driver.prefill(row)
                row.ids.append(77)
            elif done:
                driver.run([Piece(row, done)])
            middle = done == 5
            pieces.append(Piece(row, 11 if middle else len(row.ids) - row.done))
        return pieces

    together = driver.run(prepared())
    alone = torch.cat([driver.run([piece]) for piece in prepared()])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llava_half_precision_stays_near_transformers_float32(checkpoint, dtype):
    """Not further from the float32 truth than twice transformers' own error in this dtype."""
    shape = SHAPES["gqa"]
    folder = checkpoint(shape)
    driver = Driver(folder, dtype=dtype)
    tiles = pictures(2, shape.image_size)
    pixels = pixel_values(driver, tiles)
    row = driver.prompt(PROMPT, tiles)
    truth = Oracle(folder).logits(row.ids, pixels)
    theirs = (Oracle(folder, dtype).logits(row.ids, pixels) - truth).abs()
    ours = (driver.prefill(row) - truth).abs()
    assert ours.mean() <= 2 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


def _swapped(driver: Driver, tiles: list[torch.Tensor]) -> Row:
    return driver.prompt(PROMPT, tiles[::-1])


def _shifted(driver: Driver, tiles: list[torch.Tensor]) -> Row:
    """All tokens but the first one position late: a shift of every one would change nothing."""
    row = driver.prompt(PROMPT, tiles)
    driver.run([Piece(row, 1)])
    driver.position_shift = 1
    return row


def _permuted(driver: Driver, tiles: list[torch.Tensor]) -> Row:
    row = driver.prompt(PROMPT, tiles)
    assert row.features is not None
    row.features = row.features.roll(1, dims=0)
    return row


def _transposed(driver: Driver, tiles: list[torch.Tensor]) -> Row:
    return driver.prompt(PROMPT, [tile.transpose(0, 1).contiguous() for tile in tiles])


def _wrong_channels(driver: Driver, tiles: list[torch.Tensor]) -> Row:
    return driver.prompt(PROMPT, [tile.flip(-1) for tile in tiles])


@pytest.mark.parametrize("mistake", [_swapped, _shifted, _permuted, _transposed, _wrong_channels])
def test_llava_mistakes_move_logits_by_1000_tolerances(checkpoint, mistake):
    """The comparison with transformers can fail."""
    shape = SHAPES["gqa"]
    driver = Driver(checkpoint(shape))
    tiles = pictures(2, shape.image_size)
    expected = driver.prefill(driver.prompt(PROMPT, tiles))[-1]
    wrong = driver.prefill(mistake(driver, tiles))[-1]
    assert (wrong - expected).abs().max() > 1000 * TOLERANCE
