"""One decoder for most language models: pre-norm, grouped-query attention, rotary positions, gated MLP.

What differs between families is data: ``DecoderConfig``, and one ``LayerSpec`` per layer. A field needs two families
that use it; a layer of another make would be a class of its own, in the file of its family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from opsin.errors import UnsupportedModelError
from opsin.kernels.inputs import AttentionInputs, LayerCache
from opsin.layers import Placement
from opsin.layers.attention import Attention
from opsin.layers.embedding import LMHead, TokenEmbedding
from opsin.layers.mlp import GatedMLP
from opsin.layers.norm import RMSNorm
from opsin.layers.rope import Rope, RopeConfig, Rotary
from opsin.models.dialects import DIALECTS
from opsin.models.strict import StrictConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What may differ from layer to layer. ``window``: positions seen, the token's own included; None is all."""

    num_kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Shape and kind of a language model.

    Attributes:
        rope: of the layers that see everything.
        window_rope: of the layers with a window, where theirs differs.
        embed_scale: what token embeddings are multiplied by.
        norms_from_one: weights of norms are kept as differences from 1.
        norms_outputs: attention and MLP are normed behind as well as before.
        norms_heads: each head of queries and keys is normed before it is rotated.
        rotates_neighbours: in checkpoints, values of a head are rotated with the one beside them.
        attention_scale: what scores are multiplied by; head_dim**-0.5 by default.
        attention_softcap: scores are bent into (-softcap, softcap).
        logit_softcap: the same for logits.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    hidden_act: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    window_rope: RopeConfig | None = None
    max_position: int
    tie_word_embeddings: bool
    embed_scale: float = 1.0
    norms_from_one: bool = False
    norms_outputs: bool = False
    norms_heads: bool = False
    rotates_neighbours: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @classmethod
    def from_hf(cls, text_config: Mapping[str, Any]) -> DecoderConfig:
        """Read a Hugging Face text config; absent keys take the defaults of its model type's config class.

        Raises:
            UnsupportedModelError: an unknown model type, an unknown key, or a value that is not implemented.
        """
        model_type = text_config.get("model_type", "llama")
        if model_type not in DIALECTS:
            raise UnsupportedModelError(
                f"text_config.model_type is {model_type!r}; implemented are {', '.join(sorted(DIALECTS))}."
            )
        config = StrictConfig(text_config, "text_config")
        dialect = DIALECTS[model_type]
        num_layers = config.take("num_hidden_layers", dialect.num_layers)
        num_heads = config.take("num_attention_heads", dialect.num_heads)
        hidden_size = config.take("hidden_size", dialect.hidden_size)
        head_dim = config.take("head_dim", dialect.head_dim or hidden_size // num_heads)
        num_kv_heads = config.take("num_key_value_heads", dialect.num_kv_heads or num_heads)
        max_position = config.take("max_position_embeddings", dialect.max_position)
        config.skip("rope_parameters", "rope_theta", "rope_scaling", "original_max_position_embeddings")
        config.skip("partial_rotary_factor")
        config.choose("use_bidirectional_attention", (False,), False)
        qkv_bias, output_bias = dialect.attention_bias(config)
        rope, window_rope = dialect.ropes(text_config)
        read_rope = partial(RopeConfig.from_hf, head_dim=head_dim, max_position=max_position)
        config.skip("rope_local_base_freq")
        result = cls(
            vocab_size=config.take("vocab_size", dialect.vocab_size),
            hidden_size=hidden_size,
            intermediate_size=config.take("intermediate_size", dialect.intermediate_size),
            num_heads=num_heads,
            layers=tuple(
                LayerSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
                for window in dialect.windows(config, num_layers)
            ),
            norm_eps=config.take("rms_norm_eps", dialect.norm_eps),
            hidden_act=dialect.hidden_act(config),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=config.take("mlp_bias", False),
            rope=read_rope(rope),
            window_rope=None if window_rope is None else read_rope(window_rope),
            max_position=max_position,
            tie_word_embeddings=config.take("tie_word_embeddings", dialect.is_tied),
            **dialect.more(config, hidden_size),
        )
        config.finish()
        return result


class DecoderLayer(nn.Module):
    def __init__(self, place: Placement, config: DecoderConfig, spec: LayerSpec) -> None:
        super().__init__()
        norm = partial(RMSNorm, place, eps=config.norm_eps, from_one=config.norms_from_one)
        self.input_layernorm = norm(config.hidden_size)
        self.self_attn = Attention(
            place,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            window=spec.window,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            head_norm=partial(norm, spec.head_dim) if config.norms_heads else None,
            neighbours=config.rope.size if config.rotates_neighbours else None,
        )
        self.post_attention_layernorm = norm(config.hidden_size)
        self.norms_outputs = config.norms_outputs
        if config.norms_outputs:
            self.pre_feedforward_layernorm = norm(config.hidden_size)
            self.post_feedforward_layernorm = norm(config.hidden_size)
        self.mlp = GatedMLP(
            place, config.hidden_size, config.intermediate_size, config.hidden_act, bias=config.mlp_bias
        )

    def forward(
        self,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor | None,
        rotary: Rotary,
        attention: AttentionInputs,
        cache: LayerCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns (what this layer adds, what it is added to): the sum is done where it is normed."""
        x_TD, sum_TD = self.self_attn(self.input_layernorm, x_TD, residual_TD, rotary, attention, cache)
        if self.norms_outputs:
            x_TD, _ = self.post_attention_layernorm(x_TD)
            x_TD, sum_TD = self.mlp.normed(self.pre_feedforward_layernorm, x_TD, sum_TD)
            return self.post_feedforward_layernorm(x_TD)[0], sum_TD
        return self.mlp.normed(self.post_attention_layernorm, x_TD, sum_TD)


class Decoder(nn.Module):
    """Embeddings in, final hidden states out; logits on request.

    Args:
        context_len: the longest sequence that will be run (LongRoPE depends on it); the config's limit by default.
    """

    def __init__(self, place: Placement, config: DecoderConfig, context_len: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(place, config.vocab_size, config.hidden_size, config.embed_scale)
        self.layers = nn.ModuleList(DecoderLayer(place, config, spec) for spec in config.layers)
        self.norm = RMSNorm(place, config.hidden_size, config.norm_eps, from_one=config.norms_from_one)
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(place, config.hidden_size, config.vocab_size, tied_to=tied_to)
        context_len = context_len or config.max_position
        self.rope = Rope(config.rope, context_len, place.device)
        self.window_rope = config.window_rope and Rope(config.window_rope, context_len, place.device)

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Patterns of checkpoint tensors that nothing here takes."""
        tied = (r"lm_head\.weight",) if self.lm_head.is_tied else ()
        return (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", *tied)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        positions_AT: torch.Tensor,
        attention: AttentionInputs,
        caches: Sequence[LayerCache],
        extra_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D) after the final norm. Writes this step's keys and values into ``caches``, one per layer.

        Args:
            extra_TE: D columns for each of the first layers, added behind it.
        """
        rotary = self.rope(positions_AT)
        in_window = rotary if self.window_rope is None else self.window_rope(positions_AT)
        deeper = () if extra_TE is None else extra_TE.split(hidden_TD.shape[1], dim=1)
        x_TD, residual_TD = hidden_TD, None
        for number, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            turned = rotary if self.config.layers[number].window is None else in_window
            x_TD, residual_TD = layer(x_TD, residual_TD, turned, attention, cache)
            if number < len(deeper):
                x_TD = x_TD + deeper[number]
        return self.norm(x_TD, residual_TD)[0]

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """(B, V) in float32."""
        logits_BV = self.lm_head(hidden_BD).float()
        cap = self.config.logit_softcap
        return logits_BV if cap is None else torch.tanh(logits_BV / cap) * cap

    def ranking(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """As ``logits``, but as the head rounds them where nothing is computed from that."""
        return self.lm_head(hidden_BD) if self.config.logit_softcap is None else self.logits(hidden_BD)
