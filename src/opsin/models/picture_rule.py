"""What the rules of picture-taking families do alike. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from opsin.errors import RequestError
from opsin.models.rule import PixelNorm, Placeholder, Positions, TokenIds, TokenRun
from opsin.types import Clip, MediaItem, MediaLayout, Modality, PixelPlan


@dataclass(frozen=True, kw_only=True)
class PictureRule(ABC):
    """All of ``MediaRule`` but ``layout``, for pictures that are one run of features each, among tokens at positions
    0, 1, 2, ... that see what came before them. A family overrides what it does otherwise.

    Attributes:
        mark: what ``placeholder`` answers for pictures.
        video_mark: likewise for videos; None where the model, or its tokenizer, knows none.
        image_token_id: the token whose positions take features of pictures.
        norm: what the tower applies to the uint8 tiles.
        settings: the processor's settings, complete.
    """

    mark: Placeholder
    video_mark: Placeholder | None = None
    image_token_id: int
    norm: PixelNorm
    settings: Mapping[str, Any]

    @classmethod
    @abstractmethod
    def from_hf(cls, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer: TokenIds) -> Self:
        """Read the rule from a Hugging Face folder.

        Args:
            config: config.json.
            processor: as ``ModelFiles.processor``.
            tokenizer: asked for the ids of the placeholder and what belongs to it.

        Raises:
            UnsupportedModelError: a tower, processor, key or value that is not implemented, or does not fit another.
        """

    @abstractmethod
    def layout(
        self, modality: Modality, width: int, height: int, num_frames: int, options: Mapping[str, Any]
    ) -> MediaLayout:
        """As ``MediaRule`` says."""

    def video_layout(self, clip: Clip, options: Mapping[str, Any]) -> MediaLayout:
        """None: a family that takes videos overrides it, and has a ``video_mark``."""
        raise no_videos()

    def placeholder(self, modality: Modality) -> Placeholder:
        mark = self.mark if modality == "image" else self.video_mark
        if mark is None:
            raise no_videos()
        return mark

    def max_items(self, modality: Modality) -> int | None:
        return 0 if modality == "video" and self.video_mark is None else None

    def embedding_layout(self, modality: Modality, num_features: int, extras: Mapping[str, Any]) -> MediaLayout:
        """Features that need nothing beside them."""
        self.placeholder(modality)  # refuses videos where there are none
        if extras:
            given = ", ".join(sorted(extras))
            raise RequestError(
                f"{modality.capitalize()} embeddings of this model come alone; got {given} beside them.",
                param="multi_modal_data",
            )
        return given_features(num_features)

    def sized_features(self, num_features: int, size: tuple[int, int]) -> MediaLayout:
        """Features of a picture of this (width, height), which says how many there are.

        Raises:
            RequestError: there are not so many.
        """
        layout = self.layout("image", *size, 1, {})
        if num_features != layout.num_features:
            raise RequestError(
                f"A picture of height {size[1]} and width {size[0]} has {layout.num_features} features in this model; "
                f"got {num_features}.",
                param="multi_modal_data",
            )
        return given_features(num_features, layout.numbers)

    def expand(self, modality: Modality, index: int, layout: MediaLayout) -> Sequence[TokenRun | str]:
        token_id = self.image_token_id if modality == "image" else self.placeholder(modality).token_id
        assert token_id is not None, "a family whose videos are not one run of tokens says what they are"
        return [TokenRun(token_id, layout.num_features, is_feature=True)]

    def complete(self, text: str, signs: Sequence[tuple[int, int]], num_items: int) -> Sequence[tuple[int, str]]:
        return ()

    def bidirectional(self, spans: Sequence[tuple[int, int]], prompt_len: int) -> list[tuple[int, int]]:
        return []

    def positions(self, token_ids: Sequence[int], items: Sequence[MediaItem]) -> Positions | None:
        return None


def images_only(modality: Modality) -> None:
    """Refuse what is not a picture.

    Raises:
        RequestError: it is a video.
    """
    if modality != "image":
        raise no_videos()


def no_videos() -> RequestError:
    """What is raised where a video comes to a model that takes none."""
    return RequestError("This model takes images only, not video.", param="multi_modal_data")


def no_video_embeddings() -> RequestError:
    """What is raised where features of a video come to a model whose prompts say when its frames were taken."""
    return RequestError(
        "This model takes no embeddings of videos, since its prompts hold the time of every frame; give the video "
        "itself, or its frames as pictures.",
        param="multi_modal_data",
    )


def given_features(num_features: int, numbers: tuple[int, ...] = ()) -> MediaLayout:
    """The layout of features that the caller computed: no pixels, nothing for the tower."""
    return MediaLayout(PixelPlan(width=0, height=0, views=()), num_features, num_patches=0, numbers=numbers)


def given_size(extras: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of the picture whose features a caller computed, where ``image_sizes`` are given beside them:
    (height, width) each, as Hugging Face's processors return them.

    Raises:
        RequestError: something else is given beside them.
    """
    unknown = sorted(set(extras) - {"image_sizes"})
    if unknown:
        raise RequestError(
            f"Image embeddings of this model come alone or with image_sizes; got {', '.join(unknown)} beside them.",
            param="multi_modal_data",
        )
    if not extras:
        return None
    height, width = extras["image_sizes"]
    return width, height
