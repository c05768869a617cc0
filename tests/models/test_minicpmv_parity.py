"""MiniCPM-V against what its reference code made of tiny checkpoints, and the mistakes that this would show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opsin.errors import UnsupportedModelError, WeightError
from opsin.models.hub import find_model
from opsin.models.towers.siglip_navit import part_below
from opsin.models.weights import _slots, pack
from opsin.processing import expand
from opsin.processing.neutral import Rendered
from opsin.processing.tokenizer import Tokenizer
from tests.factories import minicpmv as factory
from tests.factories.minicpmv import TOLERANCE, Case
from tests.models.driver import Driver, Piece, Row, copy_with_weights, flip_channels, meta_model

pytestmark = factory.needs_recorded_pillow

Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Write:
    folders = {
        name: factory.write_minicpmv(tmp_path_factory.mktemp(name), shape) for name, shape in factory.SHAPES.items()
    }
    return lambda name: folders[name]


def case_of(name: str, case: str) -> Case:
    return next(found for found in factory.recorded_cases(name) if found.case == case)


def row_of(driver: Driver, folder: Path, case: Case) -> Row:
    """The prompt as the engine makes it, about the case's pictures."""
    tokenizer = Tokenizer.from_folder(folder)
    items = driver.items(case.images, case.options)
    marks = {"image": driver.rule.placeholder("image")}
    slotted = expand.tokenize(Rendered(case.text), marks, tokenizer, add_special_tokens=True)  # type: ignore[arg-type]
    written = expand.write(items, driver.rule, tokenizer)
    expanded = expand.expand(slotted, written)
    if not items:
        return Row(expanded.token_ids)
    with torch.inference_mode():
        features = driver.model.encode(*driver.read(case.images, case.options))
    return Row(expanded.token_ids, features)


@pytest.mark.parametrize("name", factory.SHAPES)
def test_logits_and_greedy_ids_equal_the_reference(tiny: Write, name: str):
    driver = Driver(tiny(name), num_blocks=2048)
    for case in factory.recorded_cases(name):
        if case.case == "video":
            continue  # tests/engine: frames are not the driver's
        assert case.logits.std(-1).min() >= 0.5
        row = row_of(driver, tiny(name), case)
        assert row.ids == case.ids, case.case
        logits = driver.prefill(row)
        torch.testing.assert_close(logits[case.at], case.logits, atol=TOLERANCE, rtol=0, msg=case.case)
        assert driver.generate(row_of(driver, tiny(name), case), 16) == case.greedy, case.case


@pytest.mark.parametrize("name", factory.SHAPES)
@pytest.mark.parametrize("kernels", ["reference", "packed"])
def test_features_over_sizes_equal_the_reference(tiny: Write, name: str, kernels: str):
    """Many pictures of unlike sizes in one packed pass, which the reference took slice by slice."""
    driver = Driver(tiny(name), kernels=kernels)
    cases = factory.recorded_sizes(name)
    features = driver.encode([case.image for case in cases])
    expected = torch.cat([case.features for case in cases])
    torch.testing.assert_close(features[:, ::37], expected, atol=TOLERANCE, rtol=0)
    alone = torch.cat([driver.encode([case.image]) for case in cases])
    torch.testing.assert_close(features, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", factory.SHAPES)
def test_prefill_in_chunks_and_in_a_mixed_batch_equals_the_reference(tiny: Write, name: str):
    driver = Driver(tiny(name))
    two, three, text = (case_of(name, case) for case in ("two", "three", "text"))
    for chunk in (1, 7, 50):
        row = row_of(driver, tiny(name), two)
        parts: list[torch.Tensor] = []
        while row.done < len(row.ids):
            parts.append(driver.run([Piece(row, min(chunk, len(row.ids) - row.done))]))
        torch.testing.assert_close(torch.cat(parts)[two.at], two.logits, atol=TOLERANCE, rtol=0)
    rows = [row_of(driver, tiny(name), case) for case in (text, two, three)]
    driver.run([Piece(rows[1], 40)])
    logits = driver.run([Piece(row, len(row.ids) - row.done) for row in rows])
    ends = torch.tensor([len(text.ids), len(two.ids) - 40, len(three.ids)]).cumsum(0) - 1
    expected = torch.stack([case.logits[-1] for case in (text, two, three)])
    torch.testing.assert_close(logits[ends], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", factory.SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_the_float32_reference(tiny: Write, name: str, dtype: str):
    """Not further from the float32 truth than twice the reference's own error in this dtype."""
    case = case_of(name, "two")
    mean, most = factory.recorded_rounding(name)[dtype]
    driver = Driver(tiny(name), dtype=getattr(torch, dtype))
    error = (driver.prefill(row_of(driver, tiny(name), case))[case.at] - case.logits).abs()
    assert error.mean() <= 2 * mean
    assert error.max() <= 2 * most


@pytest.mark.parametrize("side", [1, 2, 7, 32, 69, 70, 71, 25, 49])
def test_part_below_is_where_a_patch_begins(side: int):
    """But for the reference's rounding where both begin together, as it does at each multiple of 5, or of 7."""
    parts = part_below(side, 70).tolist()
    assert len(parts) == side
    early = [i for i, part in enumerate(parts) if part != i * 70 // side]
    assert len(early) == {25: 4, 49: 4}.get(side, 0)
    assert all(i * 70 % side == 0 and parts[i] == i * 70 // side - 1 for i in early)


def test_encode_reads_nothing_back_from_the_device(tiny: Write):
    model = meta_model(find_model(str(tiny("plain"))).config)
    pack(model)
    case = case_of("plain", "two")
    tiles, layouts = Driver(tiny("plain")).read(case.images)
    features = model.encode([[tile.to("meta") for tile in item] for item in tiles], layouts)
    assert features.shape == (sum(layout.num_features for layout in layouts), model.spec.hidden_size)


# ------------------------------------------------------------------------------------------- the hub's checkpoint


def test_hub_config_takes_every_tensor_of_the_checkpoint():
    """No name and no parameter is left over, and shapes agree."""
    config = factory.hub_config()
    model = meta_model(config)
    table = model.weight_table()
    ours = {name: slot.shape for name, slot in _slots(model).items()}
    theirs = {table.rename(name): shape for name, shape in factory.recorded_parameters().items()}
    assert len(theirs) == 789
    assert {name: ours.get(name) for name in theirs} == theirs
    parts = {part for slot in _slots(model).values() for part in slot.parts}
    assert parts <= set(theirs)
    assert sum(p.numel() for p in model.parameters()) == 8_099_175_152


def test_dropped_last_layer_is_not_built():
    config = factory.hub_config()
    absent = {key: value for key, value in config.items() if key != "drop_vision_last_layer"}
    configs = (config, absent, config | {"drop_vision_last_layer": True})
    layers = [len(meta_model(c).tower.encoder.layers) for c in configs]
    assert layers == [27, 26, 26]


def test_missing_resampler_weight_is_named(tiny: Write, tmp_path: Path):
    weights = load_file(tiny("plain") / "model.safetensors")
    del weights["resampler.attn.in_proj_bias"]
    with pytest.raises(WeightError, match=r"projector\.attn\.in_proj_bias"):
        Driver(copy_with_weights(tiny("plain"), tmp_path, weights))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "2.5"}, "version is '2.5'"),
        ({"version": None}, "version is None"),
        ({"qk_norm": True}, "text_config.qk_norm"),
        ({"vision_config": {"use_head": True}}, "vision_config.use_head"),
        ({"vision_config": {"num_channels": 4}}, "num_channels"),
        ({"hidden_size": 192}, "128 wide"),
    ],
)
def test_config_that_is_not_implemented_is_refused(tiny: Write, change: dict[str, Any], reason: str):
    with pytest.raises(UnsupportedModelError, match=reason):
        Driver(tiny("plain"), overrides=change)


