"""How Hugging Face's model types spell a language model's config: their defaults, and where they keep the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.errors import UnsupportedModelError
from opsin.kernels.reference import ACTIVATIONS
from opsin.models.strict import StrictConfig

_GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one HF model type spells what is common: its config class's defaults, and where it keeps the rest."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int
    num_layers: int = 32
    num_heads: int = 32
    head_dim: int | None = None
    max_position: int
    norm_eps: float = 1e-6
    num_kv_heads: int | None = None
    is_tied: bool = False
    attention_bias: Callable[[StrictConfig], tuple[bool, bool]]
    windows: Callable[[StrictConfig, int], Sequence[int | None]]
    hidden_act: Callable[[StrictConfig], str] = lambda config: config.choose("hidden_act", tuple(ACTIVATIONS), "silu")
    ropes: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, Any] | None]] = lambda config: (
        config,
        None,
    )
    more: Callable[[StrictConfig, int], dict[str, Any]] = lambda config, hidden_size: {}


def _one_attention_bias(config: StrictConfig) -> tuple[bool, bool]:
    bias = bool(config.take("attention_bias", False))
    return bias, bias


def _qkv_bias(config: StrictConfig) -> tuple[bool, bool]:
    """GLM-4.1V: HF's code has it whatever the config says."""
    config.choose("attention_bias", (True,), True)
    return True, False


def _no_windows(config: StrictConfig, num_layers: int) -> Sequence[int | None]:
    return [None] * num_layers


def _same_window(config: StrictConfig, num_layers: int) -> Sequence[int | None]:
    """Mistral: a window means one on every layer. Absent is 4096, null is none: here the two differ."""
    window = config.take("sliding_window") if "sliding_window" in config else 4096
    return [window] * num_layers


def _window_if_given(config: StrictConfig, num_layers: int) -> Sequence[int | None]:
    """Phi-3: on every layer; the 128k checkpoints' holds more than their longest context, and so is none."""
    window, longest = config.take("sliding_window"), config.take("max_position_embeddings", 4096)
    return [None if window is None or window >= longest else window] * num_layers


def _late_windows(config: StrictConfig, num_layers: int) -> Sequence[int | None]:
    """Qwen2: windows, where switched on, by ``layer_types`` or on the layers from ``max_window_layers``."""
    window = config.take("sliding_window", 4096)
    first = config.take("max_window_layers", 28)
    types = config.take("layer_types")
    if not config.take("use_sliding_window", False):
        return [None] * num_layers
    if types is None:
        return [window if i >= first else None for i in range(num_layers)]
    return _by_type(types, window, num_layers)


def _by_type(types: Sequence[str], window: int | None, num_layers: int) -> Sequence[int | None]:
    if len(types) != num_layers:
        raise UnsupportedModelError(f"text_config.layer_types has {len(types)} entries for {num_layers} layers.")
    return [window if kind == "sliding_attention" else None for kind in types]


def _windows_by_type(every: int) -> Callable[[StrictConfig, int], Sequence[int | None]]:
    """Gemma 2 and 3: by ``layer_types``, or on all layers but each ``every``-th."""

    def windows(config: StrictConfig, num_layers: int) -> Sequence[int | None]:
        window = _or_null(config, "sliding_window", 4096)
        pattern = config.take("sliding_window_pattern", config.take("_sliding_window_pattern", every))
        types = config.take("layer_types")
        if types is None:
            types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
        return _by_type(types, window, num_layers)

    return windows


def _or_null(config: StrictConfig, name: str, default: Any) -> Any:
    """The value of a setting whose null means none."""
    return config.take(name) if name in config else default


def _gemma_act(config: StrictConfig) -> str:
    """Gemma's first configs say 'gelu', and mean its tanh approximation."""
    config.choose("hidden_activation", (_GELU_TANH,), _GELU_TANH)
    config.choose("hidden_act", ("gelu", _GELU_TANH), _GELU_TANH)
    return _GELU_TANH


