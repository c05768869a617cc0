"""Every setting of the engine, once. The CLI's flags and ``LLM``'s keywords are generated from these fields.

Each dataclass is frozen and owned by one room. ``setting()`` attaches the help text that ``--help`` prints.
Unset values that depend on the model or the machine are None here and resolved by pure functions that return
concrete numbers (``opsin.engine.build``); nothing is ever written back.
"""

# Values come from callers and files, so they are checked whatever their types promise.
# pyright: reportUnnecessaryIsInstance=false, reportUnnecessaryComparison=false

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import msgspec

from opsin import vllm_settings
from opsin.errors import ConfigError

GENERATION_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
"""What is taken from a generation_config.json for requests that do not say."""

DType = Literal["auto", "float32", "bfloat16", "float16", "float", "half"]


def setting(default: Any, help: str, *, factory: Callable[[], Any] | None = None) -> Any:
    """A dataclass field with the sentence that ``--help`` and the docs print."""
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def _require(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {got!r}; it must be {expected}.")


def _typed(name: str, value: Any, kind: Any) -> Any:
    """``value`` as a setting's type has it: a list for a tuple and a path for a string will do, "4" for 4 will not."""
    try:
        return msgspec.convert(str(value) if isinstance(value, Path) else value, kind)
    except msgspec.ValidationError as error:
        if choices := _choices(kind):
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.") from None
        raise ConfigError(f"{name} is {value!r}: {str(error)[0].lower()}{str(error)[1:]}.") from None


def _choices(kind: Any) -> tuple[str, ...]:
    """What a setting may be that is one of several words, or left open; empty for other kinds."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return next((typing.get_args(part) for part in typing.get_args(kind) if typing.get_origin(part) is Literal), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how its weights are loaded."""

    model: str = setting("demo", "Hugging Face id, local folder, or 'demo' for the model inside the package.")
    tokenizer: str | None = setting(None, "Folder or id of the tokenizer; the model's own by default.")
    revision: str | None = setting(None, "Branch, tag or commit on the hub.")
    dtype: DType = setting(
        "auto", "Weights and activations; 'auto' is bfloat16 where the hardware has it, else float32."
    )
    load_format: Literal["auto", "safetensors", "dummy"] = setting("auto", "'dummy' fills the weights at random.")
    quantization: Literal["fp8", "int8"] | None = setting(
        None,
        "Stores the linear layers of a half-precision checkpoint in 8 bits: 'fp8' for GPUs, which multiply them so, "
        "'int8' for CPUs. Checkpoints that are FP8 already say it themselves.",
    )
    max_model_len: int | None = setting(
        None, "Longest prompt plus answer, in tokens; the model's own limit by default."
    )
    chat_template: str | None = setting(
        None, "Jinja chat template: a path, text, or the name of one that comes with opsin; the model's own by default."
    )
    generation_config: str = setting(
        "auto",
        "Where requests say nothing, 'auto' samples as the model's generation_config.json asks, 'vllm' does not, and a "
        "folder's own is read in its place.",
    )
    override_generation_config: Mapping[str, Any] = setting(
        None, "Values that replace those (JSON); max_new_tokens then also bounds every answer.", factory=dict
    )
    hf_overrides: Mapping[str, Any] = setting(None, "Values that replace config.json's (JSON).", factory=dict)
    trust_remote_code: bool = setting(False, "Accepted for compatibility; opsin never runs a checkpoint's code.")
    runner: Literal["auto", "generate", "pooling"] = setting("auto", "Generate text, or pool embeddings.")
    seed: int = setting(0, "Seed of dummy weights and of requests that bring none.")

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", self.model, "a model id or a folder")
        _require(self.max_model_len is None or self.max_model_len >= 1, "max_model_len", self.max_model_len, "positive")
        for name, value in self.override_generation_config.items():
            key = f"override_generation_config[{name!r}]"
            _require(name in GENERATION_DEFAULTS, key, value, f"left out, or one of {', '.join(GENERATION_DEFAULTS)}")
            _require(isinstance(value, int | float) and not isinstance(value, bool), key, value, "a number")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Where keys, values and vision features are kept."""

    block_size: int = setting(16, "Tokens per KV block.")
    gpu_memory_utilization: float = setting(0.92, "Share of the device's memory that opsin may use.")
    kv_cache_memory_bytes: int | None = setting(None, "Bytes of KV cache; by default planned from a measured run.")
    num_gpu_blocks_override: int | None = setting(None, "Number of KV blocks, for tests.")
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = setting(
        "auto",
        "'fp8' keeps keys and values in 8 bits: twice the tokens in as much memory; 'auto': as the model.",
    )
    enable_prefix_caching: bool = setting(True, "Share the KV blocks of equal prompt prefixes, pictures included.")
    vision_cache_gb: float = setting(1.0, "GiB of vision features kept for reuse and for encoding ahead.")

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, "block_size", self.block_size, "at least 1")
        fraction = self.gpu_memory_utilization
        _require(0.0 < fraction <= 1.0, "gpu_memory_utilization", fraction, "above 0 and at most 1")
        _require(self.vision_cache_gb >= 0, "vision_cache_gb", self.vision_cache_gb, "0 or more")
        blocks = self.num_gpu_blocks_override
        _require(blocks is None or blocks >= 1, "num_gpu_blocks_override", blocks, "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How much one step may do."""

    max_num_seqs: int | None = setting(None, "Requests that run at once; 256 on a GPU, 32 on a CPU by default.")
    max_num_batched_tokens: int | None = setting(None, "Tokens per step; 8192 on a GPU, 2048 on a CPU by default.")
    max_num_batched_patches: int | None = setting(
        None, "Vision patches encoded per step; 16384 on a GPU, 4096 on a CPU by default."
    )
    max_num_tokens_beside_decodes: int | None = setting(
        None, "Prompt tokens per step while other answers go on; 16 on a CPU that streams, else no fewer, by default."
    )
    max_num_patches_beside_decodes: int | None = setting(
        None,
        "Vision patches per step while other answers go on; no fewer by default. A CPU that streams has none in steps.",
    )
    pixel_buffer_gb: float = setting(1.0, "GiB of decoded pixels held while they wait for the vision tower.")
    scheduling_policy: Literal["fcfs", "priority"] = setting("fcfs", "Order of waiting requests.")
    pipeline_depth: int | None = setting(None, "Steps in flight: 1 or 2; 2 on a GPU, 1 on a CPU by default.")

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_batched_patches",
            "max_num_tokens_beside_decodes",
            "max_num_patches_beside_decodes",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        _require(self.pixel_buffer_gb > 0, "pixel_buffer_gb", self.pixel_buffer_gb, "above 0")
        _require(self.pipeline_depth in (None, 1, 2), "pipeline_depth", self.pipeline_depth, "1 or 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaConfig:
    """What pictures are let in, and who decodes them."""

    limit_mm_per_prompt: Mapping[str, int] = setting(
        None, "Most items per prompt and modality: 'image=2' or JSON.", factory=dict
    )
    mm_processor_kwargs: Mapping[str, Any] = setting(
        None, "Settings of the model's picture processor (JSON).", factory=dict
    )
    media_io_kwargs: Mapping[str, Mapping[str, Any]] = setting(
        None, "Which frames of a video to take: {'video': {'num_frames': 32, 'fps': 2}} (JSON).", factory=dict
    )
    allowed_local_media_path: str | None = setting(None, "Folder whose files may be named by file: URLs.")
    allowed_media_domains: tuple[str, ...] = setting((), "Hosts that http(s) URLs may name; all public ones if empty.")
    allow_private_media_hosts: bool = setting(False, "Let http(s) URLs reach loopback and private addresses.")
    image_fetch_timeout_s: float = setting(5.0, "Total time to fetch one picture, in seconds.")
    video_fetch_timeout_s: float = setting(30.0, "Total time to fetch one video, in seconds.")
    media_workers: int | None = setting(
        None, "Processes that decode and resize; by default by cores and load, 0 for in-process."
    )
    jpeg_decoder: Literal["cpu", "gpu"] = setting(
        "cpu",
        "'gpu' decodes plain JPEGs by nvJPEG (opsin[nvjpeg]), in the engine's process; pixels differ a little from the "
        "CPU's.",
    )
    media_decode_timeout_s: float = setting(
        30.0, "A worker that takes longer for one picture, or for a video's header, is killed, in seconds."
    )
    video_decode_timeout_s: float = setting(
        120.0, "A worker that takes longer for the frames of one video is killed, in seconds."
    )
    max_image_pixels: int = setting(178_956_970, "Larger pictures are refused before they are decoded.")
    max_video_frames: int = setting(768, "Videos of which more frames would be taken are refused.")
    max_media_bytes: int = setting(256 * 2**20, "Larger files are refused.")
    max_request_pixels: int | None = setting(None, "Most pixels of all pictures of one conversation together.")
    max_request_media_bytes: int | None = setting(None, "Most bytes of all pictures of one conversation together.")
    image_alpha: Literal["white", "drop"] = setting(
        "white", "Flatten transparent pictures on white, or drop alpha as plain convert('RGB') does."
    )

    def __post_init__(self) -> None:
        for modality, count in self.limit_mm_per_prompt.items():
            _require(modality in ("image", "video"), "limit_mm_per_prompt", modality, "keyed by 'image' or 'video'")
            _require(isinstance(count, int) and count >= 0, f"limit_mm_per_prompt[{modality!r}]", count, "0 or more")
        _require(self.image_fetch_timeout_s > 0, "image_fetch_timeout_s", self.image_fetch_timeout_s, "above 0")
        _require(self.video_fetch_timeout_s > 0, "video_fetch_timeout_s", self.video_fetch_timeout_s, "above 0")
        _require(self.max_video_frames >= 1, "max_video_frames", self.max_video_frames, "at least 1")
        _require(self.video_decode_timeout_s > 0, "video_decode_timeout_s", self.video_decode_timeout_s, "above 0")
        _require(self.media_decode_timeout_s > 0, "media_decode_timeout_s", self.media_decode_timeout_s, "above 0")
        workers = self.media_workers
        _require(workers is None or workers >= 0, "media_workers", workers, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Where it runs."""

    device: str = setting("auto", "Torch device: 'auto' is 'cuda' where there is one, else 'cpu'.")
    tensor_parallel_size: int = setting(1, "GPUs that share one model.")
    num_threads: int | None = setting(None, "Torch threads on a CPU; by default torch's own choice.")
    enforce_eager: bool = setting(False, "No CUDA graphs.")

    def __post_init__(self) -> None:
        _require(self.tensor_parallel_size >= 1, "tensor_parallel_size", self.tensor_parallel_size, "at least 1")
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size is {self.tensor_parallel_size}; only 1 is implemented so far. "
                "Run one engine per GPU instead."
            )
        _require(self.num_threads is None or self.num_threads >= 1, "num_threads", self.num_threads, "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All settings of one engine, by owner."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    media: MediaConfig = dataclasses.field(default_factory=MediaConfig)
    device: DeviceConfig = dataclasses.field(default_factory=DeviceConfig)

    @classmethod
    def from_flat(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Build from one flat mapping, as the CLI and YAML files give it.

        Raises:
            ConfigError: a name that no group owns, or a value out of range.
        """
        settings = _in_todays_form(settings)
        groups: dict[str, Any] = {}
        known: set[str] = set()
        for group in dataclasses.fields(cls):
            owner = group.default_factory  # each group's default factory is its class
            names = {field.name for field in dataclasses.fields(owner)}  # type: ignore[arg-type]
            known |= names
            kinds = typing.get_type_hints(owner)
            groups[group.name] = owner(**{k: _typed(k, v, kinds[k]) for k, v in settings.items() if k in names})  # type: ignore[misc]
        unknown = sorted(set(settings) - known)
        for name in unknown:
            if (told := vllm_settings.SERVED.get(name)) is not None:
                raise ConfigError(f"{name} is a setting of 'opsin serve'; leave it out here: {told}.")
            if (row := vllm_settings.find("--" + name.replace("_", "-"))) is not None:
                raise ConfigError(f"vLLM's {name} has no counterpart in opsin; leave it out: {row.told}.")
        if unknown:
            raise ConfigError(f"Unknown setting{'s' * (len(unknown) > 1)}: {', '.join(unknown)}. See --help.")
        return cls(**groups)


RUNNER_OF_TASK = {"auto": "auto", "generate": "generate", "embed": "pooling", "embedding": "pooling"}
"""vLLM's former name of the runner."""


def _in_todays_form(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """vLLM's other spellings: ``task`` for ``runner``, and limits that carry sizes beside the count.

    Raises:
        ConfigError: an unknown task, or one that contradicts ``runner``.
    """
    settings = dict(settings)
    if (task := settings.pop("task", None)) is not None:
        if task not in RUNNER_OF_TASK:
            raise ConfigError(f"task is {task!r}; it must be one of {', '.join(RUNNER_OF_TASK)}.")
        if settings.setdefault("runner", RUNNER_OF_TASK[task]) != RUNNER_OF_TASK[task]:
            raise ConfigError(f"task={task!r} contradicts runner={settings['runner']!r}; give one of them.")
    limits = settings.get("limit_mm_per_prompt")
    if isinstance(limits, Mapping):
        # Sizes shape vLLM's memory profile; opsin measures a typical picture.
        counts: dict[str, Any] = {}
        for modality, limit in cast("Mapping[str, Any]", limits).items():
            counts[modality] = cast("Mapping[str, Any]", limit).get("count") if isinstance(limit, Mapping) else limit
        settings["limit_mm_per_prompt"] = counts
    return settings


class EngineSettings(TypedDict, total=False):
    """Every setting but the model's name, as keywords of ``LLM`` and ``AsyncLLM``; a test keeps it in step."""

    tokenizer: str | None
    revision: str | None
    dtype: DType
    load_format: Literal["auto", "safetensors", "dummy"]
    quantization: Literal["fp8", "int8"] | None
    max_model_len: int | None
    chat_template: str | None
    generation_config: str
    override_generation_config: Mapping[str, Any]
    hf_overrides: Mapping[str, Any]
    trust_remote_code: bool
    runner: Literal["auto", "generate", "pooling"]
    task: Literal["auto", "generate", "embed", "embedding"]
    seed: int
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"]
    enable_prefix_caching: bool
    vision_cache_gb: float
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    max_num_batched_patches: int | None
    max_num_tokens_beside_decodes: int | None
    max_num_patches_beside_decodes: int | None
    pixel_buffer_gb: float
    scheduling_policy: Literal["fcfs", "priority"]
    pipeline_depth: int | None
    limit_mm_per_prompt: Mapping[str, int]
    mm_processor_kwargs: Mapping[str, Any]
    media_io_kwargs: Mapping[str, Mapping[str, Any]]
    allowed_local_media_path: str | None
    allowed_media_domains: tuple[str, ...]
    allow_private_media_hosts: bool
    image_fetch_timeout_s: float
    video_fetch_timeout_s: float
    media_workers: int | None
    jpeg_decoder: Literal["cpu", "gpu"]
    media_decode_timeout_s: float
    video_decode_timeout_s: float
    max_image_pixels: int
    max_video_frames: int
    max_media_bytes: int
    max_request_pixels: int | None
    max_request_media_bytes: int | None
    image_alpha: Literal["white", "drop"]
    device: str
    tensor_parallel_size: int
    num_threads: int | None
    enforce_eager: bool
