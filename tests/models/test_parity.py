"""Every family against transformers, on tiny random checkpoints.

That these comparisons can fail is shown in each family's own file, by likely mistakes that move logits by 1,000
tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from opsin.models.hub import find_model
from opsin.models.weights import _slots, pack
from tests.factories.families import over
from tests.factories.family import Family
from tests.models.driver import TOLERANCE, Driver, Oracle, Piece, copy_with_weights, meta_model, pictures

Tiny = Callable[[Family, str], Path]
TEXT_ONLY = "USER: How many cats are there? ASSISTANT:"


@over(lambda family: family.shapes)
def test_logits_and_greedy_ids_equal_transformers(tiny: Tiny, family: Family, name: str):
    folder = tiny(family, name)
    driver, oracle = Driver(folder), Oracle(family.load(folder))
    images = pictures(family.sizes)
    inputs = family.hf_inputs(folder, family.question, images)
    expected = oracle.logits(inputs)
    assert expected.std(-1).min() >= 0.5

    row = driver.prompt(family.question, images)
    assert row.ids == inputs["input_ids"][0].tolist()
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)
    assert driver.generate(driver.prompt(family.question, images), 16) == oracle.generate(inputs, 16)


@over(lambda family: family.towers)
@pytest.mark.parametrize("kernels", ["reference", "packed"])
def test_features_over_sizes_equal_transformers(tiny: Tiny, family: Family, name: str, kernels: str):
    """Many pictures of unlike sizes in one packed pass."""
    folder = tiny(family, name)
    driver, oracle = Driver(folder, kernels=kernels), Oracle(family.load(folder))
    images = pictures(family.feature_sizes)
    features = driver.encode(images)
    expected = oracle.features(family.pictures_inputs(folder, images))
    torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)
    alone = torch.cat([driver.encode([image]) for image in images])
    torch.testing.assert_close(features, alone, atol=TOLERANCE, rtol=0)


@over(lambda family: family.paged)
@pytest.mark.parametrize("kernels", ["reference", "packed"])
def test_text_only_prompt_equals_transformers(tiny: Tiny, family: Family, name: str, kernels: str):
    folder = tiny(family, name)
    driver, oracle = Driver(folder, kernels=kernels), Oracle(family.load(folder))
    row = driver.prompt(TEXT_ONLY)
    assert row.positions is None
    inputs = family.hf_inputs(folder, TEXT_ONLY)
    assert row.ids == inputs["input_ids"][0].tolist()
    expected = oracle.logits(inputs)
    torch.testing.assert_close(driver.prefill(row), expected, atol=TOLERANCE, rtol=0)


@over(lambda family: family.paged)
def test_prefill_in_chunks_equals_whole(tiny: Tiny, family: Family, name: str):
    driver = Driver(tiny(family, name))
    images = pictures(family.sizes)
    expected = driver.prefill(driver.prompt(family.question, images))
    for chunk in (1, 7, 16, 50):
        row = driver.prompt(family.question, images)
        parts = []
        while row.done < len(row.ids):
            parts.append(driver.run([Piece(row, row.chunk(chunk))]))
        torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=0, msg=f"in chunks of {chunk}")


@over(lambda family: family.paged)
def test_rows_of_a_mixed_batch_equal_rows_alone(tiny: Tiny, family: Family, name: str):
    """One step with a whole prompt, a middle chunk, a last chunk and two decoding rows."""
    driver = Driver(tiny(family, name))
    images = pictures([(90, 70), (33, 200), (64, 64)])
    prompts = [
        (f"USER: {family.sign()} What? ASSISTANT:", images[:1], 0),
        (family.question, images[1:], 5),
        (family.question, images[:2], 30),
        ("USER: Three? ASSISTANT:", [], None),
        (f"USER: {family.sign()} Which? ASSISTANT:", images[2:], None),
    ]

    def prepared() -> list[Piece]:
        pieces = []
        for text, own, done in prompts:
            row = driver.prompt(text, own)
            if done is None:
                driver.prefill(row)
            elif done:
                driver.run([Piece(row, row.chunk(done))])
            if row.done == len(row.ids):
                row.ids.append(77)
            pieces.append(Piece(row, row.chunk(11 if done == 5 else len(row.ids))))
        return pieces

    together = driver.run(prepared())
    alone = torch.cat([driver.run([piece]) for piece in prepared()])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


@over(lambda family: family.towers)
def test_half_precision_stays_near_transformers_float32(tiny: Tiny, family: Family, name: str):
    """Not further from the float32 truth than twice transformers' own error in this dtype."""
    folder = tiny(family, name)
    images = pictures(family.sizes)
    inputs = family.hf_inputs(folder, family.question, images)
    truth = Oracle(family.load(folder)).logits(inputs)
    for dtype in (torch.bfloat16, torch.float16):
        driver = Driver(folder, dtype=dtype)
        theirs = (Oracle(family.load(folder, dtype)).logits(inputs) - truth).abs()
        ours = (driver.prefill(driver.prompt(family.question, images)) - truth).abs()
        assert ours.mean() <= 2 * theirs.mean(), dtype
        assert ours.max() <= 2 * theirs.max(), dtype


@over(lambda family: () if family.oracle else family.towers)
def test_weights_under_transformers_5_names_load(tiny: Tiny, family: Family, name: str, tmp_path: Path):
    """Named after its modules, not as on the hub."""
    folder = tiny(family, name)
    weights = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    saved = load_file(folder / "model.safetensors")
    assert (set(saved) - set(weights) != set()) == family.renamed
    images = pictures(family.sizes)
    first, second = Driver(folder), Driver(copy_with_weights(folder, tmp_path, weights))
    rows = [driver.prompt(family.question, images) for driver in (first, second)]
    assert torch.equal(first.prefill(rows[0]), second.prefill(rows[1]))


@over(lambda family: family.towers)
def test_encode_reads_nothing_back_from_the_device(tiny: Tiny, family: Family, name: str):
    """The meta device holds no values, so code that waits for one fails on it."""
    folder = tiny(family, name)
    model = meta_model(find_model(str(folder)).config)
    pack(model)
    tiles, layouts = Driver(folder).read(pictures(family.sizes))
    features = model.encode([[tile.to("meta") for tile in item] for item in tiles], layouts)
    assert features.shape == (sum(layout.num_features for layout in layouts), model.spec.feature_width)
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(1, device="meta").item()


@over(lambda family: family.towers)
def test_meta_model_has_the_checkpoint_s_parameters(tiny: Tiny, family: Family, name: str):
    """``opsin models show`` counts on the meta device. Layers behind the last that is wanted are not built."""
    folder = tiny(family, name)
    model = meta_model(find_model(str(folder)).config)
    table, places = model.weight_table(), _slots(model)
    saved = {table.rename(key): tensor.numel() for key, tensor in load_file(folder / "model.safetensors").items()}
    wanted = [count for key, count in saved.items() if key in places or not table.is_unused(key)]
    assert sum(p.numel() for p in model.parameters()) == sum(wanted)