# ------------------------------------------------------------------------------------------------ mistakes show


def _swapped(driver: Driver, folder: Path, case: Case) -> Row:
    row = row_of(driver, folder, case)
    row.features = driver.encode(case.images[::-1])
    return row


def _overview_last(driver: Driver, folder: Path, case: Case) -> Row:
    row = row_of(driver, folder, case)
    assert row.features is not None
    row.features = torch.cat([row.features[factory.QUERIES :], row.features[: factory.QUERIES]])
    return row


def _columns_as_rows(driver: Driver, folder: Path, case: Case) -> Row:
    """In the tower's positions alone."""
    tower: Any = driver.model.tower  # type: ignore[attr-defined]
    positions = tower._positions
    tower._positions = lambda grids: positions([(cols, rows) for rows, cols in grids])
    return row_of(driver, folder, case)


def _rows_first(driver: Driver, folder: Path, case: Case) -> Row:
    """In the resampler's places alone."""
    resampler: Any = driver.model.projector  # type: ignore[attr-defined]
    places = resampler._places
    resampler._places = lambda packed: places(packed).unflatten(1, (2, -1)).flip(1).flatten(1)
    return row_of(driver, folder, case)


def _placeless_queries(driver: Driver, folder: Path, case: Case) -> Row:
    resampler: Any = driver.model.projector  # type: ignore[attr-defined]
    resampler._places = lambda packed: torch.zeros(len(packed.x_PD), factory.HIDDEN)
    return row_of(driver, folder, case)


def _transposed_projection(driver: Driver, folder: Path, case: Case) -> Row:
    resampler: Any = driver.model.projector  # type: ignore[attr-defined]
    resampler.proj.data = resampler.proj.data.T
    return row_of(driver, folder, case)


def _without_last_norm(driver: Driver, folder: Path, case: Case) -> Row:
    driver.model.tower.post_layernorm = torch.nn.Identity()  # type: ignore[attr-defined]
    return row_of(driver, folder, case)


def _flipped_channels(driver: Driver, folder: Path, case: Case) -> Row:
    row = row_of(driver, folder, case)
    row.features = driver.encode(flip_channels(case.images))
    return row


@pytest.mark.parametrize(
    "mistake",
    [
        *(_swapped, _overview_last, _columns_as_rows, _rows_first, _placeless_queries, _transposed_projection),
        *(_without_last_norm, _flipped_channels),
    ],
)
def test_mistakes_move_logits_by_1000_tolerances(tiny: Write, mistake: Callable[..., Row]):
    """The comparison with the reference can fail."""
    case = case_of("plain", "two")
    driver = Driver(tiny("plain"))
    wrong = driver.prefill(mistake(driver, tiny("plain"), case))[case.at]
    assert (wrong - case.logits).abs().max() > 1000 * TOLERANCE
