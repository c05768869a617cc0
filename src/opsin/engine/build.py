"""The only place where concrete parts are put together, and where settings left open get their numbers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import torch

from opsin.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig
from opsin.engine.checkpoint import Checkpoint
from opsin.engine.core import EngineCore
from opsin.engine.engine import EngineFacts
from opsin.engine.feeder import MediaFeeder
from opsin.engine.front import Front
from opsin.engine.jpegs import JpegThread, find_nvjpeg, open_decoder
from opsin.engine.local import LocalEngine
from opsin.engine.nice import SharedCores
from opsin.engine.remote_tower import RemoteTower, TowerLoad
from opsin.engine.tower import Encode, Encoder, MovingTower, TowerThread
from opsin.errors import ConfigError
from opsin.kernels import reference, select
from opsin.kernels.nvjpeg import WORKSPACE_BYTES
from opsin.kernels.quantized import FP8
from opsin.media.pool import MediaPool
from opsin.media.raw import MAX_RAW_PIXELS
from opsin.models.hub import ModelFiles
from opsin.models.interface import VisionLanguageModel
from opsin.models.load import load_model, without_tower
from opsin.models.quantization import check_device
from opsin.models.rule import MediaRule
from opsin.processing.grammar import GrammarCompiler
from opsin.processing.output import OutputProcessor
from opsin.runner.executor import Pixels
from opsin.runner.inline import InlineExecutor
from opsin.runner.memory import compile_ahead, describe, plan_memory
from opsin.runner.pixels import PixelLoader
from opsin.runner.runner import ModelRunner
from opsin.runner.tower import EagerTower
from opsin.scheduler import Scheduler, SchedulerLimits
from opsin.types import MediaLayout

logger = logging.getLogger(__name__)

_GIB = 2**30
_GPU_MEASURED_SIDE = 1030  # pixels, of the picture that stands for all when a step is measured; resized, as most are
_CPU_MEASURED_SIDE = 448  # at its own resolution, a larger one can take a CPU minutes


@dataclass(frozen=True, slots=True)
class Budgets:
    """What one step may do, in numbers."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_patches: int
    max_num_tokens_beside_decodes: int
    pipeline_depth: int

    @classmethod
    def resolve(cls, config: SchedulerConfig, on_gpu: bool, *, streams: bool) -> Budgets:
        """Fill in what the settings leave open, by device, and by whether answers are watched as they are written."""
        tokens = config.max_num_batched_tokens or (8192 if on_gpu else 2048)
        patches = config.max_num_batched_patches or (16384 if on_gpu else 4096)
        # A CPU's time grows with every token. A GPU has a floor, below which larger steps cost next to nothing.
        tokens_beside = 16 if streams and not on_gpu else tokens
        return cls(
            max_num_seqs=config.max_num_seqs or (256 if on_gpu else 32),
            max_num_batched_tokens=tokens,
            max_num_batched_patches=patches,
            max_num_tokens_beside_decodes=config.max_num_tokens_beside_decodes or tokens_beside,
            pipeline_depth=config.pipeline_depth or (2 if on_gpu else 1),
        )


def build_front(config: EngineConfig, *, streams: bool) -> Front:
    """Everything in this process: the engine runs in the thread that steps the front.

    Args:
        streams: as ``build_engine``.

    Raises:
        ConfigError, UnsupportedModelError, WeightError: what is wrong, and what to do.
    """
    checkpoint = Checkpoint.open(config)
    engine = build_engine(config, checkpoint, streams=streams, encodes_beside=streams)
    inputs = checkpoint.processor(config, engine.facts, engine.grammars)
    return Front(engine, inputs, OutputProcessor(checkpoint.tokenizer), config.media, config.model.runner)


def build_engine(
    config: EngineConfig,
    checkpoint: Checkpoint,
    *,
    streams: bool = True,
    encodes_beside: bool = False,
    serves: bool = False,
) -> LocalEngine:
    """Load the model, plan the memory, and connect the engine's parts.

    Args:
        streams: answers are watched as they are written, so that on a CPU a step takes little of others' prompts beside
            them; whole batches are done sooner without that.
        encodes_beside: on a CPU, encode pictures beside the steps rather than in them, which saves everybody who is
            being answered from waiting for others' pictures: on a thread, and where there are many in a process.
        serves: that process is started now, rather than when there are many.

    Raises:
        ConfigError, UnsupportedModelError, WeightError: what is wrong, and what to do.
    """
    if config.device.num_threads is not None:
        torch.set_num_threads(config.device.num_threads)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.model, checkpoint.files, device)
    if not encodes_beside or device.type != "cpu":
        return _assemble(config, checkpoint, device, dtype, None, streams=streams)
    load = _tower_load(config, checkpoint, dtype)
    there = RemoteTower(load) if serves else None

    def encoder(model: VisionLanguageModel) -> MovingTower:
        here = _encoder(model, device, load.num_threads)
        return MovingTower(here, lambda: RemoteTower(load), lambda: without_tower(model), there)

    try:
        return _assemble(config, checkpoint, device, dtype, encoder, streams=streams)
    except BaseException:
        if there is not None:
            there.close()
        raise


