"""Model folders without weights, in the true shapes of published checkpoints: config, tokenizer, picture processor.

    python benchmarks/shapes.py FOLDER [--tiny]

Engines fill the weights at random (``load_format="dummy"``), so nothing is downloaded. The tokenizer is trained here on
the benchmarks' own questions, so that a word is about one token, and numbered as the published one is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

QUESTIONS = (
    "Describe the main objects in this picture, their colours and where they stand, then say what might happen next in "
    "the scene, in short plain sentences please.",
    "How many people can be seen in this picture, what are they wearing, and what is each of them doing at the moment "
    "when the photograph was taken by the camera?",
    "Read all of the text that is visible anywhere in this picture and tell me which sign or label it belongs to, line "
    "by line, from the top to the bottom.",
    "What kind of place is shown in this picture, at what time of the day was it taken, and which three details of the "
    "image made you think so, in order?",
)
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_QWEN_SIGNS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
_LLAVA_SIGNS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}


def question(index: int) -> str:
    """Some 37 tokens, with a number that makes each different."""
    return f"[{index}] {QUESTIONS[index % len(QUESTIONS)]}"


def prompt(model: str, index: int) -> str:
    """A one-picture prompt in the model's own format."""
    if model.startswith("llava"):
        return f"USER: <image>\n{question(index)} ASSISTANT:"
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{question(index)}<|im_end|>\n<|im_start|>assistant\n"
    )


def _qwen2_vl(hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 28,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


def _qwen25_vl_7b() -> dict[str, Any]:
    config = _qwen2_vl(3584, 18944, 28, 4, 152064, tied=False)
    return config | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def _llava_7b() -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "image_seq_length": 576,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
    }


_QWEN_PICTURES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    **_CLIP,
}
_LLAVA_PICTURES = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
    **_CLIP,
}
_LLAVA_PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": "<image>",
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def _qwen_pictures(name: str) -> dict[str, Any]:
    return _QWEN_PICTURES | ({"processor_class": "Qwen2_5_VLProcessor"} if name.startswith("qwen25") else {})


def _qwen2_vl_half_b() -> dict[str, Any]:
    """Qwen2-0.5B behind a tower of ViT-B's shape, 0.6 B together; nobody publishes it, a CPU runs it."""
    config = _qwen2_vl(896, 4864, 14, 2, 151936, tied=True)
    config |= {"num_hidden_layers": 24, "max_window_layers": 24}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
    config["vision_config"] |= {"depth": 12, "embed_dim": 768, "num_heads": 12}
    return config


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2vl-0.6b": _qwen2_vl_half_b(),
    "qwen2vl-2b": _qwen2_vl(1536, 8960, 12, 2, 151936, tied=True),
    "qwen2vl-7b": _qwen2_vl(3584, 18944, 28, 4, 152064, tied=False),
    "qwen25vl-7b": _qwen25_vl_7b(),
    "llava-7b": _llava_7b(),
}


def _shrink(name: str, config: dict[str, Any]) -> None:
    """The same code paths at toy size, for a dry run without a GPU."""
    text, vision = config.get("text_config", config), config["vision_config"]
    text |= {"num_hidden_layers": 2, "intermediate_size": 256, "hidden_size": 256, "head_dim": 128}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2 if name.startswith("llava") else 1}
    if name.startswith("llava"):
        vision["num_hidden_layers"] = 2
    elif name.startswith("qwen25"):
        vision |= {"depth": 2, "out_hidden_size": 256, "fullatt_block_indexes": [1]}
    else:
        vision |= {"depth": 2, "hidden_size": 256}


def write_shape(folder: Path, name: str, *, tiny: bool = False) -> Path:
    """Write one model folder; ``tiny`` keeps the code paths and drops the size."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(SHAPES[name]))
    if tiny:
        _shrink(name, config)
    is_llava = name.startswith("llava")
    signs = _LLAVA_SIGNS if is_llava else _QWEN_SIGNS
    _write_tokenizer(folder, signs, 32000 if is_llava else 151643)
    end, pad = ("</s>", "<pad>") if is_llava else ("<|im_end|>", "<|endoftext|>")
    files: dict[str, Any] = {
        "config.json": config,
        "preprocessor_config.json": _LLAVA_PICTURES if is_llava else _qwen_pictures(name),
        "generation_config.json": {"do_sample": False, "eos_token_id": signs[end], "pad_token_id": signs[pad]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast" if is_llava else "Qwen2Tokenizer",
            "eos_token": end,
            "pad_token": pad,
            "model_max_length": 32768,
            "padding_side": "left",
            "chat_template": _template(is_llava),
        },
    }
    if is_llava:
        files["processor_config.json"] = _LLAVA_PROCESSOR
    for file, values in files.items():
        (folder / file).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return folder


def _template(is_llava: bool) -> str:
    picture = "<image>\\n" if is_llava else "<|vision_start|><|image_pad|><|vision_end|>"
    content = (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}" + picture + "{% endif %}{% endfor %}{% endif %}"
    )
    if is_llava:
        return (
            "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
            + content
            + " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        )
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        + content
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _write_tokenizer(folder: Path, signs: dict[str, int], size: int) -> None:
    """Words of the questions, then single letters, then fillers up to ``size``; the signs at their own ids."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    words = [*QUESTIONS, "You are a helpful assistant.", "system user assistant USER: ASSISTANT:"]
    trained.train_from_iterator([*words, *(" " + word for word in words)], trainer)
    learned = json.loads(trained.to_str())
    free = iter(sorted(set(range(max(size, *signs.values()))) - set(signs.values())))
    vocabulary = {token: next(free) for token in learned["model"]["vocab"]}
    vocabulary |= {f"<filler_{number}>": number for number in free} | signs
    learned["model"]["vocab"] = vocabulary
    tokenizer = Tokenizer.from_str(json.dumps(learned))
    tokenizer.decoder = decoders.ByteLevel()
    ordered = sorted(signs, key=lambda sign: signs[sign])
    backend = json.loads(tokenizer.to_str())
    backend["added_tokens"] = [
        {
            "id": signs[sign],
            "content": sign,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for sign in ordered
    ]
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a dry run on a CPU")
    args = parser.parse_args()
    for shape in SHAPES:
        print(write_shape(args.folder, shape, tiny=args.tiny))
