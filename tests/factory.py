"""Tiny random checkpoints in Hugging Face layout, for every room's tests.

``write_llava(folder, LlavaShape(...))`` saves a LLaVA of a few hundred thousand parameters that transformers and opsin
both load: config, safetensors, a byte-level BPE tokenizer trained on a few sentences (with ``<image>`` as one token,
a chat template, begin and end tokens), and the picture processor's config. It takes well under a second.

Weights are drawn anew with a standard deviation of 0.08, so that logits differ by about 1 and both the picture and the
positions matter: with transformers' own initialisation (0.02) nearly any bug passes a comparison of logits. Queries
and keys get three times that, since attention would else be nearly uniform, and blind to positions.

A suite that wants each shape written once per session makes itself a fixture:

    @pytest.fixture(scope="session")
    def checkpoint(tmp_path_factory):
        return session_folder(tmp_path_factory.mktemp("checkpoints"))

    def test_something(checkpoint):
        folder = checkpoint(LlavaShape(num_kv_heads=2))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

VOCAB_SIZE = 480
WEIGHT_STD = 0.08
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_SENTENCES = (
    "USER: <image>\nWhat is in the picture? ASSISTANT: A red circle and two blue squares.</s>",
    "SYSTEM: Answer in one word. USER: How many cats are there? ASSISTANT: Three.</s>",
    "The quick brown fox jumps over the lazy dog, 0123456789 times.",
    "Which picture has more triangles, the first one or the second one? Describe the colours.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaShape:
    """What varies between the checkpoints; the rest is fixed and small.

    Attributes:
        text: the language model's type.
        num_kv_heads: of 4 heads of ``head_dim`` 16.
        window: Mistral's sliding window.
        image_size: edge of the tower's square, in pixels of which a patch takes 8 x 8.
        feature_layer: HF's ``vision_feature_layer``.
        text_extra: more keys of the text config.
        dtype: of the saved weights.
    """

    text: Literal["llama", "mistral", "qwen2"] = "llama"
    tower: Literal["clip", "siglip"] = "clip"
    num_kv_heads: int = 4
    num_layers: int = 2
    tied: bool = False
    window: int | None = None
    image_size: int = 32
    feature_layer: int | tuple[int, ...] = -2
    strategy: Literal["default", "full"] = "default"
    text_extra: tuple[tuple[str, Any], ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0

    @property
    def num_features(self) -> int:
        """Rows per picture, which is also the number of its placeholder tokens."""
        rows = (self.image_size // 8) ** 2 + (self.tower == "clip")
        return rows - (self.strategy == "default")


def write_llava(folder: Path, shape: LlavaShape) -> Path:
    """Save a complete random checkpoint of ``shape`` in ``folder``; the same shape gives the same weights."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    model = build_llava(shape, tokenizer)
    model.save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    _processor(shape, tokenizer).save_pretrained(folder)
    return folder


def train_bpe(special_tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE of ``VOCAB_SIZE`` tokens, the special ones first; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 2, trainer)
    return tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts ``<s>`` first, as Llama's does."""
    tokenizer = train_bpe(["<unk>", "<s>", "</s>", "<pad>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def chatml_template(image: str) -> str:
    """ChatML, with ``image`` where a message has a picture."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif 'text' in part %}}{{{{ part['text'] }}}}{{% endif %}}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def write_chatml_tokenizer(folder: Path, signs: Sequence[str], image: str) -> PreTrainedTokenizerFast:
    """Save a tokenizer that begins no prompt by itself, as Qwen's.

    Args:
        signs: the family's own special tokens.
        image: what the chat template writes for a picture.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *signs]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        chat_template=chatml_template(image),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_generation_config(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save it after the model, which saves one of its own."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    GenerationConfig(**{name: getattr(tokenizer, name) for name in names}).save_pretrained(folder)


def build_llava(shape: LlavaShape, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The transformers model, in eval mode."""
    config = LlavaConfig(
        vision_config=_vision_config(shape),
        text_config=_text_config(shape, tokenizer),
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=shape.num_features,
        vision_feature_layer=shape.feature_layer if isinstance(shape.feature_layer, int) else list(shape.feature_layer),
        vision_feature_select_strategy=shape.strategy,
        tie_word_embeddings=shape.tied,
    )
    model = LlavaForConditionalGeneration(config).eval()
    redraw_weights(model, shape.seed)
    return model.to(getattr(torch, shape.dtype))


def redraw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew, as this module's docstring says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
            if any(piece in name for piece in (".q_proj.", ".k_proj.", ".qkv.")):
                noise *= 3
            is_norm = "norm" in name or ".ln_q." in name
            parameter.copy_(noise + 1.0 if is_norm and name.endswith("weight") else noise)


def _text_config(shape: LlavaShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **dict(shape.text_extra),
    }
    if shape.text == "mistral":
        return MistralConfig(**common, sliding_window=shape.window)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.text](**common)


def _vision_config(shape: LlavaShape) -> Any:
    common: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": shape.image_size,
        "patch_size": 8,
    }
    return CLIPVisionConfig(**common) if shape.tower == "clip" else SiglipVisionConfig(**common)


def _processor(shape: LlavaShape, tokenizer: PreTrainedTokenizerFast) -> Any:
    size = {"height": shape.image_size, "width": shape.image_size}
    if shape.tower == "clip":
        pictures = CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=size)
    else:
        pictures = SiglipImageProcessorPil(size=size)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy=shape.strategy,
        num_additional_image_tokens=int(shape.tower == "clip"),
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def load_processor(kind: Any, folder: Path) -> Any:
    """transformers' processor of a kind, its pictures resized by Pillow.

    Left to itself it takes torchvision where that is installed, whose values differ by a level here and there, and
    log-probabilities then by 1e-2.
    """
    processor = kind.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor


def hf_inputs(folder: Path, text: str, images: Sequence[Image.Image] = (), **options: Any) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of a prompt, with ``options`` for the pictures."""
    processor = load_processor(LlavaProcessor, folder)
    return dict(processor(text=text, images=list(images) or None, return_tensors="pt", **options))


def session_folder(base: Path, write: Callable[[Path, Any], Path] = write_llava) -> Callable[[Any], Path]:
    """A function from shape to checkpoint folder under ``base``, writing each once with ``write``."""

    def get(shape: Any) -> Path:
        name = "-".join(str(value) for value in asdict(shape).values())
        folder = base / "".join(c if c.isalnum() or c == "-" else "_" for c in name)
        return folder if folder.is_dir() else write(folder, shape)

    return get