def _assemble(
    config: EngineConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    encoder: Callable[[VisionLanguageModel], Encoder] | None,
    *,
    streams: bool,
) -> LocalEngine:
    """``build_engine`` on a device that is known.

    Args:
        encoder: makes what encodes pictures beside the steps; the engine ends it.
    """
    files, tokenizer, rule = checkpoint.files, checkpoint.tokenizer, checkpoint.rule
    nvjpeg = find_nvjpeg(config.media.jpeg_decoder, device)  # before weights are loaded for nothing
    model = load_model(
        files,
        rule.norm,
        device=device,
        dtype=dtype,
        max_model_len=config.model.max_model_len,
        load_format=config.model.load_format,
        quantization=config.model.quantization,
        seed=config.model.seed,
    )
    spec = model.spec
    max_model_len = config.model.max_model_len or spec.max_position
    if max_model_len > spec.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; this model's positions end at {spec.max_position}.")

    budgets = Budgets.resolve(config.scheduler, device.type == "cuda", streams=streams)
    runner = ModelRunner(
        model,
        max_num_seqs=budgets.max_num_seqs,
        max_model_len=max_model_len,
        block_size=config.cache.block_size,
        device=device,
        dtype=dtype,
        kv_dtype=resolve_kv_dtype(config.cache, device),
    )
    feature_bytes = int(config.cache.vision_cache_gb * _GIB)
    measured_side = _GPU_MEASURED_SIDE if device.type == "cuda" else _CPU_MEASURED_SIDE
    layouts = fill_budget(rule, budgets.max_num_batched_patches, measured_side, config.media.mm_processor_kwargs)
    replays = runner.can_replay and not config.device.enforce_eager
    compile_ahead(
        runner,
        max_num_tokens=budgets.max_num_batched_tokens,
        max_num_seqs=budgets.max_num_seqs,
        max_model_len=max_model_len,
        layouts=layouts,
        replays=replays,
    )
    max_raw_pixels = most_raw_pixels(device)
    decoder = None if nvjpeg is None else open_decoder(nvjpeg, device, max_raw_pixels)
    pixel_bytes = int(config.scheduler.pixel_buffer_gb * _GIB)
    memory = plan_memory(
        runner,
        max_num_tokens=budgets.max_num_batched_tokens,
        max_num_seqs=budgets.max_num_seqs,
        max_model_len=max_model_len,
        feature_bytes=feature_bytes,
        utilization=config.cache.gpu_memory_utilization,
        layouts=layouts,
        kv_bytes=config.cache.kv_cache_memory_bytes,
        num_blocks=config.cache.num_gpu_blocks_override,
        max_raw_pixels=max_raw_pixels,
        decoded_bytes=0 if decoder is None else pixel_bytes + WORKSPACE_BYTES,
        replays=replays,
    )
    logger.info("%s on %s in %s", config.model.model, device, str(dtype).removeprefix("torch."))
    logger.info("Memory plan:\n%s", describe(memory, spec, max_model_len))

    news = threading.Event()
    tower = None
    if encoder is not None:
        tower = TowerThread(encoder(model), news.set)
    jpegs = None if decoder is None else JpegThread(decoder, news.set, config.media.media_decode_timeout_s)
    pool = MediaPool(config.media, on_finished=news.set)
    feeder = MediaFeeder(pool, tower, jpegs=jpegs, max_raw_pixels=max_raw_pixels)
    scheduler = Scheduler(
        SchedulerLimits(
            max_num_seqs=budgets.max_num_seqs,
            max_num_batched_tokens=budgets.max_num_batched_tokens,
            max_num_batched_patches=budgets.max_num_batched_patches,
            max_num_tokens_beside_decodes=budgets.max_num_tokens_beside_decodes,
            max_num_patches_beside_decodes=config.scheduler.max_num_patches_beside_decodes if tower is None else None,
            encodes_beside=tower is not None,
            max_raw_pixels=max_raw_pixels,
            max_model_len=max_model_len,
            num_blocks=memory.num_blocks,
            block_size=memory.block_size,
            feature_bytes=feature_bytes,
            feature_row_bytes=spec.feature_width * dtype.itemsize,
            pixel_bytes=pixel_bytes,
            policy=config.scheduler.scheduling_policy,
            pipeline_depth=budgets.pipeline_depth,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        ),
        on_finish=feeder.release,
    )
    grammars = GrammarCompiler(tokenizer, spec.vocab_size)
    largest_step = budgets.max_num_batched_tokens, budgets.max_num_batched_patches
    core = EngineCore(
        scheduler,
        InlineExecutor(runner, memory, graphs_of=None if config.device.enforce_eager else largest_step),
        pipeline_depth=budgets.pipeline_depth,
        grammars=grammars,
    )
    facts = EngineFacts(
        spec=spec,
        max_model_len=max_model_len,
        max_num_seqs=budgets.max_num_seqs,
        memory=memory,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )
    cores = None
    if encoder is not None:
        num_threads = torch.get_num_threads()
        cores = SharedCores(num_threads, _tower_threads(num_threads), torch.set_num_threads)
    return LocalEngine(core, feeder, facts, news, grammars, cores)


