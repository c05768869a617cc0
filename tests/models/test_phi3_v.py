"""Phi-3-vision's rule and refusals, and the mistakes that comparing it with its reference would show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from opsin.errors import MediaError, RequestError, UnsupportedModelError, WeightError
from opsin.models.hub import find_model
from opsin.models.phi3_v import model as phi3_v
from opsin.models.phi3_v.rule import Phi3VRule, fitted
from opsin.types import Pad, Resize
from tests.factories.families import PHI3_V as FAMILY
from tests.factories.family import Family
from tests.factories.phi3_v import Phi3VShape, write_phi3_v
from tests.models.driver import TOLERANCE, Driver, Row, copy_with_weights, flip_channels, meta_model, pictures

Tiny = Callable[[Family, str], Path]


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> Phi3VRule:
    return Driver(write_phi3_v(tmp_path_factory.mktemp("rule"), Phi3VShape())).rule  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "expected"),
    [
        (640, 480, 4, (672, 504)),
        (640, 480, 16, (4 * 336, 1008)),
        (480, 480, 4, (672, 672)),
        (480, 480, 3, (336, 336)),
        (5000, 100, 16, (16 * 336, 107)),
        (1, 1, 16, (4 * 336, 4 * 336)),
    ],
)
def test_fitted_takes_the_most_tiles_that_are_allowed(
    width: int, height: int, num_crops: int, expected: tuple[int, int]
):
    assert fitted(width, height, 336, num_crops) == expected


def test_layout_of_a_tall_picture_is_the_wide_one_s_on_its_side(rule: Phi3VRule):
    """With its height resized first, as Pillow does it with the width of a picture that lies on its side."""
    wide, tall = (rule.layout("image", *size, 1, {}) for size in ((90, 40), (40, 90)))
    assert (wide.numbers, tall.numbers) == ((1, 2), (2, 1))
    pads = [layout.plan.views[0].ops[-1] for layout in (wide, tall)]
    assert pads == [Pad(0, 2, 0, 2, (255, 255, 255)), Pad(2, 0, 2, 0, (255, 255, 255))]
    assert tall.plan.views[0].ops[:-1] == (Resize(40, 64, "bilinear"), Resize(28, 64, "bilinear"))


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (129 * 5, 5)])
def test_layout_of_a_picture_that_would_vanish_is_refused(rule: Phi3VRule, size: tuple[int, int]):
    with pytest.raises(MediaError, match="too narrow"):
        rule.layout("image", *size, 1, {})


@pytest.mark.parametrize("num_crops", [0, -1, 65, 2.0, True, "4", None])
def test_num_crops_that_is_no_count_is_refused(rule: Phi3VRule, num_crops: Any):
    if num_crops is None:  # says nothing
        assert rule.layout("image", 90, 70, 1, {"num_crops": None}) == rule.layout("image", 90, 70, 1, {})
        return
    with pytest.raises(RequestError, match="num_crops is"):
        rule.layout("image", 90, 70, 1, {"num_crops": num_crops})


def test_embedding_layout_takes_what_some_picture_has_and_no_more(rule: Phi3VRule):
    made = {
        rule.layout("image", w, h, 1, {"num_crops": 12}).num_features
        for w, h in [(w, h) for w in range(10, 200, 10) for h in range(10, 200, 10)]
    }
    grid = rule.tile.grid
    possible = {
        rows * grid * (cols * grid + 1) + 1 + grid * (grid + 1) for rows in range(1, 80) for cols in range(1, 80)
    }
    assert made <= possible
    for count in range(1, 150):
        if count in possible:
            assert rule.embedding_layout("image", count, {}).num_features == count
        else:
            with pytest.raises(RequestError, match=f"has {count} rows; no picture has as many"):
                rule.embedding_layout("image", count, {})


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, r"embd_layer\.hd_transform_order is 'glb_sub'"),
        ({"embd_layer": {"projection_cls": "linear"}}, "projection_cls"),
        ({"embd_layer": {"use_hd_transform": False}}, "use_hd_transform"),
        ({"embd_layer": {"with_learnable_separator": None}}, "with_learnable_separator"),
        ({"embd_layer": {"new": 1}}, r"embd_layer\.new"),
        ({"img_processor": {"type_feature": "cls_patch"}}, "type_feature"),
        ({"img_processor": {"image_dim_out": 48}}, "image_dim_out"),
        ({"img_processor": {"layer_idx": -5}}, "has 3 layers"),
        ({"img_processor": {"new": 1}}, r"img_processor\.new"),
        ({"img_processor": {"model_name": "facebook/dinov2"}, "vision_config": None}, "facebook/dinov2"),
        ({"vision_config": {"patch_size": [8, 4]}}, "square|patch_size"),
        ({"rope_scaling": {"type": "yarn"}}, "lacks factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_experts": 16}, "num_experts"),
    ],
)
def test_phi3_v_config_that_is_not_implemented_is_refused(tmp_path: Path, change: dict[str, Any], reason: str):
    config = find_model(str(write_phi3_v(tmp_path, Phi3VShape())), overrides=change).config
    with pytest.raises(UnsupportedModelError, match=reason):
        meta_model(config)


def test_phi3_v_longrope_with_too_few_factors_is_refused(tmp_path: Path):
    change = {"rope_scaling": {"long_factor": [1.0] * 7}}
    with pytest.raises(UnsupportedModelError, match="7 factors; expected 8"):
        Driver(write_phi3_v(tmp_path, Phi3VShape()), overrides=change)


def test_phi3_v_processor_setting_that_is_not_implemented_is_refused(tmp_path: Path):
    files, tokenizer = find_model(str(write_phi3_v(tmp_path, Phi3VShape()))), Driver(tmp_path).tokenizer
    for extra, reason in (({"dynamic_hd": 4}, "dynamic_hd"), ({"num_crops": 0}, "num_crops is 0")):
        with pytest.raises(UnsupportedModelError, match=reason):
            Phi3VRule.from_hf(files.config, {**files.processor, **extra}, tokenizer)


def test_phi3_v_missing_and_surplus_weights_are_named(tiny: Tiny, tmp_path: Path):
    folder = tiny(FAMILY, "mha")
    weights = load_file(folder / "model.safetensors")
    weights["model.vision_embed_tokens.new_GN"] = weights.pop("model.vision_embed_tokens.sub_GN")
    with pytest.raises(WeightError, match=r"missing: row_separator.*unused: model\.vision_embed_tokens\.new_GN"):
        Driver(copy_with_weights(folder, tmp_path, weights))


def test_phi3_v_loads_without_the_copy_of_its_embeddings(tiny: Tiny, tmp_path: Path):
    folder = tiny(FAMILY, "mha")
    weights = load_file(folder / "model.safetensors")
    del weights["model.vision_embed_tokens.wte.weight"]
    rows = [driver.prefill(driver.prompt("a")) for driver in (Driver(folder), _copied(folder, tmp_path, weights))]
    assert torch.equal(*rows)


def _copied(folder: Path, to: Path, weights: dict[str, torch.Tensor]) -> Driver:
    return Driver(copy_with_weights(folder, to, weights))


# ------------------------------------------------------------------------------------------------ mistakes show


def _swapped(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    row = driver.prompt(FAMILY.question, images)
    row.features = driver.encode(images[::-1])
    return row


def _overview_first(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """The other order that the published code knows the name of."""
    row = driver.prompt(FAMILY.question, images)
    assert row.features is not None
    counts = [item.layout.num_features for item in driver.items(images)]
    overview = driver.rule.tile.grid * (driver.rule.tile.grid + 1)
    row.features = torch.cat([part.roll(overview, 0) for part in row.features.split(counts)])
    return row


def _tiles_one_after_another(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """Each tile's features by themselves, not row by row through the mosaic."""

    def wrong(first: int, rows: int, cols: int, grid: int) -> Any:
        area = grid * grid
        return torch.arange(first * area, (first + rows * cols) * area).reshape(rows * grid, cols * grid).numpy()

    patch.setattr(phi3_v, "_numbered", wrong)
    return driver.prompt(FAMILY.question, images)


