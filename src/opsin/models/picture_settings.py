"""The settings of Hugging Face picture processors, read strictly, and the views that they ask for. No torch.

A family brings its processors' defaults, whose keys are the settings it implements; any other key is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

from opsin.errors import RequestError, UnsupportedModelError
from opsin.media.ops import output_size
from opsin.models.rule import PixelNorm
from opsin.types import Resize, View

Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_RESAMPLE: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
CLIP_PIXELS: Mapping[str, Any] = {  # what most Hugging Face picture processors have inherited
    "do_resize": True,
    "resample": 3,
    "default_to_square": False,
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
SIGLIP_NORM: Mapping[str, Any] = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_NORM_KEYS = frozenset({"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"})
_INERT_KEYS = frozenset(  # say nothing about pixels, or say what the model's own config says
    {
        "_valid_processor_keys",
        "auto_map",
        "chat_template",
        "data_format",
        "device",
        "disable_grouping",
        "feature_extractor_type",
        "image_processor_type",
        "image_seq_length",
        "image_token",
        "input_data_format",
        "num_additional_image_tokens",
        "pad_size",
        "patch_size",
        "processor_class",
        "return_metadata",
        "return_tensors",
        "video_processor",
        "video_processor_type",
        "vision_feature_select_strategy",
    }
)


@contextmanager
def checkpoint_settings(name: str) -> Iterator[None]:
    """A ``ValueError`` in here is the fault of the ``name`` processor's config: it becomes an UnsupportedModelError."""
    try:
        yield
    except ValueError as error:
        raise UnsupportedModelError(f"The {name} config cannot be used: {error}") from None


@contextmanager
def request_settings() -> Iterator[None]:
    """A ``ValueError`` in here is the fault of ``mm_processor_kwargs``: it becomes a RequestError."""
    try:
        yield
    except ValueError as error:
        raise RequestError(f"mm_processor_kwargs: {error}", param="mm_processor_kwargs") from None


def read_settings(
    processor: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], *, default: str, family: str
) -> tuple[str, dict[str, Any]]:
    """The processor's class name without its backend's suffix, and its settings, complete.

    Args:
        processor: as ``ModelFiles.processor``. A null is an absent key.
        known: class name to the defaults of every setting that is implemented.
        default: the class where the config names none.

    Raises:
        UnsupportedModelError: another class, or a key that is neither implemented nor without effect.
    """
    given = processor.get("image_processor_type") or processor.get("feature_extractor_type") or default
    return read_known("image_processor_type", given, processor, known, family)


def read_known(
    key: str, given: Any, processor: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], family: str
) -> tuple[str, dict[str, Any]]:
    """As ``read_settings``, of a processor whose config names its class, ``given``, under ``key``."""
    name = str(given).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in known:
        raise UnsupportedModelError(f"{key} is {given!r}; implemented for {family} are {', '.join(sorted(known))}.")
    defaults = known[name]
    set_keys = {key for key, value in processor.items() if value is not None}  # hub configs can be full of nulls
    unknown = sorted(set_keys - set(defaults) - _INERT_KEYS)
    if unknown:
        raise UnsupportedModelError(
            f"The {name} config has unknown keys: {', '.join(unknown)}; implemented are {', '.join(sorted(defaults))}."
        )
    return name, {**defaults, **{key: processor[key] for key in set_keys & set(defaults)}}


def with_options(
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    fixed: frozenset[str] = frozenset(),
    others: Collection[str] = (),
) -> Mapping[str, Any]:
    """``settings`` with a request's ``mm_processor_kwargs`` laid over them.

    Args:
        fixed: settings that the model itself is built for, beside those of the normalisation.
        others: settings of the processor for the other modality, passed over where these are not called the same.

    Raises:
        RequestError: an unknown key, or one that cannot change per request.
    """
    if not options:
        return settings
    options = {key: value for key, value in options.items() if key in settings or key not in others}
    fixed = fixed | _NORM_KEYS
    unknown = sorted(set(options) - set(settings))
    if unknown:
        raise RequestError(
            f"mm_processor_kwargs has unknown keys: {', '.join(unknown)}; this model's processor takes "
            f"{', '.join(sorted(set(settings) - fixed))}.",
            param="mm_processor_kwargs",
        )
    for key, value in options.items():
        if isinstance(settings[key], bool) and not isinstance(value, bool | None):
            raise RequestError(
                f"mm_processor_kwargs: {key} is {value!r}; it is true or false.", param="mm_processor_kwargs"
            )
    changed = sorted(key for key in fixed & set(options) if options[key] not in (None, settings[key]))
    if changed:
        raise RequestError(
            f"mm_processor_kwargs cannot change {', '.join(changed)}; the model keeps its checkpoint's processor "
            "config.",
            param="mm_processor_kwargs",
        )
    return {**settings, **{key: value for key, value in options.items() if value is not None}}


def check_built(settings: Mapping[str, Any], **built: Any) -> None:
    """``ValueError`` where a setting is not what config.json says of the model; null leaves it to the model."""
    for key, value in built.items():
        if settings[key] not in (None, value):
            raise ValueError(f"{key} is {settings[key]!r}; the model is built for {value!r}.")


