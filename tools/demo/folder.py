"""Write everything of the demo model's folder but its weights: configs, tokenizer, processor, chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from opsin.demo import pack
from opsin.demo.questions import ask_chat, plain, questions_about, sample_pair
from opsin.demo.scenes import sample_scene

VOCABULARY = 1024
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE)

IMAGE_SIZE = 128
PATCH = 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2

VISION_CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "num_channels": 3,
    "projection_dim": 256,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 608,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "bfloat16",
    "image_token_id": 3,
    "image_token_index": 3,
    "image_seq_length": IMAGE_TOKENS,
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "text_config": TEXT_CONFIG,
    "vision_config": VISION_CONFIG,
}

IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSOR: dict[str, Any] = {
    "processor_class": "LlavaProcessor",
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": IMAGE,
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' -}}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content if part.type in ('image', 'image_url') -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{{- ('' if loop.first else ' ') ~ part.text -}}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' -%}
{{- eos_token -}}
{%- else -%}
{{- ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def corpus(scenes: int = 12000) -> list[str]:
    """Return training texts for the tokenizer, each name and number word often enough to become a token or two."""
    rng = random.Random("tokenizer")
    lines: list[str] = []
    for _ in range(scenes):
        scene = sample_scene(rng, "train")
        if scene.recipe == "text":
            # Printed text is spelled in answers, so its letters must not decide the merges.
            continue
        for question in questions_about(scene, rng, "train", 4):
            lines.append(f"USER: {question.question} ASSISTANT:{plain(question.answer)}")
    for _ in range(scenes // 6):
        for question in sample_pair(rng, "train")[2]:
            lines.append(f"USER: {question.question} ASSISTANT:{plain(question.answer)}")
    lines += [f"USER: {q.question} ASSISTANT:{q.answer}" for q in (ask_chat(rng, "train") for _ in range(scenes // 10))]
    lines += [f" the {thing.name} " for thing in pack.pictograms().things] * 20
    return lines


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer on the training wordings. Digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path) -> None:
    """Write the folder; an existing tokenizer is kept, because weights depend on it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_path = folder / "tokenizer.json"
    if not tokenizer_path.exists():
        tokenizer = train_tokenizer()
        for number, token in enumerate(SPECIAL_TOKENS):
            assert tokenizer.token_to_id(token) == number
        assert tokenizer.get_vocab_size() == VOCABULARY
        tokenizer.save(str(tokenizer_path))
    _write(folder / "config.json", CONFIG)
    _write(
        folder / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False, "max_new_tokens": 128},
    )
    _write(folder / "preprocessor_config.json", {**IMAGE_PROCESSOR, "processor_class": "LlavaProcessor"})
    _write(folder / "processor_config.json", PROCESSOR)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "extra_special_tokens": {"image_token": IMAGE},
            "image_token": IMAGE,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": TEXT_CONFIG["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