def _encoder(model: VisionLanguageModel, device: torch.device, num_threads: int) -> Encode:
    """What encodes on the calling thread."""
    tower = EagerTower(model, device)

    @torch.inference_mode()
    def encode(pixels: Pixels, layout: MediaLayout) -> np.ndarray:
        torch.set_num_threads(num_threads)  # of the calling thread alone
        return tower([pixels], [layout]).float().numpy()

    return encode


def _tower_load(config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> TowerLoad:
    return TowerLoad(
        folder=str(checkpoint.files.folder),
        config=checkpoint.files.config,
        norm=checkpoint.rule.norm,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=config.model.max_model_len,
        load_format=config.model.load_format,
        quantization=config.model.quantization,
        seed=config.model.seed,
        num_threads=_tower_threads(torch.get_num_threads()),
        log_level=logging.getLogger("opsin").getEffectiveLevel(),
    )


def _tower_threads(num_threads: int) -> int:
    return max(1, num_threads // 2)


def most_raw_pixels(device: torch.device) -> int:
    """Pixels of a picture that the device is to resize, at most; 0 where the media workers resize all."""
    resample = select(device).resample
    if device.type != "cuda" or resample is reference.resample:
        return 0
    if not PixelLoader(resample, device).makes_pillows_bytes():
        logger.warning("Pictures are resized on the CPU: Pillow %s makes other bytes than the device.", PIL.__version__)
        return 0
    return MAX_RAW_PIXELS


def resolve_device(config: DeviceConfig) -> torch.device:
    """The torch device to run on.

    Raises:
        ConfigError: there is no such device here.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        if device.type == "cuda" and device.index:  # kernels are launched on the thread's current device
            raise ConfigError(
                f"device is {config.device!r}; an engine runs on the first CUDA device that it sees. Set "
                f"CUDA_VISIBLE_DEVICES={device.index} and leave device out."
            )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device is {config.device!r}, which cannot be used here; write 'auto', 'cpu' or 'cuda'. "
            f"Torch says: {reason}"
        ) from error
    return device


def resolve_dtype(config: ModelConfig, files: ModelFiles, device: torch.device) -> torch.dtype:
    """Weights' and activations' dtype. 'auto' is bfloat16 where the hardware multiplies it, else float32.

    A float32 checkpoint stays float32 on a CPU, where a user who wanted half precision would have said so.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type != "cpu":
        return torch.bfloat16
    native_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native_bf16 and files.dtype in ("bfloat16", "float16") else torch.float32


def resolve_kv_dtype(config: CacheConfig, device: torch.device) -> torch.dtype | None:
    """The KV cache's dtype where it is not the model's.

    Raises:
        ConfigError: the device has no 8-bit floats.
    """
    if config.kv_cache_dtype == "auto":
        return None
    check_device(device, FP8)
    return FP8


def fill_budget(rule: MediaRule, max_patches: int, side: int, options: Mapping[str, Any]) -> Sequence[MediaLayout]:
    """Square pictures of ``side`` pixels that fill one step's budget; rounded up, since a step may mix other sizes."""
    if rule.max_items("image") == 0:
        return []
    layout = rule.layout("image", side, side, 1, options)
    return [layout] * -(-max_patches // layout.num_patches)
