"""The pictures of Idefics3 and SmolVLM: tiles of the whole, each behind a tag of its row and column; an overview.

Source: Hugging Face ``Idefics3ImageProcessor`` and ``SmolVLMImageProcessor`` (Pillow-backed), ``Idefics3Processor``;
arXiv:2408.12637.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from opsin.errors import MediaError, RequestError, UnsupportedModelError
from opsin.media.ops import output_size
from opsin.models.picture_rule import PictureRule, given_features, given_size, images_only
from opsin.models.pictures import (
    CLIP_PIXELS,
    checkpoint_settings,
    read_image_token,
    read_norm,
    read_resample,
    read_settings,
    request_settings,
    with_options,
)
from opsin.models.rule import TokenIds, TokenRun
from opsin.types import MediaLayout, Modality, PixelOp, PixelPlan, Resize, View

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"
_NEWLINE, _BLANK_LINE = "\u010a", "\u010a\u010a"  # "\n" and "\n\n" as byte-level vocabularies spell them
_LONGEST_EDGE = 4096  # whatever the settings ask for
_MOST_ROWS = 6  # as many as the tokenizers have tags for; so for columns
_DEFAULTS: dict[str, Any] = {
    **CLIP_PIXELS,
    "resample": 1,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "do_pad": True,  # tiles have one size, so there is nothing to fill up
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "image_seq_len": None,
    "return_row_col_info": None,
    "video_sampling": None,
}
_PROCESSORS = {"Idefics3ImageProcessor": _DEFAULTS, "SmolVLMImageProcessor": _DEFAULTS}
_FIXED = frozenset({"max_image_size", "image_seq_len", "video_sampling"})


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile on its way through tower and pixel shuffle.

    Attributes:
        edge: of the square that the tower takes, in pixels.
        grid: patches along an edge; what is left of the pixels is cut off.
        merge: edge of the block of patches that becomes one feature.
    """

    edge: int
    grid: int
    merge: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Tile:
        """Read it from config.json.

        Raises:
            UnsupportedModelError: numbers that are none, or blocks that do not divide the patches.
        """
        vision = config.get("vision_config") or {}
        edge, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
        merge = config.get("scale_factor", 2)
        if not all(type(n) is int and n >= 1 for n in (edge, patch, merge)) or patch > edge or edge // patch % merge:
            raise UnsupportedModelError(
                f"vision_config has image_size {edge!r} and patch_size {patch!r}, and scale_factor is {merge!r}; "
                "they must be whole numbers, and scale_factor must divide the patches along an edge."
            )
        return cls(edge, edge // patch, merge)

    @property
    def num_features(self) -> int:
        return (self.grid // self.merge) ** 2


@dataclass(frozen=True, kw_only=True)
class Idefics3Rule(PictureRule):
    """The ``MediaRule`` of ``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``.

    A layout's ``numbers`` are its (rows, columns) of tiles, without the overview; (0, 0) where that is alone.

    Attributes:
        fake_token_id: stands before each tile's tag, and at the end.
        tag_ids: the tag of the tile in a row and column, counted from 1.
        newline_ids: what ends a row of tiles; ``blank_line_ids`` what ends the last one.
    """

    tile: Tile
    fake_token_id: int
    global_token_id: int
    tag_ids: Mapping[tuple[int, int], int]
    newline_ids: tuple[int, ...]
    blank_line_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        tile = Tile.from_hf(config)
        name, settings = read_settings(
            processor, _PROCESSORS, default="Idefics3ImageProcessor", family="Idefics3 and SmolVLM"
        )
        if settings["max_image_size"] != {"longest_edge": tile.edge}:
            raise UnsupportedModelError(
                f"The {name} config has max_image_size {settings['max_image_size']!r}; the vision tower takes tiles of "
                f"{tile.edge} x {tile.edge} pixels, which is {{'longest_edge': {tile.edge}}}."
            )
        if settings["image_seq_len"] not in (None, tile.num_features):
            raise UnsupportedModelError(
                f"The processor's image_seq_len is {settings['image_seq_len']!r}; the tower makes {tile.num_features} "
                "features of a tile."
            )
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (_FAKE, _GLOBAL, _NEWLINE)}
        missing = [token for token, token_id in ids.items() if token_id is None]
        if missing:
            raise UnsupportedModelError(
                f"The tokenizer lacks {', '.join(map(repr, missing))}, which stand around this model's tiles; "
                "only its own byte-level tokenizers are implemented."
            )
        with checkpoint_settings(name):
            norm = read_norm(settings)
            read_resample(settings)
            _read_size(settings)
        mark, token_id = read_image_token(config, processor, tokenizer)
        fake, start, newline = (cast(int, token_id) for token_id in ids.values())
        # Two newlines are one token where the vocabulary has it: then it has the merge that makes it, too.
        blank_line = tokenizer.convert_tokens_to_ids(_BLANK_LINE)
        sides = range(1, _MOST_ROWS + 1)
        tags = {(row, col): tokenizer.convert_tokens_to_ids(f"<row_{row}_col_{col}>") for row in sides for col in sides}
        return cls(
            tile=tile,
            fake_token_id=fake,
            global_token_id=start,
            tag_ids={place: tag for place, tag in tags.items() if tag is not None},
            newline_ids=(newline,),
            blank_line_ids=(newline, newline) if blank_line is None else (blank_line,),
            mark=mark,
            image_token_id=token_id,
            norm=norm,
            settings=settings,
        )

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        images_only(modality)
        settings = with_options(self.settings, options, fixed=_FIXED)
        edge = self.tile.edge
        ops: list[PixelOp] = []
        with request_settings():
            resample, size = read_resample(settings), _read_size(settings)
        if settings["do_resize"]:
            ops.append(Resize(*_resized(width, height, size), resample))
        cols = rows = 1
        if settings["do_image_splitting"]:
            cols, rows = _tile_grid(*output_size(ops, width, height), edge)
            ops.append(Resize(cols * edge, rows * edge, resample))
        views: tuple[View, ...] = (View((*ops, Resize(edge, edge, resample)), edge, edge),)
        if rows * cols > 1:
            if (rows, cols) not in self.tag_ids:
                raise MediaError(
                    f"This picture of {width} x {height} pixels would become {rows} rows and {cols} columns of tiles; "
                    "the model's tokenizer has no tags for so many. Ask for a smaller size in mm_processor_kwargs.",
                    code="image_too_large",
                )
            views = (View(tuple(ops), edge, edge, rows, cols), *views)
        else:
            rows = cols = 0
        output_size(views[-1].ops, width, height)
        num_tiles = rows * cols + 1
        return MediaLayout(
            plan=PixelPlan(width=width, height=height, views=views),
            num_features=num_tiles * self.tile.num_features,
            num_patches=num_tiles * self.tile.grid**2,
            numbers=(rows, cols),
        )

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Features of an overview alone; with ``image_sizes``, (height, width) each, of all tiles and the overview."""
        images_only(modality)
        size = given_size(extras)
        rows, cols = (0, 0) if size is None else self.layout(modality, *size, 1, {}).numbers
        expected = (rows * cols + 1) * self.tile.num_features
        if num_features != expected:
            raise RequestError(
                f"An image embedding has {num_features} rows, expected {expected}: {self.tile.num_features} for each "
                f"of {rows} x {cols} tiles and the overview. For pictures in tiles, give their (height, width) as "
                "'image_sizes' beside 'image_embeds'.",
                param="multi_modal_data",
            )
        return given_features(num_features, (rows, cols))

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun]:
        images_only(modality)
        fake, features = TokenRun(self.fake_token_id), TokenRun(self.image_token_id, self.tile.num_features, True)
        rows, cols = layout.numbers
        runs: list[TokenRun] = []
        for row in range(1, rows + 1):
            for col in range(1, cols + 1):
                runs += (fake, TokenRun(self.tag_ids[row, col]), features)
            runs += map(TokenRun, self.newline_ids if row < rows else self.blank_line_ids)
        return [*runs, fake, TokenRun(self.global_token_id), features, fake]


def _resized(width: int, height: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(width, height) after the first resize: the long edge as given, the short one even, both within 4096.

    Source: HF ``get_resize_output_image_size``.
    """
    if "longest_edge" not in size:
        return size["width"], size["height"]
    edge, aspect = size["longest_edge"], width / height
    if width >= height:
        width, height = edge, max(1, _even(int(edge / aspect)))
    else:
        width, height = max(1, _even(int(edge * aspect))), edge
    aspect = width / height
    if width >= height and width > _LONGEST_EDGE:
        width, height = _LONGEST_EDGE, max(1, int(_LONGEST_EDGE / aspect))
    elif height > width and height > _LONGEST_EDGE:
        width, height = max(1, int(_LONGEST_EDGE * aspect)), _LONGEST_EDGE
    return width, height


def _even(length: int) -> int:
    return length + length % 2


def _tile_grid(width: int, height: int, edge: int) -> tuple[int, int]:
    """(columns, rows) of tiles: the long side in whole tiles, then the short one that keeps its ratio, in whole tiles.

    Source: HF ``resize_for_vision_encoder``.
    """
    aspect = width / height
    if width >= height:
        cols = math.ceil(width / edge)
        return cols, math.ceil(int(cols * edge / aspect) / edge)
    rows = math.ceil(height / edge)
    return math.ceil(int(rows * edge * aspect) / edge), rows


def _read_size(settings: Mapping[str, Any]) -> dict[str, int]:
    """Either {"longest_edge"} or {"height", "width"}. ``ValueError`` where it is neither."""
    size = settings["size"]
    entries = dict(cast(Mapping[str, Any], size)) if isinstance(size, Mapping) else {}
    is_size = set(entries) in ({"longest_edge"}, {"height", "width"})
    if not is_size or not all(type(n) is int and n >= 1 for n in entries.values()):
        raise ValueError(
            f"size is {size!r}; it must be {{'longest_edge': n}} or {{'height': n, 'width': n}}, at least 1."
        )
    return entries
