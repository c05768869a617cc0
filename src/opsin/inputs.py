"""The forms that a prompt may take, for type checkers and readers. The names are vLLM's.

``opsin.processing.prompts`` reads them at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

ImageItem = Any
"""One picture: a PIL.Image, a (height, width, channels) uint8 array, encoded bytes, or a path; or its features."""

VideoItem = Any
"""One video: a list of pictures, a (frames, height, width, 3) uint8 array, either in a pair with a mapping of metadata
(``fps``, ``total_num_frames``, ``frames_indices``), encoded bytes, or a path."""

MultiModalUUIDs = Mapping[str, Sequence[str | None] | str]


class MultiModalDataDict(TypedDict, total=False):
    """Pictures and videos that go with a prompt.

    Attributes:
        image: one picture or a list of them; a 4-D array is a batch. Features made elsewhere come as a 3-D torch tensor
            (items, features, hidden size), as a list of 2-D tensors, or as ``{"image_embeds": tensor}`` with
            ``image_grid_thw`` or ``image_sizes`` (``image_size_list``) beside it where the model needs them.
        video: one video or a list of them; a list of pictures is one video, as is a 4-D array. Features come as
            ``{"video_embeds": tensor}`` with ``video_grid_thw`` beside it where the model needs that.
    """

    image: ImageItem | Sequence[ImageItem] | Mapping[str, Any]
    video: VideoItem | Sequence[VideoItem] | Mapping[str, Any]


class TextPrompt(TypedDict):
    """A prompt in words; a picture's placeholder stands where the picture belongs."""

    prompt: str
    multi_modal_data: NotRequired[MultiModalDataDict | None]
    mm_processor_kwargs: NotRequired[Mapping[str, Any] | None]
    multi_modal_uuids: NotRequired[MultiModalUUIDs | None]
    cache_salt: NotRequired[str | None]
    add_special_tokens: NotRequired[bool]


class TokensPrompt(TypedDict):
    """A prompt in token ids, with one placeholder id per picture, or with all of them already expanded."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str | None]
    multi_modal_data: NotRequired[MultiModalDataDict | None]
    mm_processor_kwargs: NotRequired[Mapping[str, Any] | None]
    multi_modal_uuids: NotRequired[MultiModalUUIDs | None]
    cache_salt: NotRequired[str | None]


PromptType = str | list[int] | TextPrompt | TokensPrompt


class MessageContent(TypedDict):
    """A user's message, for the chat template to make a prompt of: text, or parts as in conversations."""

    content: str | Sequence[Mapping[str, Any]]


PoolingInput = PromptType | MessageContent
"""What a vector may be wanted of."""
