"""Runs a model without the engine: sequences, blocks and attention inputs by hand, so that models are tested alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.models.load import load_model
from opsin.models.rule import Positions

BLOCK_SIZE = 4


@dataclass
class Row:
    """One sequence: its tokens, the features of its placeholders in order, and the blocks it holds.

    ``positions`` are the prompt's, where they are not 0, 1, 2, ...
    """

    ids: list[int]
    features: torch.Tensor | None = None
    positions: Positions | None = None
    blocks: list[int] = field(default_factory=list)
    done: int = 0

    def position(self, index: int, axis: int) -> int:
        if self.positions is None:
            return index
        known = self.positions.axes[axis]
        return known[index] if index < len(known) else index + self.positions.delta


class Piece(NamedTuple):
    """The next ``num_tokens`` tokens of a row."""

    row: Row
    num_tokens: int


class Driver:
    """A model with its cache. Blocks are handed out in a shuffled order, so that block tables matter."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        kernels: str = "auto",
        num_blocks: int = 256,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        files = find_model(str(folder), overrides=overrides)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        family = resolve(files.config["architectures"])
        self.rule = family.load_rule().from_hf(files.config, files.processor, self.tokenizer)
        self.model = load_model(files, self.rule.norm, device=torch.device("cpu"), dtype=dtype, kernels=kernels)
        self.image_token_id = self.rule.image_token_id
        self.position_shift = 0
        self._free = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1).tolist()
        shape = (num_blocks, BLOCK_SIZE)
        self.caches = [
            LayerCache(*(torch.zeros(*shape, spec.num_kv_heads, spec.head_dim, dtype=dtype) for _ in range(2)))
            for spec in self.model.spec.layers
        ]

    def encode(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features of uint8 (height, width, 3) pictures that already have the tower's size."""
        layouts = [self.rule.layout("image", p.shape[1], p.shape[0], 1, {}) for p in pictures]
        with torch.inference_mode():
            return self.model.encode([[picture] for picture in pictures], layouts)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """One step; logits of every token, (T, V)."""
        ids: list[int] = []
        positions: list[list[int]] = [[] for _ in range(self.model.spec.num_position_axes)]
        slots: list[int] = []
        tables: list[list[int]] = []
        features: list[torch.Tensor] = []
        for row, num_tokens in pieces:
            end = row.done + num_tokens
            while len(row.blocks) * BLOCK_SIZE < end:
                row.blocks.append(self._free.pop())
            indices = range(row.done, end)
            ids += [row.ids[i] for i in indices]
            for axis, values in enumerate(positions):
                values += [row.position(i, axis) for i in indices]
            slots += [row.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in indices]
            tables.append(row.blocks)
            before = row.ids[: row.done].count(self.image_token_id)
            count = row.ids[row.done : end].count(self.image_token_id)
            if count:
                assert row.features is not None
                features.append(row.features[before : before + count])
        width = max(map(len, tables))
        lens = [piece.num_tokens for piece in pieces]
        context = [piece.row.done + piece.num_tokens for piece in pieces]
        inputs = AttentionInputs(
            query_start_B1=torch.tensor([0, *lens]).cumsum(0).int(),
            context_lens_B=torch.tensor(context, dtype=torch.int32),
            block_tables_BL=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
            slot_mapping_T=torch.tensor(slots),
            query_lens=tuple(lens),
            context_lens=tuple(context),
        )
        ids_T = torch.tensor(ids)
        hidden_TD = self.model.embed(ids_T)
        if features:
            hidden_TD[ids_T == self.image_token_id] = torch.cat(features)
        positions_AT = torch.tensor(positions) + self.position_shift
        logits_TV = self.model.logits(self.model.forward(hidden_TD, positions_AT, inputs, self.caches))
        for row, num_tokens in pieces:
            row.done += num_tokens
        return logits_TV

    def prompt(self, text: str, pictures: Sequence[torch.Tensor] = ()) -> Row:
        """A row from a prompt whose ``<image>`` marks are expanded."""
        features = self.encode(pictures) if pictures else None
        expanded: list[int] = []
        for token in self.tokenizer.encode(text):
            expanded += [token] * (self.rule.num_features if token == self.image_token_id else 1)
        return Row(expanded, features)

    def prefill(self, row: Row) -> torch.Tensor:
        """Logits of all prompt tokens, in one step."""
        return self.run([Piece(row, len(row.ids) - row.done)])

    def generate(self, row: Row, num_tokens: int, chunk: int | None = None) -> list[int]:
        """Greedy tokens; the prompt in chunks of ``chunk``."""
        logits = torch.empty(0)
        while row.done < len(row.ids):
            logits = self.run([Piece(row, min(chunk or len(row.ids), len(row.ids) - row.done))])
        new: list[int] = []
        for _ in range(num_tokens):
            new.append(int(logits[-1].argmax()))
            row.ids.append(new[-1])
            logits = self.run([Piece(row, 1)])
        return new


class Oracle:
    """transformers on the same folder."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], pixels: torch.Tensor | None) -> torch.Tensor:
        """(T, V) in float32."""
        inputs = {} if pixels is None else {"pixel_values": pixels.to(self.model.dtype)}
        return self.model(input_ids=torch.tensor([ids]), **inputs).logits[0].float()

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], pixels: torch.Tensor | None, num_tokens: int) -> list[int]:
        inputs = {} if pixels is None else {"pixel_values": pixels.to(self.model.dtype)}
        out = self.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            **inputs,
        )
        return out[0, len(ids) :].tolist()


def pictures(count: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    """Random uint8 (size, size, 3) pictures."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator) for _ in range(count)]


def pixel_values(driver: Driver, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
    """What transformers' processor makes of the tiles: (B, 3, height, width) float32."""
    norm = driver.rule.norm
    mean, std = torch.tensor(norm.mean), torch.tensor(norm.std)
    return ((torch.stack(list(tiles)).float() * norm.scale - mean) / std).permute(0, 3, 1, 2)
