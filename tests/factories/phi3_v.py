"""Tiny Phi-3-vision checkpoints as on the hub (remote code's config.json, Llama's tokenizer), and what they compute.

transformers has no such model. ``Phi3V`` puts one together from its ``CLIPVisionModel`` and ``Phi3ForCausalLM``;
``tests/models/test_phi3_v_recorded.py`` holds it, and opsin, to what the code published with the checkpoints answered.
Weights come from NumPy's ``RandomState``, whose streams are frozen, by name and shape.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from opsin.models.picture_settings import CLIP_PIXELS

IMAGE = "<|image_1|>"
IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_1|>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_WORDS = "the what is in picture and this one user assistant which how many colours are there red blue circle".split()
_CONTROLS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>", "<|image|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi3VShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        num_kv_heads: of 4 heads of 16 values.
        window: positions seen, on every layer.
        edge: of a tile, in pixels of which a patch takes 8 x 8 and a feature 16 x 16.
        original: LongRoPE's short context, of 2048 positions; None is rotary positions without scaling.
        layer: the tower's whose output is taken.
    """

    num_kv_heads: int = 4
    num_layers: int = 2
    tied: bool = False
    window: int | None = None
    edge: int = 32
    num_crops: int = 4
    original: int | None = 256
    layer: int = -2
    seed: int = 0

    @property
    def grid(self) -> int:
        return self.edge // 16


# ------------------------------------------------------------------------------------------------ checkpoints


def write_phi3_v(folder: Path, shape: Phi3VShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    config = build_config(shape)
    processor = {
        "auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
        "image_processor_type": "Phi3VImageProcessor",
        "image_mean": CLIP_PIXELS["image_mean"],
        "image_std": CLIP_PIXELS["image_std"],
        "num_crops": shape.num_crops,
        "num_img_tokens": shape.grid**2,
        "processor_class": "Phi3VProcessor",
    }
    generation = {"bos_token_id": 1, "eos_token_id": [config["eos_token_id"]], "pad_token_id": config["pad_token_id"]}
    files = {"config": config, "preprocessor_config": processor, "generation_config": generation}
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=1))
    weights = {name: draw(name, size, shape.seed) for name, size in sizes(shape)}
    save_file({name: torch.from_numpy(array) for name, array in weights.items()}, folder / "model.safetensors")
    return folder


def build_config(shape: Phi3VShape) -> dict[str, Any]:
    """config.json as the hub's, with the tower's settings beside it."""
    half = 8  # of a head
    config: dict[str, Any] = {
        "_attn_implementation": "flash_attention_2",
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "bos_token_id": 1,
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "img_processor": {
            "image_dim_out": 32,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": shape.grid**2,
        },
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "model_type": "phi3_v",
        "num_attention_heads": 4,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "original_max_position_embeddings": shape.original or 2048,
        "pad_token_id": 0,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": shape.window or 2048,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
        "vision_config": vision_config(shape),
        "vocab_size": vocab_size(),
    }
    if shape.layer != -2:
        config["img_processor"]["layer_idx"] = shape.layer
    if shape.original is not None:
        config["rope_scaling"] = {
            "type": "su",
            "short_factor": [1.0 + i / 20 for i in range(half)],
            "long_factor": [1.0 + i * i / 4 for i in range(half)],
        }
    return config


def vision_config(shape: Phi3VShape) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": shape.edge,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
    }


