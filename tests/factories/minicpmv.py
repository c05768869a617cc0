"""Tiny random MiniCPM-V 2.6 checkpoints in the layout of the hub's.

Their reference code is not in transformers. What it made of these very folders is recorded, so they must not change:
weights and pictures are drawn from NumPy's ``RandomState``, whose streams are frozen, each tensor by its name and its
shape, and the vocabulary is written out.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PATCH_SIZE = 8
SCALE = 32  # edge of a slice in pixels, about
QUERIES = 4
HIDDEN = 256  # two heads of the resampler, which are always 128 wide
IMAGE, VIDEO = "(<image>./</image>)", "(<video>./</video>)"
TOKENS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", *TOKENS, "<ref>", "</ref>", "<box>", "</box>")
CHAT_TEMPLATE = (  # the hub's, which is Qwen2's: content is text
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = ("ĊĊ", "Ġt", "he", "Ġthe", "Ġi", "Ġis", "in", "ict", "Ġp", "Ġpict", "ur", "Ġpictur", "at", "11", "10")
_MERGES = "Ċ+Ċ Ġ+t h+e Ġt+he Ġ+i Ġi+s i+n i+c ic+t Ġ+p Ġp+ict u+r Ġpict+ur a+t 1+1 1+0"
_SPLIT = (  # Qwen2's: each digit by itself, though the merges above would join some
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniCPMVShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        drops_last: whether the tower's last layer is left out; None says nothing about it in config.json, and is true.
        numbers_images: the processor's ``use_image_id``.
    """

    num_kv_heads: int = 2
    tied: bool = False
    drops_last: bool | None = False
    max_slices: int = 9
    numbers_images: bool = True
    seed: int = 0


SHAPES = {
    "plain": MiniCPMVShape(),
    "dropped": MiniCPMVShape(drops_last=None, num_kv_heads=1, tied=True, max_slices=4, numbers_images=False, seed=1),
}
RECORDED = Path(__file__).parents[1] / "models" / "recorded" / "minicpmv"
TOLERANCE = 1e-4
needs_recorded_pillow = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13,
    reason="recorded with Pillow 13, which resamples otherwise than its elders, by up to 17 of 255 levels",
)
_FIRST_SEED = {"video": 40, "chat": 1}  # of a case's pictures


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and what the reference code made of it. ``logits`` are those of the positions ``at``."""

    shape: str
    case: str
    text: str
    sizes: list[tuple[int, int]]
    options: dict[str, Any]
    ids: list[int]
    at: list[int]
    greedy: list[int]
    logits: torch.Tensor = field(repr=False)

    @property
    def images(self) -> list[Image.Image]:
        first = _FIRST_SEED.get(self.case, 0)
        return [picture(first + i, *size) for i, size in enumerate(self.sizes)]

    @property
    def prompt(self) -> Any:
        """As ``LLM.generate`` takes it."""
        media = {"video" if self.case == "video" else "image": self.images} if self.sizes else {}
        return {"prompt": self.text, "multi_modal_data": media, "mm_processor_kwargs": self.options}


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Noise."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def recorded_cases(shape: str) -> list[Case]:
    """All of a checkpoint's."""
    told, arrays = _recorded()
    rows = [row for row in told["cases"] if row["shape"] == shape]
    return [Case(**row, logits=torch.from_numpy(arrays[f"{shape} {row['case']}"])) for row in rows]


@dataclass(frozen=True, slots=True)
class SizeCase:
    """A picture, and what the reference code made of it.

    Attributes:
        grids: (rows, columns) of patches of the overview and of each slice.
        pixels: SHA-256 of its normalised patches, each in the order of a convolution's kernel, as float32.
        first: some of the values, to see what differs; likewise ``last``.
        features: every 37th value of each feature.
    """

    image: Image.Image
    grids: list[tuple[int, int]]
    pixels: str
    first: list[float]
    last: list[float]
    features: torch.Tensor


def recorded_sizes(shape: str) -> list[SizeCase]:
    """All of a checkpoint's."""
    told, arrays = _recorded()
    rows = [row for row in told["sizes"] if row["shape"] == shape]
    return [
        SizeCase(
            picture(100 + i, *row["size"]),
            [tuple(grid) for grid in row["grids"]],
            row["pixels"],
            row["first"],
            row["last"],
            torch.from_numpy(arrays[f"{shape} features {i}"]),
        )
        for i, row in enumerate(rows)
    ]


def recorded_rounding(shape: str) -> dict[str, tuple[float, float]]:
    """By dtype, mean and largest error of the reference's logits of the case "two" from its own in float32."""
    return _recorded()[0]["half"][shape]


def recorded_slicing() -> list[dict[str, Any]]:
    """By ``scale_resolution`` and ``patch_size``, rows of width, height and ``max_slice_nums``, then (width, height) of
    the overview, and where there are slices their (columns, rows) and (width, height)."""
    return _recorded()[0]["processors"]


def hub_config() -> dict[str, Any]:
    """config.json of openbmb/MiniCPM-V-2_6."""
    return json.loads((RECORDED / "config.json").read_text())


