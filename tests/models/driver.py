"""Runs a model without the engine: sequences, blocks and attention inputs by hand, so that models are tested alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from opsin.config import MediaConfig
from opsin.kernels import select
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers import Placement
from opsin.media.ops import make_tiles
from opsin.media.source import open_picture
from opsin.models import resolve
from opsin.models.hub import find_model
from opsin.models.load import load_model
from opsin.models.rule import PixelNorm, Positions
from opsin.params import SamplingParams
from opsin.processing.processor import InputProcessor
from opsin.processing.tokenizer import Tokenizer
from opsin.runner.tower import cut_tiles
from opsin.types import MediaItem, MediaLayout

BLOCK_SIZE = 4
TOLERANCE = 1e-4
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class Row:
    """One sequence: its tokens, the features of its placeholders in order, and the blocks it holds.

    ``positions`` are the prompt's, where they are not 0, 1, 2, ...; in ``bidirectional`` ranges tokens see one another.
    """

    ids: list[int]
    features: torch.Tensor | None = None
    positions: Positions | None = None
    bidirectional: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    done: int = 0

    def position(self, index: int, axis: int) -> int:
        if self.positions is None:
            return index
        known = self.positions.axes[axis]
        return known[index] if index < len(known) else index + self.positions.delta

    def chunk(self, size: int) -> int:
        """How many tokens to run next: ``size``, more where that would cut a range, or all that are left."""
        end = min(self.done + size, len(self.ids))
        return max([end, *(stop for start, stop in self.bidirectional if start < end)]) - self.done

    def view(self, index: int) -> tuple[int, int]:
        """The range of a token, or the token alone."""
        return next(((start, end) for start, end in self.bidirectional if start <= index < end), (index, index + 1))


class Piece(NamedTuple):
    """The next ``num_tokens`` tokens of a row."""

    row: Row
    num_tokens: int


class Encodable(NamedTuple):
    """What ``model.encode`` takes."""

    tiles: list[list[torch.Tensor]]
    layouts: list[MediaLayout]


class Driver:
    """A model with its cache. Blocks are handed out in a shuffled order, so that block tables matter."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        kernels: str = "auto",
        num_blocks: int = 512,
        overrides: dict[str, Any] | None = None,
        max_model_len: int | None = None,
    ) -> None:
        files = find_model(str(folder), overrides=overrides)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        family = resolve(files.config)
        self.rule = family.load_rule().from_hf(files.config, files.processor, self.tokenizer)
        place: Any = {"device": torch.device("cpu"), "dtype": dtype, "kernels": kernels}
        self.model = load_model(files, self.rule.norm, max_model_len=max_model_len, **place)
        self.image_token_id = self.rule.image_token_id
        self.position_shift = 0
        self._free = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)) + 1).tolist()
        shape = (num_blocks, BLOCK_SIZE)
        self.caches = [
            LayerCache(*(torch.zeros(*shape, spec.num_kv_heads, spec.head_dim, dtype=dtype) for _ in range(2)))
            for spec in self.model.spec.layers
        ]

    def items(self, images: Sequence[Image.Image], options: Mapping[str, Any] | None = None) -> list[MediaItem]:
        """Pictures as the rule lays them out."""
        return [MediaItem(b"", "image", self.rule.layout("image", *image.size, 1, options or {})) for image in images]

    def read(self, images: Sequence[Image.Image], options: Mapping[str, Any] | None = None) -> Encodable:
        """Tiles as a media worker makes them, and layouts."""
        layouts = [item.layout for item in self.items(images, options)]
        tiles: list[list[torch.Tensor]] = []
        for image, layout in zip(images, layouts, strict=True):
            out = np.empty(layout.plan.num_bytes, np.uint8)
            make_tiles(open_picture(image, MediaConfig()).decode(), layout.plan, out)
            tiles.append(cut_tiles(torch.from_numpy(out), layout))
        return Encodable(tiles, layouts)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image], options: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Features of all pictures, packed."""
        return self.model.encode(*self.read(images, options))

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """One step; logits of every token, (T, V)."""
        ids: list[int] = []
        positions: list[list[int]] = [[] for _ in range(self.model.spec.num_position_axes)]
        slots: list[int] = []
        views: list[tuple[int, int]] = []
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
            views += [row.view(i) for i in indices]
            tables.append(row.blocks)
            before = row.ids[: row.done].count(self.image_token_id)
            count = row.ids[row.done : end].count(self.image_token_id)
            if count:
                assert row.features is not None
                features.append(row.features[before : before + count])
        width = max(map(len, tables))
        lens = [piece.num_tokens for piece in pieces]
        context = [piece.row.done + piece.num_tokens for piece in pieces]
        views_T2 = torch.tensor(views, dtype=torch.int32)
        sees_ahead = any(piece.row.bidirectional for piece in pieces)
        inputs = AttentionInputs(
            query_start_B1=torch.tensor([0, *lens]).cumsum(0).int(),
            context_lens_B=torch.tensor(context, dtype=torch.int32),
            block_tables_BL=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
            slot_mapping_T=torch.tensor(slots),
            query_lens=tuple(lens),
            context_lens=tuple(context),
            visible_begin_T=views_T2[:, 0].contiguous() if sees_ahead else None,
            visible_end_T=views_T2[:, 1].contiguous() if sees_ahead else None,
        )
        ids_T = torch.tensor(ids)
        hidden_TD = self.model.embed(ids_T)
        extra_TE = None
        if features:
            features_MW, width = torch.cat(features), hidden_TD.shape[1]
            hidden_TD[ids_T == self.image_token_id] = features_MW[:, :width]
            if features_MW.shape[1] > width:
                extra_TE = hidden_TD.new_zeros(len(ids_T), features_MW.shape[1] - width)
                extra_TE[ids_T == self.image_token_id] = features_MW[:, width:]
        positions_AT = torch.tensor(positions) + self.position_shift
        logits_TV = self.model.logits(self.model.forward(hidden_TD, positions_AT, inputs, self.caches, extra_TE))
        for row, num_tokens in pieces:
            row.done += num_tokens
        return logits_TV

    def prompt(self, text: str, images: Sequence[Image.Image] = (), options: Mapping[str, Any] | None = None) -> Row:
        """A row from a prompt, as requests are made of it."""
        spec = self.model.spec
        processor = InputProcessor(
            Tokenizer(self.tokenizer), self.rule, spec, media=MediaConfig(), max_model_len=spec.max_position
        )
        media = {"image": list(images)} if images else {}
        given = processor.prompts.read({"prompt": text, "multi_modal_data": media, "mm_processor_kwargs": options})
        request = processor.process("", given, SamplingParams(max_tokens=1)).request
        ids = request.prompt_token_ids
        positions = None
        if request.positions is not None:
            axes_AP = np.frombuffer(request.positions, np.int32).reshape(-1, len(ids))
            positions = Positions(axes_AP.tolist(), request.position_delta)
        features = self.encode(images, options) if images else None
        return Row(ids, features, positions, request.bidirectional)

    def prefill(self, row: Row) -> torch.Tensor:
        """Logits of all prompt tokens, in one step."""
        return self.run([Piece(row, len(row.ids) - row.done)])

    def generate(self, row: Row, num_tokens: int, chunk: int | None = None) -> list[int]:
        """Greedy tokens; the prompt in chunks of ``chunk``."""
        logits = torch.empty(0)
        while row.done < len(row.ids):
            logits = self.run([Piece(row, row.chunk(chunk or len(row.ids)))])
        new: list[int] = []
        for _ in range(num_tokens):
            new.append(int(logits[-1].argmax()))
            row.ids.append(new[-1])
            logits = self.run([Piece(row, 1)])
        return new


class Oracle:
    """transformers' model of the same folder."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(T, V) in float32, of what ``hf_inputs`` made."""
        cast = {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        return self.model(**cast).logits[0].float()

    @torch.inference_mode()
    def features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of all pictures, packed."""
        text = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        media = {name: x for name, x in inputs.items() if name not in text}
        made = self.model.model.get_image_features(**media)
        deeper = getattr(made, "deepstack_features", ())
        return torch.cat([torch.cat(list(parts)) for parts in (made.pooler_output, *deeper)], dim=1)

    @torch.inference_mode()
    def generate(self, inputs: Mapping[str, torch.Tensor], num_tokens: int) -> list[int]:
        """Greedy tokens."""
        out = self.model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
        return out[0, inputs["input_ids"].shape[1] :].tolist()


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Random pictures of (width, height)."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def flip_channels(images: Sequence[Image.Image]) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(image)[..., ::-1].copy()) for image in images]


def copy_with_weights(folder: Path, to: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """The checkpoint in ``folder`` with other tensors."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def meta_model(config: Mapping[str, Any], **settings: Any) -> Any:
    """A family's model without values: it has shapes, and fails where it reads one back from its device."""
    place = Placement(select(torch.device("cpu"), "reference"), torch.device("meta"), torch.float32)
    return resolve(config).load_model().from_hf(config, place=place, norm=NORM, **settings)
