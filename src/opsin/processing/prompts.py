"""A caller's prompt in any of its forms to one: text or ids, opened media, options. Nothing is decoded."""

# What is read here comes from callers, so it is Any until it was looked at.
# pyright: standard

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from PIL import Image

from opsin.config import MediaConfig
from opsin.errors import RequestError
from opsin.media.clips import FrameChoice, Probe, VideoSource, is_described, open_video
from opsin.media.source import PictureSource, open_picture
from opsin.processing.chat import MediaReference
from opsin.processing.embeddings import (
    GivenFeatures,
    is_embedding,
    open_embedding,
    read_embedding,
    read_embeddings,
    split_embeddings,
)
from opsin.processing.neutral import Rendered
from opsin.types import Modality

MediaSource = PictureSource | VideoSource | GivenFeatures
"""What an item's payload is made from, when the engine asks for it."""

_KEYS = (
    "prompt",
    "prompt_token_ids",
    "multi_modal_data",
    "mm_processor_kwargs",
    "multi_modal_uuids",
    "cache_salt",
    "add_special_tokens",
)
_MODALITIES: tuple[Modality, ...] = ("image", "video")


@dataclass(frozen=True, slots=True)
class MediaInput:
    """One item of a prompt, opened.

    Attributes:
        uuid: the caller's own name for it, instead of a digest of its content.
        options: settings of the picture processor for this item, over the prompt's.
        param: where it stood in what the caller gave, for error messages.
    """

    modality: Modality
    source: MediaSource
    uuid: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, read and checked, in text (``rendered``) or in ids.

    Attributes:
        media: in the order of the placeholders, per modality.
        add_special_tokens: None adds them unless the text already begins with the first one, as Hugging Face
            processors do for rendered conversations.
    """

    rendered: Rendered | None = None
    token_ids: list[int] | None = None
    media: list[MediaInput] = field(default_factory=list)
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str = ""
    add_special_tokens: bool | None = True


@dataclass(frozen=True, slots=True)
class Opener:
    """How media are opened.

    Attributes:
        feature_width: values per row that features given by the caller must have.
        probe: reads videos' headers.
        choice: which frames of a video are taken.
    """

    config: MediaConfig
    feature_width: int
    probe: Probe
    choice: FrameChoice

    def __call__(self, value: Any, modality: Modality) -> MediaSource:
        """Open one item.

        Raises:
            MediaError: what is wrong with it.
        """
        if modality == "video":
            return open_video(value, self.config, self.choice, self.probe)
        return open_picture(value, self.config)


def read_prompt(prompt: Any, opener: Opener) -> Prompt:
    """Read a ``PromptType``.

    Raises:
        RequestError: an unknown key, a missing or a wrongly typed value.
        MediaError: a picture or an embedding that cannot be used.
    """
    if isinstance(prompt, str):
        return Prompt(rendered=Rendered(prompt))
    if _is_ids(prompt):
        return Prompt(token_ids=_read_ids(prompt))
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f"A prompt must be a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'; "
            f"got {type(prompt).__name__}.",
            param="prompt",
        )
    unknown = sorted(str(key) for key in prompt if key not in _KEYS)
    if unknown:
        raise RequestError(
            f"Unknown key{'s' * (len(unknown) > 1)} in the prompt: {', '.join(unknown)}. "
            f"Allowed are {', '.join(_KEYS)}.",
            param=unknown[0],
        )
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise RequestError("The prompt has neither 'prompt' nor 'prompt_token_ids'; give one of them.", param="prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' must be a string, got {type(text).__name__}.", param="prompt")
    salt = prompt.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise RequestError(f"cache_salt must be a non-empty string, got {salt!r}.", param="cache_salt")
    special = prompt.get("add_special_tokens", True)
    if not isinstance(special, bool):
        raise RequestError(f"add_special_tokens must be true or false, got {special!r}.", param="add_special_tokens")
    data = _mapping(prompt, "multi_modal_data")
    uuids = _mapping(prompt, "multi_modal_uuids")
    media: list[MediaInput] = []
    for mapping, name in ((data, "multi_modal_data"), (uuids, "multi_modal_uuids")):
        for key in mapping:
            if key not in _MODALITIES:
                raise RequestError(
                    f"Unknown modality {key!r} in {name}. Allowed are {', '.join(_MODALITIES)}.", param=f"{name}.{key}"
                )
    for modality in _MODALITIES:
        media += _read_modality(modality, data.get(modality), uuids.get(modality), opener)
    each = _options_of_each(prompt.get("mm_processor_kwargs"), len(media))
    if each is not None:
        media = [replace(item, options=options) for item, options in zip(media, each, strict=True)]
    return Prompt(
        rendered=Rendered(text) if ids is None and text is not None else None,
        token_ids=None if ids is None else _read_ids(ids),
        media=media,
        processor_options={} if each is not None else _mapping(prompt, "mm_processor_kwargs"),
        cache_salt=salt or "",
        add_special_tokens=special,
    )


def open_reference(reference: MediaReference, fetched: bytes | None, opener: Opener) -> MediaInput:
    """Open an item that a conversation named.

    Args:
        fetched: the bytes behind ``reference.value`` where that is a URL.
    """
    value = reference.value if fetched is None else fetched
    try:
        if reference.is_embedding and value is not None:
            source: MediaSource = open_embedding(
                value, opener.feature_width, opener.config.max_media_bytes, reference.param
            )
        else:
            _require_data(value, reference.modality, reference.param)
            if isinstance(value, str):
                raise RequestError("A URL must be fetched before it is opened.")
            source = opener(value, reference.modality)
    except RequestError as error:
        error.param = error.param or reference.param
        raise
    return MediaInput(reference.modality, source, reference.uuid, reference.options, reference.param)


# ------------------------------------------------------------------------------------------------------ inside


def _mapping(prompt: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = prompt.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{key} must be a dict, got {type(value).__name__}.", param=key)
    return value


def _options_of_each(given: Any, count: int) -> list[Mapping[str, Any]] | None:
    """Where ``mm_processor_kwargs`` is a list, each item's own, pictures before videos."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        return None
    each: list[Any] = [{} if options is None else options for options in cast("Sequence[Any]", given)]
    if len(each) != count or not all(isinstance(options, Mapping) for options in each):
        raise RequestError(
            f"A list of mm_processor_kwargs must have a dict, or null, for each of the {count} pictures and videos.",
            param="mm_processor_kwargs",
        )
    return each


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)


