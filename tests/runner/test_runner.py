"""The runner with a model made of a few lines, for what no supported family needs yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opsin.kernels import reference
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.params import SamplingParams
from opsin.runner.executor import Embedding, Pixels
from opsin.runner.runner import ModelRunner
from opsin.types import (
    EncodeItem,
    FeatureUse,
    LayerCacheSpec,
    MediaLayout,
    ModelSpec,
    PixelPlan,
    Resize,
    RowPlan,
    SlotOpen,
    StepPlan,
    View,
)

HIDDEN, EXTRA, VOCAB = 4, 6, 11


class Recorder:
    """A model that keeps what its decoder was given."""

    spec = ModelSpec(
        architecture="Recorder",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        feature_width=HIDDEN + EXTRA,
        max_position=32,
        layers=(LayerCacheSpec(1, 2),),
    )

    def __init__(self) -> None:
        self.hidden_TD = torch.empty(0)
        self.extra_TE: torch.Tensor | None = None

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return iter(())

    def encode(self, tiles: Any, layouts: Any) -> torch.Tensor:
        raise AssertionError("only embeddings are given")

    def embed(self, ids_T: torch.Tensor) -> torch.Tensor:
        return -ids_T[:, None].float().expand(-1, HIDDEN).clone()

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_AT: torch.Tensor,
        attention: AttentionInputs,
        caches: Sequence[LayerCache],
        extra_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.hidden_TD, self.extra_TE = hidden_TD.clone(), extra_TE
        return hidden_TD

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden_BD), VOCAB)

    def ranking(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden_BD)


def test_features_wider_than_the_model_hand_their_further_columns_to_deeper_layers():
    model = Recorder()
    runner = ModelRunner(
        model, max_num_seqs=1, max_model_len=16, block_size=4, device=torch.device("cpu"), dtype=torch.float32
    )
    runner.allocate_kv(4)
    features = np.arange(3 * (HIDDEN + EXTRA), dtype=np.float32).reshape(3, -1)
    runner.put_payload(b"k", Embedding(features))
    layout = MediaLayout(PixelPlan(0, 0, ()), num_features=3, num_patches=0)
    opened = SlotOpen(0, [1, 2, 2, 2, 3], 5, SamplingParams(), 0, None, 0, [], frozenset())
    # The chunk begins at the second feature row.
    row = RowPlan(0, 2, 3, (1, 2), True, (FeatureUse(0, 1, 0, 2),))
    runner.launch(StepPlan(0, (row,), (opened,), (EncodeItem(0, b"k", layout),))).result()

    expected = torch.from_numpy(features[1:])
    assert torch.equal(model.hidden_TD[:2], expected[:, :HIDDEN])
    assert torch.equal(model.hidden_TD[2], torch.full((HIDDEN,), -3.0))
    assert model.extra_TE is not None
    assert torch.equal(model.extra_TE[:2], expected[:, HIDDEN:])
    assert not model.extra_TE[2].any()

    runner.launch(StepPlan(1, (RowPlan(0, 5, 1, (), True),))).result()
    assert model.extra_TE is None


def test_given_features_are_kept_apart_from_the_memory_of_the_caller():
    model = Recorder()
    runner = ModelRunner(
        model, max_num_seqs=1, max_model_len=16, block_size=4, device=torch.device("cpu"), dtype=torch.float32
    )
    features = np.ones((2, HIDDEN + EXTRA), dtype=np.float32)
    runner.put_payload(b"k", Embedding(features))
    layout = MediaLayout(PixelPlan(0, 0, ()), num_features=2, num_patches=0)
    runner.launch(StepPlan(0, (), (), (EncodeItem(0, b"k", layout),))).result()
    features[:] = 2.0  # the caller's next use of the buffer; whoever hits the cache must not see it
    hidden_TD = torch.zeros(2, HIDDEN)
    runner.vision.scatter(hidden_TD, [RowPlan(0, 0, 2, (), False, (FeatureUse(0, 0, 0, 2),))], [0])
    assert (hidden_TD == 1.0).all()


def test_raw_pictures_are_resized_by_the_kernels_that_the_runner_was_given():
    axes: list[int] = []

    def resample(picture_YX3: torch.Tensor, taps: torch.Tensor, axis: int, out_YX3: torch.Tensor) -> None:
        axes.append(axis)
        reference.resample(picture_YX3, taps, axis, out_YX3)

    class Tower(Recorder):
        def encode(self, tiles: Any, layouts: Any) -> torch.Tensor:
            return torch.zeros(1, HIDDEN + EXTRA)

    runner = ModelRunner(
        Tower(),
        max_num_seqs=1,
        max_model_len=16,
        block_size=4,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=replace(reference.KERNELS, resample=resample),
    )
    runner.put_payload(b"k", Pixels(np.zeros(5 * 6 * 3, dtype=np.uint8), is_raw=True))
    plan = PixelPlan(width=5, height=6, views=(View((Resize(3, 4),), height=4, width=3),))
    runner.launch(StepPlan(0, (), (), (EncodeItem(0, b"k", MediaLayout(plan, 1, 1)),))).result()
    assert sorted(axes) == [0, 1]
