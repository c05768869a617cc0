"""The torch-free half of a model family: what its pictures become, in pixels, features and prompt tokens.

A family's ``rule.py`` implements ``MediaRule``, on ``PictureRule`` where it can. The front uses it to admit a request
from header sizes alone; media workers carry out the ``PixelPlan`` it returns. No torch and no transformers here, so
that both start fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from opsin.types import Clip, MediaItem, MediaLayout, Modality


class TokenRun(NamedTuple):
    """``count`` prompt positions holding ``token_id``; ``is_feature`` marks those that take the item's features."""

    token_id: int
    count: int = 1  # pyright: ignore[reportIncompatibleMethodOverride]  # hides tuple.count
    is_feature: bool = False


class Placeholder(NamedTuple):
    """How a prompt marks the place of one item.

    Attributes:
        text: what a chat template or a caller writes, for the ``index``-th item where it is numbered
            (``"<|image_{index}|>"`` counts from 1).
        token_id: the single token that the item's tokens replace: ``text`` itself, or one inside it whose neighbours
            stay. None where the tokenizer would split ``text``, so that it must be cut at ``pattern`` before it is
            tokenised.
        pattern: regular expression that matches what is replaced; its group, where it has one, is the item's number.
        begins_text: what follows an item is tokenised as the beginning of a prompt is, special tokens included.
    """

    text: str
    token_id: int | None
    pattern: str
    begins_text: bool = False


class Positions(NamedTuple):
    """Rotary positions that are not sequential: ``axes`` lists, one per axis, each as long as the prompt."""

    axes: Sequence[Sequence[int]]
    delta: int


class PixelNorm(NamedTuple):
    """What the device does to uint8 pixels before the tower: ``(pixel * scale - mean) / std``, per RGB channel."""

    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def table(self) -> npt.NDArray[np.float32]:
        """The normalised value of every byte, (256, 3).

        Rounded as Hugging Face's NumPy processors round: the product in float64, the rest in float32; so gathering
        from this table gives their pixel values exactly.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        return (scaled[:, None] - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


class TokenIds(Protocol):
    """The little of a tokenizer that a rule may use."""

    def convert_tokens_to_ids(self, token: str) -> int | None: ...


class MediaRule(Protocol):
    """What one family does with media; pure functions of sizes."""

    def placeholder(self, modality: Modality) -> Placeholder:
        """How prompts mark one item.

        Raises:
            RequestError: the family takes no such modality.
        """
        ...

    def max_items(self, modality: Modality) -> int | None:
        """The most items a prompt of this family can hold; None is no limit, 0 means the modality is not taken."""
        ...

    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        """Pixels to make and features to expect for an upright picture of this size; videos have ``video_layout``.

        Args:
            num_frames: 1.
            options: ``mm_processor_kwargs``: per-request settings that override the processor config's.

        Raises:
            RequestError: an unknown option.
            MediaError: a size this family cannot take.
        """
        ...

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        """The same for a video. ``plan.frames`` are the frames to decode: ``clip.frames``, others that the family's own
        sampling picks of ``clip.num_frames``, or the last one twice where frames go in pairs.

        Raises:
            RequestError: the family takes no videos, or an unknown option.
            MediaError: a size or a number of frames that this family cannot take.
        """
        ...

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """The layout of features that the caller computed; ``extras`` are the keys given beside them."""
        ...

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        """What replaces the ``index``-th (from 1) placeholder: tokens, whose features sum to the layout's, and text.

        Text is tokenised as a processor would: at the ends together with the prompt's own, in between by itself, so
        there it must stand between special tokens.
        """
        ...

    def complete(self, text: str, signs: Sequence[tuple[int, int]], num_items: int) -> Sequence[tuple[int, str]]:
        """What the family's processor writes into every text prompt beside the items' own: (offset, text), in order.

        A beginning-of-text token in there is the prompt's; the tokenizer then adds none.

        Args:
            signs: [start, end) of the placeholders in ``text``.
        """
        ...

    def bidirectional(self, spans: Sequence[tuple[int, int]], prompt_len: int) -> list[tuple[int, int]]:
        """Position ranges whose tokens all see one another; ``spans`` are the [start, end) runs of features."""
        ...

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        """Rotary positions of the expanded prompt, or None when they are 0, 1, 2, ..."""
        ...