def _read_ids(ids: Any) -> list[int]:
    if not _is_ids(ids) or not all(type(i) is int for i in ids):
        wrong = next((repr(i) for i in ids if type(i) is not int), "") if _is_ids(ids) else repr(type(ids).__name__)
        raise RequestError(f"prompt_token_ids must be a list of whole numbers; got {wrong}.", param="prompt_token_ids")
    return list(ids)


def _read_modality(modality: Modality, data: Any, uuids: Any, opener: Opener) -> list[MediaInput]:
    param = f"multi_modal_data.{modality}"
    if isinstance(uuids, str):
        uuids = [uuids]
    if data is None:
        values: list[Any] = [None] * len(uuids or ())
    else:
        values = _items(modality, data, opener.feature_width, param)
    if uuids is not None and (
        not isinstance(uuids, Sequence) or not all(u is None or (isinstance(u, str) and u) for u in uuids)
    ):
        raise RequestError(
            f"multi_modal_uuids.{modality} must be a list of strings (or null where the content is to be hashed).",
            param=f"multi_modal_uuids.{modality}",
        )
    if uuids is not None and len(uuids) != len(values):
        raise RequestError(
            f"multi_modal_uuids.{modality} has {len(uuids)} entries for {len(values)} {modality}(s); "
            "give one per item, or null for those to be hashed.",
            param=f"multi_modal_uuids.{modality}",
        )
    media = []
    for i, value in enumerate(values):
        place = param if len(values) == 1 else f"{param}.{i}"
        try:
            _require_data(value, modality, param)
            source = value if isinstance(value, GivenFeatures) else opener(value, modality)
        except RequestError as error:
            error.param = error.param or place
            raise
        media.append(MediaInput(modality, source, uuids[i] if uuids is not None else None, param=place))
    return media


def _items(modality: Modality, data: Any, feature_width: int, param: str) -> list[Any]:
    """One entry per item, from a single item, a list, a batch, or features."""
    if isinstance(data, Mapping):
        return list(read_embeddings(modality, data, feature_width, param))
    if modality == "video" and _is_one_video(data):
        return [data]
    if is_embedding(data):
        return list(split_embeddings(data, feature_width, param))
    if isinstance(data, list | tuple):
        are_features = [is_embedding(v) and not (modality == "video" and _is_one_video(v)) for v in data]
        return [
            read_embedding(v, feature_width, f"{param}.{i}") if is_features else v
            for i, (v, is_features) in enumerate(zip(data, are_features, strict=True))
        ]
    if getattr(data, "ndim", None) == (4 if modality == "image" else 5):  # a batch
        return list(data)
    return [data]


def _require_data(value: Any, modality: Modality, param: str) -> None:
    if value is None:
        # The engine keeps features only as long as they fit, and nobody mirrors what it holds.
        raise RequestError(
            f"An item of {param} is null. A uuid names an item for the caches, but the {modality} itself must be sent "
            "with every request, since its cached features may be gone.",
            param=param,
        )


def _is_one_video(data: Any) -> bool:
    """Whether it is one video rather than several, or features: frames, or a pair with metadata."""
    if is_described(data) or getattr(data, "ndim", None) == 4:
        return True
    frames = isinstance(data, list | tuple) and len(data) > 0
    return frames and all(isinstance(item, Image.Image) or getattr(item, "ndim", None) == 3 for item in data)
