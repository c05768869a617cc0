"""What the tests must know of a model family to hold it to transformers: one row of ``tests.factories.families``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from opsin.types import MediaLayout

Size = tuple[int, int]  # width, height
FEATURE_SIZES: tuple[Size, ...] = (
    *((16, 16), (300, 40), (48, 48), (48, 48), (96, 49), (40, 300), (1, 1), (640, 480), (7, 30)),
    *((1, 150), (150, 1), (32, 32), (500, 470)),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Family:
    """What the tests must know of a family; ``shapes`` are named, and all of them compared with transformers.

    Attributes:
        write: writes a tiny checkpoint of a shape.
        hf_inputs: what transformers' processor makes of a prompt and its pictures.
        image: what a prompt writes for a picture, the ``{index}``-th where they are numbered.
        paged: shapes that run in chunks and in mixed batches.
        towers: shapes whose towers differ: features over sizes, half precision, parameters.
        served: shapes that run through ``LLM``.
        hub_configs: config.json by checkpoint.
        sizes: of the two pictures that logits are compared on.
        feature_sizes: of pictures whose features are compared, extreme ones among them.
        asked: sizes of pictures by prompt; the second prompt has two pictures, and the fourth begins as the first.
        num_blocks: of 4 tokens; so few that some of ``asked`` are preempted, enough for the longest.
        least_step: the fewest tokens that a step may have.
        least_features_gb: the smallest cache of features that holds the longest prompt's.
        is_prefix_lm: all tokens of a prompt see one another, so none of it can be taken from another's.
        closing: what the processor writes behind every prompt.
        options: a request's ``mm_processor_kwargs``, and what they are for transformers' processor.
        embeddings: from features and layouts of pictures, the spellings in which a prompt takes features.
        bad_embeddings: features that are refused, and words of the error.
        refused: pictures' size, options, and how such a request is refused.
        renamed: transformers saves tensors under other names than its modules'.
        oracle: gives transformers' model of a folder, where it is not an ``AutoModelForImageTextToText``.
    """

    name: str
    write: Callable[[Path, Any], Path]
    hf_inputs: Callable[..., dict[str, torch.Tensor]]
    image: str = "<image>"
    shapes: Mapping[str, Any]
    paged: Sequence[str]
    towers: Sequence[str]
    served: Sequence[str]
    hub_configs: Mapping[str, Mapping[str, Any]]
    sizes: Sequence[Size] = ((90, 70), (200, 33))
    feature_sizes: Sequence[Size] = FEATURE_SIZES
    asked: Sequence[Sequence[Size]] = (
        *([(90, 70)], [(200, 33), (40, 60)], [], [(90, 70)], [(30, 30), (30, 30), (33, 200)], [(640, 480)]),
    )
    num_blocks: int = 40
    least_step: int = 7
    least_features_gb: float = 2e-5
    is_prefix_lm: bool = False
    closing: str = ""
    options: Sequence[tuple[dict[str, Any], dict[str, Any]]]
    embeddings: Callable[[list[torch.Tensor], list[MediaLayout]], list[Any]] = field(
        default=lambda parts, layouts: [parts, {"image_embeds": parts}]
    )
    bad_embeddings: Callable[[list[torch.Tensor], list[MediaLayout]], tuple[Any, str]]
    refused: Sequence[tuple[Size, dict[str, Any], type[Exception], str]] = ()
    renamed: bool = True
    oracle: Callable[[Path, torch.dtype], Any] | None = None

    @property
    def question(self) -> str:
        """A prompt about two pictures."""
        return f"USER: {self.sign(1)}\nWhat is in the picture, and {self.sign(2)} in this one? ASSISTANT:"

    def sign(self, index: int = 1) -> str:
        """What a prompt writes for its ``index``-th picture."""
        return self.image.replace("{index}", str(index))

    def signs(self, count: int) -> str:
        """What a prompt writes for its pictures, in a row."""
        return "".join(self.sign(i + 1) for i in range(count))

    def pictures_inputs(self, folder: Path, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """``hf_inputs`` of pictures alone."""
        return self.hf_inputs(folder, self.signs(len(images)), list(images))

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' model of a checkpoint, in eval mode."""
        if self.oracle is not None:
            return self.oracle(folder, dtype)
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