def recorded_parameters() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of openbmb/MiniCPM-V-2_6."""
    told = json.loads((RECORDED / "parameters.json").read_text())
    return {name.replace("*", str(i)): tuple(shape) for name, (count, shape) in told.items() for i in range(count)}


def _recorded() -> tuple[dict[str, Any], Any]:
    return json.loads((RECORDED / "outputs.json").read_text()), np.load(RECORDED / "outputs.npz")


def write_minicpmv(folder: Path, shape: MiniCPMVShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(folder)
    config = build_config(shape, vocab_size)
    generation = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": SPECIAL.index("<|im_end|>") + FIRST_SPECIAL}
    for name, values in (
        ("config.json", config),
        ("preprocessor_config.json", build_processor(shape)),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(values, indent=2))
    save_file(draw_weights(shape, vocab_size), folder / "model.safetensors", {"format": "pt"})
    return folder


def build_config(shape: MiniCPMVShape, vocab_size: int) -> dict[str, Any]:
    """config.json, the language model's keys at its top."""
    config: dict[str, Any] = {
        "version": 2.6,
        "architectures": ["MiniCPMV"],
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
            "AutoModel": "modeling_minicpmv.MiniCPMV",
            "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
        },
        "attention_dropout": 0.0,
        "batch_vision_input": True,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_size": SCALE,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 1024,
        "max_window_layers": 2,
        "model_type": "minicpmv",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": shape.num_kv_heads,
        "patch_size": PATCH_SIZE,
        "query_num": QUERIES,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "slice_config": {
            "max_slice_nums": shape.max_slices,
            "model_type": "minicpmv",
            "patch_size": PATCH_SIZE,
            "scale_resolution": SCALE,
        },
        "slice_mode": True,
        "sliding_window": 64,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0",
        "use_cache": True,
        "use_image_id": shape.numbers_images,
        "use_sliding_window": False,
        "vision_config": {
            "hidden_size": 32,
            "image_size": 10 * PATCH_SIZE,
            "intermediate_size": 48,
            "model_type": "siglip",
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "patch_size": PATCH_SIZE,
        },
        "vocab_size": vocab_size,
    }
    if shape.drops_last is not None:
        config["drop_vision_last_layer"] = shape.drops_last
    return config


def build_processor(shape: MiniCPMVShape) -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "auto_map": {
            "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
            "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
        },
        "processor_class": "MiniCPMVProcessor",
        "max_slice_nums": shape.max_slices,
        "scale_resolution": SCALE,
        "patch_size": PATCH_SIZE,
        "use_image_id": shape.numbers_images,
        "image_feature_size": QUERIES,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
        "slice_mode": True,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.6,
    }


def weight_shapes(shape: MiniCPMVShape, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, under the hub's name."""
    shapes: dict[str, tuple[int, ...]] = {"llm.model.embed_tokens.weight": (vocab_size, HIDDEN)}
    kv = shape.num_kv_heads * HIDDEN // 4
    for i in range(2):
        layer = f"llm.model.layers.{i}."
        for name, out, size in (("q", HIDDEN, HIDDEN), ("k", kv, HIDDEN), ("v", kv, HIDDEN)):
            shapes |= _linear(f"{layer}self_attn.{name}_proj", out, size)
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (96, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, 96)
        shapes |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes["llm.model.norm.weight"] = (HIDDEN,)
    if not shape.tied:
        shapes["llm.lm_head.weight"] = (vocab_size, HIDDEN)
    shapes |= {"vpm.embeddings.patch_embedding.weight": (32, 3, PATCH_SIZE, PATCH_SIZE)}
    shapes |= {"vpm.embeddings.patch_embedding.bias": (32,), "vpm.embeddings.position_embedding.weight": (100, 32)}
    for i in range(3 if shape.drops_last is False else 2):
        layer = f"vpm.encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", 32, 32)
        shapes |= _linear(f"{layer}mlp.fc1", 48, 32) | _linear(f"{layer}mlp.fc2", 32, 48)
        shapes |= _norm(f"{layer}layer_norm1", 32) | _norm(f"{layer}layer_norm2", 32)
    shapes |= _norm("vpm.post_layernorm", 32)
    shapes |= {"resampler.query": (QUERIES, HIDDEN), "resampler.proj": (HIDDEN, HIDDEN)}
    shapes |= {"resampler.attn.in_proj_weight": (3 * HIDDEN, HIDDEN), "resampler.attn.in_proj_bias": (3 * HIDDEN,)}
    shapes |= {"resampler.kv_proj.weight": (HIDDEN, 32)} | _linear("resampler.attn.out_proj", HIDDEN, HIDDEN)
    for name in ("ln_q", "ln_kv", "ln_post"):
        shapes |= _norm(f"resampler.{name}", HIDDEN)
    return shapes


def draw_weights(shape: MiniCPMVShape, vocab_size: int) -> dict[str, torch.Tensor]:
    """As ``tests.factory.redraw_weights`` scales them: queries and keys matter, and so do positions."""
    weights: dict[str, torch.Tensor] = {}
    for name, size in weight_shapes(shape, vocab_size).items():
        noise = np.random.RandomState(zlib.crc32(f"{shape.seed} {name}".encode())).standard_normal(size) * 0.08
        if any(piece in name for piece in ("q_proj.weight", "k_proj.weight", "in_proj_weight")):
            noise *= 1.5
        if "norm" in name or ".ln_" in name:
            noise += name.endswith("weight")
        weights[name] = torch.from_numpy(noise.astype(np.float32))
    return weights


def _linear(name: str, out: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
FIRST_SPECIAL = len(_BYTES) + len(_WORDS) + 1  # "ic" is a word of its own, by a merge alone


def _write_tokenizer(folder: Path) -> int:
    """Save a byte-level vocabulary with a few merges, under the class name of the hub's; its size."""
    words = [*_BYTES, "ic", *_WORDS]
    merges = [(left, right) for left, right in (pair.split("+") for pair in _MERGES.split())]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "MiniCPMVTokenizerFast"
    settings["auto_map"] = {
        "AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", "tokenization_minicpmv_fast.MiniCPMVTokenizerFast"]
    }
    path.write_text(json.dumps(settings))
    return len(words) + len(SPECIAL)
