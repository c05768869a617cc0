"""The demo model for training: LLaVA's architecture in plain torch, under the names of a Hugging Face checkpoint.

Shapes: B pictures or sequences, P patches plus one, T tokens, D width, N heads, H head size, V vocabulary.

Each sequence packs one picture's tokens and several questions about it. A question sees the picture and itself only, at
the positions it would have alone, so that packing changes nothing but the cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values."""

    def __init__(self, width: int, heads: int, kv_heads: int, head: int, *, bias: bool, out: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, head
        self.out = out
        self.q_proj = nn.Linear(width, heads * head, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head, bias=bias)
        self.add_module(out, nn.Linear(heads * head, width, bias=bias))

    def forward(self, x_BTD: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend; ``mask`` (B, 1, T, T) is added to the scores, None lets everything see everything."""
        B, T, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(B, T, self.heads, self.head).transpose(1, 2)
        k = self.k_proj(x_BTD).view(B, T, self.kv_heads, self.head).transpose(1, 2)
        v = self.v_proj(x_BTD).view(B, T, self.kv_heads, self.head).transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if self.kv_heads != self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return getattr(self, self.out)(out.transpose(1, 2).reshape(B, T, -1))


def rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """Apply rotary positions, halves paired as Llama's checkpoints have them."""
    first, second = x_BNTH.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BNTH * cos_B1TH + turned * sin_B1TH).to(x_BNTH.dtype)


class VisionMLP(nn.Module):
    """CLIP's feed-forward block, with its fast approximation of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class VisionLayer(nn.Module):
    """One pre-norm layer of the CLIP tower."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, heads = config["hidden_size"], config["num_attention_heads"]
        self.self_attn = Attention(width, heads, heads, width // heads, bias=True, out="out_proj")
        self.layer_norm1 = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.mlp = VisionMLP(width, config["intermediate_size"])
        self.layer_norm2 = nn.LayerNorm(width, eps=config["layer_norm_eps"])

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self.self_attn(self.layer_norm1(x_BPD), None, None)
        return x_BPD + self.mlp(self.layer_norm2(x_BPD))


class VisionEmbeddings(nn.Module):
    """Patches, a class token and learned positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config["image_size"] // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight.to(patches.dtype)


class VisionTower(nn.Module):
    """CLIP's vision transformer up to its last layer; the features are taken before ``post_layernorm``."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList([VisionLayer(config) for _ in range(config["num_hidden_layers"])])}
        )
        self.post_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        embedded = self.embeddings(pixels)
        x_BPD = self.pre_layrnorm(embedded).to(embedded.dtype)
        for layer in self.encoder["layers"]:  # type: ignore[union-attr]
            x_BPD = layer(x_BPD)
        return x_BPD[:, 1:]


class DecoderMLP(nn.Module):
    """Llama's gated feed-forward block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One pre-norm layer of Llama."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(
            width,
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            bias=False,
            out="o_proj",
        )
        self.mlp = DecoderMLP(width, config["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)

    def forward(self, x_BTD: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), mask, (cos, sin))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Llama without its output head, which is tied to the embeddings."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.head, self.theta = config["head_dim"], config["rope_theta"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList([DecoderLayer(config) for _ in range(config["num_hidden_layers"])])
        self.norm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, mask: Tensor) -> Tensor:
        steps = torch.arange(0, self.head, 2, device=x_BTD.device, dtype=torch.float32)
        angles = positions_BT.float()[..., None] / self.theta ** (steps / self.head)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos().to(x_BTD.dtype), angles.sin().to(x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask, cos, sin)
        return self.norm(x_BTD)


class DemoModel(nn.Module):
    """The whole model, with two small heads that only training uses.

    ``what`` and ``color`` name what each patch shows. They teach the tower to see long before the answers alone would.
    """

    def __init__(self, config: dict[str, Any], num_labels: int, num_colors: int) -> None:
        super().__init__()
        vision, text = config["vision_config"], config["text_config"]
        self.image_token = config["image_token_id"]
        self.vision_tower = nn.ModuleDict({"vision_model": VisionTower(vision)})
        self.multi_modal_projector = nn.ModuleDict(
            {
                "linear_1": nn.Linear(vision["hidden_size"], text["hidden_size"]),
                "linear_2": nn.Linear(text["hidden_size"], text["hidden_size"]),
            }
        )
        self.language_model = nn.ModuleDict({"model": Decoder(text)})
        self.heads = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(vision["hidden_size"]),
                "what": nn.Linear(vision["hidden_size"], num_labels),
                "color": nn.Linear(vision["hidden_size"], num_colors),
            }
        )
        self.apply(_init)
        scale = (2 * vision["num_hidden_layers"]) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                with torch.no_grad():
                    parameter.mul_(scale)

    def see(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (B, 3, S, S) into tower features (B, P, D)."""
        return self.vision_tower["vision_model"](pixels)

    def hidden(self, features_MPD: Tensor, tokens_BT: Tensor, positions_BT: Tensor, mask: Tensor) -> Tensor:
        """Run the decoder; the features fill the image tokens in order."""
        projector, decoder = self.multi_modal_projector, self.language_model["model"]
        image = projector["linear_2"](F.gelu(projector["linear_1"](features_MPD)))
        embedded = decoder.embed_tokens(tokens_BT).to(image.dtype)  # type: ignore[union-attr]
        is_image = (tokens_BT == self.image_token)[..., None]
        return decoder(embedded.masked_scatter(is_image, image), positions_BT, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores over the vocabulary."""
        return F.linear(hidden, self.language_model["model"].embed_tokens.weight)  # type: ignore[union-attr]

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the weights that ship, by their names in a LLaVA checkpoint."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("heads.")}


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def attention_mask(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Build the packed mask (B, 1, T, T): 0 where a token may look, -inf where not.

    Segment 0 is what every question of a sequence shares; segments 1 to 99 are questions; 100 to 199 are questions
    without a picture, which see of the shared part only its first token; 255 is padding.
    """
    T = segments_BT.shape[1]
    order = torch.arange(T, device=segments_BT.device)
    causal = order[None, :] <= order[:, None]
    query, key = segments_BT[:, :, None], segments_BT[:, None, :]
    blind = (query >= 100) & (query < 200)
    shared = (key == 0) & (~blind | (order == 0)[None, None, :])
    allowed = causal & (shared | (key == query))
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, float("-inf"))[:, None]