def sizes(shape: Phi3VShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a checkpoint, under the hub's names."""
    hidden, inner, vision, vision_inner = 64, 96, 32, 48
    yield "model.embed_tokens.weight", (vocab_size(), hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab_size(), hidden)
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.qkv_proj.weight", ((4 + 2 * shape.num_kv_heads) * 16, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_up_proj.weight", (2 * inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    image = "model.vision_embed_tokens"
    yield f"{image}.glb_GN", (1, 1, 4 * vision)
    yield f"{image}.sub_GN", (1, 1, 1, 4 * vision)
    yield f"{image}.img_projection.0.weight", (hidden, 4 * vision)
    yield f"{image}.img_projection.0.bias", (hidden,)
    yield f"{image}.img_projection.2.weight", (hidden, hidden)
    yield f"{image}.img_projection.2.bias", (hidden,)
    tower = f"{image}.img_processor.vision_model"
    yield f"{tower}.embeddings.class_embedding", (vision,)
    yield f"{tower}.embeddings.patch_embedding.weight", (vision, 3, 8, 8)
    yield f"{tower}.embeddings.position_embedding.weight", ((shape.edge // 8) ** 2 + 1, vision)
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(3):
        layer = f"{tower}.encoder.layers.{i}"
        norms += [f"encoder.layers.{i}.layer_norm1", f"encoder.layers.{i}.layer_norm2"]
        linear = {f"self_attn.{name}_proj": (vision, vision) for name in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (vision_inner, vision), "mlp.fc2": (vision, vision_inner)}
        for name, size in linear.items():
            yield f"{layer}.{name}.weight", size
            yield f"{layer}.{name}.bias", size[:1]
    for name in norms:
        yield f"{tower}.{name}.weight", (vision,)
        yield f"{tower}.{name}.bias", (vision,)
    yield f"{image}.wte.weight", (vocab_size(), hidden)


def draw(name: str, size: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """A tensor that depends on seed, name and shape alone; spread as ``tests.factory.redraw_weights`` does."""
    if name.endswith("wte.weight"):
        name = "model.embed_tokens.weight"
    noise = 0.08 * np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(size)
    if any(piece in name for piece in (".q_proj.", ".k_proj.", ".qkv_proj.")):
        noise *= 3
    return (noise + 1 if "norm" in name and name.endswith("weight") else noise).astype(np.float32)


# -------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer() -> Tokenizer:
    """Llama's kind, as Phi-3's: a blank put before every text, bytes for what it does not know, words not trained but
    written down."""
    vocab = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>"))}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for char in ["▁", *map(chr, range(33, 127))]:
        vocab.setdefault(char, len(vocab))
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        known = "▁"
        for char in word:
            if known + char not in vocab:
                vocab[known + char] = len(vocab)
                merges.append((known, char))
            known += char
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=True) for token in _CONTROLS])
    return tokenizer


def vocab_size() -> int:
    return 512


def write_tokenizer(folder: Path) -> None:
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


# ------------------------------------------------------------------------------------------------- the network


class Phi3V(Phi3ForCausalLM):
    """The published network of transformers' parts. Pictures come as ``hf_inputs`` makes them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(_text_config(settings))
        self.image_token_id = build_tokenizer().token_to_id("<|image|>")
        self.tower = CLIPVisionModel(CLIPVisionConfig(**settings["vision_config"]))
        self.layer = settings["img_processor"].get("layer_idx", -2)
        width = 4 * settings["img_processor"]["image_dim_out"]
        hidden = settings["hidden_size"]
        self.projection = torch.nn.Sequential(
            torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)
        )
        self.glb_GN = torch.nn.Parameter(torch.empty(width))
        self.sub_GN = torch.nn.Parameter(torch.empty(width))
        inner: Any = self.model
        inner.get_image_features = self.get_image_features  # where transformers' own models have it

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> Self:
        """The model of a checkpoint, in eval mode."""
        settings = json.loads((folder / "config.json").read_text())
        model: Any = cls(settings).eval()
        tower = "tower.vision_model." if hasattr(model.tower, "vision_model") else "tower."
        image = "model.vision_embed_tokens."
        renames = {f"{image}img_processor.vision_model.": tower, f"{image}img_projection.": "projection.", image: ""}
        state: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            old = next((prefix for prefix in renames if name.startswith(prefix)), "")
            name = renames.get(old, "") + name.removeprefix(old)
            state[name] = tensor.flatten() if name in ("glb_GN", "sub_GN") else tensor
        del state["wte.weight"]
        if settings["tie_word_embeddings"]:
            del state["lm_head.weight"]
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) <= {"lm_head.weight"}
        assert not unexpected
        return model.to(dtype)

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> Any:
        """Per picture (features, hidden), as ``pooler_output``."""
        return SimpleNamespace(
            pooler_output=[
                self.projection(self._arrange(views, *size.tolist()))
                for views, size in zip(pixel_values, image_sizes, strict=True)
            ]
        )

    def _arrange(self, views: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """Patches of one picture, four to a row of features, and the separators."""
        states = self.tower(views[: 1 + rows * cols], output_hidden_states=True).hidden_states
        patches = states[self.layer][:, 1:]
        grid = math.isqrt(patches.shape[1]) // 2
        lines: dict[str, list[torch.Tensor]] = {"mosaic": [], "overview": []}
        for y in range(rows * grid):
            for x in range(cols * grid):
                tile = patches[1 + y // grid * cols + x // grid]
                lines["mosaic"].append(_four(tile, y % grid, x % grid, grid))
            lines["mosaic"].append(self.sub_GN)
        for y in range(grid):
            lines["overview"] += [_four(patches[0], y, x, grid) for x in range(grid)] + [self.sub_GN]
        return torch.stack([*lines["mosaic"], self.glb_GN, *lines["overview"]])

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Any = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        inputs_embeds: Any = None,
        **settings: Any,
    ) -> Any:
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
            is_prompt = settings.get("past_key_values") is None or settings["past_key_values"].get_seq_length() == 0
            if pixel_values is not None and image_sizes is not None and is_prompt:
                features = torch.cat(self.get_image_features(pixel_values, image_sizes).pooler_output)
                inputs_embeds[input_ids == self.image_token_id] = features
        return super().forward(inputs_embeds=inputs_embeds, **settings)


def _four(patches: torch.Tensor, y: int, x: int, grid: int) -> torch.Tensor:
    """Two by two neighbouring patches, end to end."""
    side = 2 * grid
    return torch.cat([patches[(2 * y + dy) * side + 2 * x + dx] for dy in range(2) for dx in range(2)])


def _text_config(settings: dict[str, Any]) -> Phi3Config:
    rope = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    if "rope_scaling" in settings:
        factors = {name: settings["rope_scaling"][name] for name in ("short_factor", "long_factor")}
        original = settings["original_max_position_embeddings"]
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original, **factors}
    own = ("vision_config", "img_processor", "embd_layer", "auto_map", "rope_scaling", "rope_theta", "model_type")
    text = {name: value for name, value in settings.items() if name not in own and not name.startswith("_")}
    return Phi3Config(**text, rope_parameters=rope)


# -------------------------------------------------------------------------------------------------- the inputs


def hf_inputs(
    folder: Path, text: str, images: Sequence[Image.Image] = (), *, num_crops: int | None = None
) -> dict[str, torch.Tensor]:
    """What the published processor makes of a prompt: ids, views (pictures, 1 + num_crops, 3, edge, edge), sizes.

    Args:
        num_crops: the checkpoint's own by default.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    most = num_crops or settings["num_crops"]
    edge, grid = vision["image_size"], vision["image_size"] // vision["patch_size"] // 2
    if not images:
        return {"input_ids": torch.tensor([tokenizer(text).input_ids])}
    pixels: list[torch.Tensor] = []
    shapes: list[tuple[int, int]] = []
    for image in images:
        canvas = _fitted(image.convert("RGB"), edge, most)
        values = torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        values = (values - mean) / std
        views = [F.interpolate(values[None], (edge, edge), mode="bicubic")[0]]
        cols, rows = canvas.width // edge, canvas.height // edge
        for y in range(rows):
            views += [values[:, y * edge : (y + 1) * edge, x * edge : (x + 1) * edge] for x in range(cols)]
        views += [torch.zeros(3, edge, edge)] * (1 + most - len(views))
        pixels.append(torch.stack(views))
        shapes.append((rows, cols))
    image_id = build_tokenizer().token_to_id("<|image|>")
    chunks = IMAGE_TAG.split(text)
    ids = list(tokenizer(chunks[0]).input_ids)
    for number, chunk in zip(chunks[1::2], chunks[2::2], strict=True):
        rows, cols = shapes[int(number) - 1]
        ids += [image_id] * ((rows * cols + 1) * grid**2 + 1 + (rows + 1) * grid) + tokenizer(chunk).input_ids
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.stack(pixels),
        "image_sizes": torch.tensor(shapes),
    }


def _fitted(image: Image.Image, edge: int, num_crops: int) -> Image.Image:
    """Scaled to as many tiles across its longer side as are allowed, and padded with white to whole ones."""
    if image.width < image.height:
        lying = _fitted(image.transpose(Image.Transpose.TRANSPOSE), edge, num_crops)
        return lying.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    across = max(n for n in range(1, num_crops + 1) if n * math.ceil(n / ratio) <= num_crops)
    scaled = image.resize((across * edge, int(across * edge / ratio)), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (scaled.width, math.ceil(scaled.height / edge) * edge), "white")
    canvas.paste(scaled, (0, (canvas.height - scaled.height) // 2))
    return canvas