def _overview_antialiased(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    right = F.interpolate
    patch.setattr(phi3_v.F, "interpolate", lambda *args, **kwargs: right(*args, **kwargs, antialias=True))
    return driver.prompt(FAMILY.question, images)


def _padded_with_black(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    patch.setattr("opsin.models.phi3_v.rule._WHITE", (0, 0, 0))
    return driver.prompt(FAMILY.question, images)


def _separators_exchanged(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    model: Any = driver.model
    rows, views = model.row_separator.data, model.view_separator.data
    model.row_separator.data, model.view_separator.data = views[None], rows[0]
    return driver.prompt(FAMILY.question, images)


def _text_goes_on_behind_pictures(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    """Without the token that begins every chunk of text."""
    row = driver.prompt(FAMILY.question, images)
    begin = row.ids[0]
    row.ids = [begin, *(token for token in row.ids if token != begin)]
    return row


def _flipped_channels(driver: Driver, images: list[Image.Image], patch: pytest.MonkeyPatch) -> Row:
    return driver.prompt(FAMILY.question, flip_channels(images))


@pytest.mark.parametrize(
    "mistake",
    [
        _swapped,
        _overview_first,
        _tiles_one_after_another,
        _overview_antialiased,
        _padded_with_black,
        _separators_exchanged,
        _text_goes_on_behind_pictures,
        _flipped_channels,
    ],
)
def test_phi3_v_mistakes_move_logits_by_1000_tolerances(tiny: Tiny, mistake: Any, monkeypatch: pytest.MonkeyPatch):
    """The comparison with the reference can fail."""
    driver = Driver(tiny(FAMILY, "mha"))
    images = pictures([(90, 60), (90, 60)])
    right = driver.prefill(driver.prompt(FAMILY.question, images))[-1]
    wrong = driver.prefill(mistake(driver, images, monkeypatch))[-1]
    assert (right - wrong).abs().max() > 1000 * TOLERANCE


def test_phi3_v_long_and_short_factors_differ(tmp_path: Path):
    """By the longest sequence that may run, whatever the prompt's own length."""
    folder = write_phi3_v(tmp_path, Phi3VShape(original=256))
    drivers = [Driver(folder, max_model_len=length) for length in (256, 257, None)]
    short, longer, longest = (driver.prefill(driver.prompt("How many colours are there?")) for driver in drivers)
    assert torch.equal(longer, longest)
    assert (short - longer).abs().max() > 1000 * TOLERANCE


def test_phi3_v_features_do_not_depend_on_the_tower_s_passes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    driver, images = Driver(tiny(FAMILY, "mha")), pictures([(90, 60), (200, 33), (1, 1)])
    whole = driver.encode(images)
    for most in (1, 16, 40, 100):
        monkeypatch.setattr(phi3_v, "MAX_PASS", most)
        torch.testing.assert_close(driver.encode(images), whole, atol=1e-6, rtol=0)