def _gemma(config: StrictConfig, hidden_size: int) -> dict[str, Any]:
    return {"embed_scale": hidden_size**0.5, "norms_from_one": True}


def _gemma2(config: StrictConfig, hidden_size: int) -> dict[str, Any]:
    return _normed_gemma(config, hidden_size) | {
        "attention_softcap": _or_null(config, "attn_logit_softcapping", 50.0),
        "logit_softcap": _or_null(config, "final_logit_softcapping", 30.0),
    }


def _gemma3(config: StrictConfig, hidden_size: int) -> dict[str, Any]:
    """Its config still has Gemma 2's caps, which no checkpoint sets and transformers applies by halves."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.choose(name, (None,), None)
    return _normed_gemma(config, hidden_size) | {"norms_heads": True}


def _normed_gemma(config: StrictConfig, hidden_size: int) -> dict[str, Any]:
    config.skip("cache_implementation")
    scale = config.take("query_pre_attn_scalar", 256) ** -0.5
    return _gemma(config, hidden_size) | {"norms_outputs": True, "attention_scale": scale}


def _gemma3_ropes(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """By layer type (transformers 5), or under a name for each (4)."""
    by_type = config.get("rope_parameters") or {}
    whole = {"rope_theta": config.get("rope_theta") or 1e6, **(config.get("rope_scaling") or {})}
    local = {"rope_theta": config.get("rope_local_base_freq") or 1e4}
    return (
        {"rope_parameters": whole | (by_type.get("full_attention") or {})},
        {"rope_parameters": local | (by_type.get("sliding_attention") or {})},
    )


DIALECTS: Mapping[str, Dialect] = {
    "gemma": Dialect(
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_layers=28,
        num_heads=16,
        head_dim=256,
        max_position=8192,
        is_tied=True,
        attention_bias=_one_attention_bias,
        windows=_no_windows,
        hidden_act=_gemma_act,
        more=_gemma,
    ),
    "gemma2": Dialect(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_layers=26,
        num_heads=8,
        head_dim=256,
        max_position=8192,
        num_kv_heads=4,
        is_tied=True,
        attention_bias=_one_attention_bias,
        windows=_windows_by_type(2),
        hidden_act=_gemma_act,
        more=_gemma2,
    ),
    "gemma3_text": Dialect(
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_layers=26,
        num_heads=8,
        head_dim=256,
        max_position=131072,
        num_kv_heads=4,
        is_tied=True,
        attention_bias=_one_attention_bias,
        windows=_windows_by_type(6),
        hidden_act=_gemma_act,
        ropes=_gemma3_ropes,
        more=_gemma3,
    ),
    "glm4v_text": Dialect(
        vocab_size=151552,
        intermediate_size=13696,
        num_layers=40,
        max_position=32768,
        norm_eps=1e-5,
        num_kv_heads=2,
        attention_bias=_qkv_bias,
        windows=_no_windows,
        more=lambda config, hidden_size: {"norms_outputs": True, "rotates_neighbours": True},
    ),
    "llama": Dialect(
        intermediate_size=11008, max_position=2048, attention_bias=_one_attention_bias, windows=_no_windows
    ),
    "mistral": Dialect(
        intermediate_size=14336,
        max_position=4096 * 32,
        num_kv_heads=8,
        attention_bias=lambda config: (False, False),
        windows=_same_window,
    ),
    "phi3": Dialect(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        max_position=4096,
        norm_eps=1e-5,
        attention_bias=lambda config: (False, False),
        windows=_window_if_given,
    ),
    "qwen3_vl_text": Dialect(
        vocab_size=151936,
        intermediate_size=22016,
        head_dim=128,
        max_position=128000,
        attention_bias=_one_attention_bias,
        windows=_no_windows,
        more=lambda config, hidden_size: {"norms_heads": True},
    ),
    "qwen2": Dialect(
        vocab_size=151936,
        intermediate_size=22016,
        max_position=32768,
        num_kv_heads=32,
        attention_bias=lambda config: (True, False),
        windows=_late_windows,
    ),
}