def check_pixels(name: str, settings: Mapping[str, Any], *read: Callable[[Mapping[str, Any]], object]) -> PixelNorm:
    """The normalisation, once everything was read that ``layout`` reads of the settings of the ``name`` processor: what
    no request can satisfy fails when the model is loaded.

    Args:
        read: each raises ``ValueError`` at settings that cannot be used.

    Raises:
        UnsupportedModelError: one did.
    """
    with checkpoint_settings(name):
        for each in read:
            each(settings)
        return read_norm(settings)


def read_norm(settings: Mapping[str, Any]) -> PixelNorm:
    """What the settings ask of the device. ``ValueError`` says which one is wrong."""
    scale = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if not settings["do_normalize"]:
        return PixelNorm(scale, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return PixelNorm(scale, per_channel("image_mean", settings), per_channel("image_std", settings))


def per_channel(key: str, settings: Mapping[str, Any]) -> tuple[float, float, float]:
    """A setting given as one number or three. ``ValueError`` where it is neither."""
    value = settings[key]
    values = (value,) * 3 if isinstance(value, int | float) else tuple(value)
    if len(values) != 3:
        raise ValueError(f"{key} is {value!r}; it must be one number or three.")
    return cast(tuple[float, float, float], tuple(float(v) for v in values))


def read_count(settings: Mapping[str, Any], key: str, most: int) -> int:
    """A setting that counts. ``ValueError`` where it does not, or counts more than is sane."""
    count = settings[key]
    if type(count) is not int or not 1 <= count <= most:
        raise ValueError(f"{key} is {count!r}; it must be a whole number from 1 to {most}.")
    return count


def read_resample(settings: Mapping[str, Any]) -> Resample:
    """The filter that Pillow's number names. ``ValueError`` where it is not implemented."""
    resample = settings["resample"]
    if not isinstance(resample, int) or resample not in _RESAMPLE:
        raise ValueError(f"resample is {resample!r}; implemented are {_RESAMPLE}.")
    return _RESAMPLE[resample]


def read_size(settings: Mapping[str, Any], key: Literal["size", "crop_size"]) -> dict[str, int]:
    """Either {"shortest_edge"} or {"height", "width"}, from any of the spellings that Hugging Face takes.

    ``ValueError`` where it is neither.
    """
    value = settings[key]
    if isinstance(value, int):
        to_square = key == "crop_size" or settings["default_to_square"]
        value = {"height": value, "width": value} if to_square else {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(cast(Sequence[Any], value)) == 2:
        value = {"height": value[0], "width": value[1]}
    entries = dict(cast(Mapping[str, Any], value)) if isinstance(value, Mapping) else {}
    is_size = set(entries) in ({"shortest_edge"}, {"height", "width"})
    if not is_size or not all(isinstance(v, int) and v >= 1 for v in entries.values()):
        raise ValueError(
            f"{key} is {settings[key]!r}; it must be an integer, {{'shortest_edge': n}} or "
            "{'height': n, 'width': n}, at least 1."
        )
    return entries


def read_longest_size(settings: Mapping[str, Any]) -> dict[str, int]:
    """Either {"longest_edge"} or {"height", "width"}. ``ValueError`` where it is neither."""
    size = settings["size"]
    entries = dict(cast(Mapping[str, Any], size)) if isinstance(size, Mapping) else {}
    is_size = set(entries) in ({"longest_edge"}, {"height", "width"})
    if not is_size or not all(type(n) is int and n >= 1 for n in entries.values()):
        raise ValueError(
            f"size is {size!r}; it must be {{'longest_edge': n}} or {{'height': n, 'width': n}}, at least 1."
        )
    return entries


def square_view(settings: Mapping[str, Any], edge: int, width: int, height: int) -> View:
    """The whole picture, resized to the square that the tower takes, as processors do it that have no crop and no pad.

    Raises:
        RequestError: the settings make another size.
    """
    ops: tuple[Resize, ...] = ()
    made = (width, height)
    if settings["do_resize"]:
        with request_settings():
            size, resample = read_size(settings, "size"), read_resample(settings)
        made = size.get("width"), size.get("height")
        ops = (Resize(edge, edge, resample),)
    if made != (edge, edge):
        raise RequestError(
            f"The processor's settings do not make {edge} x {edge} pixels, which the vision tower takes, of this "
            f"{width} x {height} picture: do_resize is {settings['do_resize']}, size {settings['size']}.",
            param="mm_processor_kwargs",
        )
    return View(ops, height=edge, width=edge)


def fitted_view(
    settings: Mapping[str, Any], unit: int, width: int, height: int, fit: Callable[[], tuple[int, int]]
) -> View:
    """The whole picture at a size of its own, in whole units.

    Args:
        unit: edge of what becomes one feature, in pixels.
        fit: makes the (width, height), where it is to be resized.

    Raises:
        RequestError: without ``do_resize``, the picture's own sides are no multiples of ``unit``.
        MediaError: nothing would be left of it.
    """
    ops: tuple[Resize, ...] = ()
    with request_settings():
        resample = read_resample(settings)
    if settings["do_resize"]:
        ops = (Resize(*fit(), resample),)
    elif width % unit or height % unit:
        raise RequestError(
            f"Without do_resize, sides must be multiples of {unit}, not {width} x {height}.", param="multi_modal_data"
        )
    made_width, made_height = output_size(ops, width, height)
    return View(ops, height=made_height, width=made_width)
