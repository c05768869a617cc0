"""config.json of checkpoints on the hub, in the spelling of the transformers that wrote them.

The hub is out of reach here, so each is compared with what public code holds of it:

- equal to whole copies: LLaVA-1.5 (a test of lite_llama; a log of transformers), LLaVA-1.6-Mistral (a test of
  TensorRT-LLM), Qwen2-VL-2B (a test of PaddleMIX), Mistral-Small-3.1 (a test of brolm, verbatim), Pixtral
  (transformers' tests), both Phi-3-visions (code that exports them to ONNX), Qwen3-VL-4B (diffusion models that read
  text with it);
- equal to copies in parts: GLM-4.1V (text: printed in a change to a chat bot; vision: a test of a Rust runtime),
  Qwen2.5-VL-7B (a test of Megatron-Bridge but for depths, which diffusion models that read text with it hold), Gemma 3
  4B (text: tests of three runtimes; vision: a test of Megatron-Bridge), PaliGemma (transformers' script that converts
  ColPali, at another resolution), PaliGemma 2 (transformers' script that converts it; vision: moshi's encoder),
  InternVL3 (its towers and token: transformers' script that converts them; text: an issue of vLLM, 8B's);
- of the shape that transformers' scripts which convert them give: LLaVA-1.6-Vicuna, both LLaVA-OneVisions (rows of
  the vocabulary, padded to 64, among it), Idefics3 (its vocabulary and token);
- of the shape of printed sisters: GLM-4.6V-Flash (4.1V: whoever trained both found the same network; its tokens are
  GLM-4.5V's, printed; its context is the published one), SmolVLM-256M and SmolVLM2-2.2B (the 500M, whole; of the 2.2B
  itself edges and scale), Qwen2-VL-7B (its printed modules), Qwen2.5-VL-3B (the 7B). Their other values were not
  compared with anything.

VLM2Vec's is Phi-3.5-vision's, and that of DSE is Qwen2-VL-2B's: no copies of theirs were found.
"""

from __future__ import annotations

from typing import Any

_CLIP_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_VICUNA_7B: dict[str, Any] = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
LLAVA: dict[str, dict[str, Any]] = {
    "1.5-7b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": _VICUNA_7B,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": _CLIP_LARGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
}

_LLAVA_1_6: dict[str, Any] = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32000,
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "torch_dtype": "float16",
    "transformers_version": "4.39.0.dev0",
    "use_image_newline_parameter": True,
    "vision_config": _CLIP_LARGE,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
LLAVA_NEXT: dict[str, dict[str, Any]] = {
    "v1.6-mistral-7b": _LLAVA_1_6
    | {
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
            "architectures": ["MistralForCausalLM"],
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
    },
    "v1.6-vicuna-7b": _LLAVA_1_6
    | {
        "pad_token_id": 32001,
        "text_config": _VICUNA_7B,
    },
}

_SIGLIP_SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
_ONEVISION: dict[str, Any] = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)],
    "image_token_index": 151646,
    "model_type": "llava_onevision",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.45.0.dev0",
    "use_image_newline_parameter": True,
    "video_token_index": 151647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": _SIGLIP_SO400M,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
LLAVA_ONEVISION: dict[str, dict[str, Any]] = {
    "qwen2-0.5b-ov": _ONEVISION
    | {
        "text_config": {
            "_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 152000,
        },
    },
    "qwen2-7b-ov": _ONEVISION
    | {
        "text_config": {
            "_name_or_path": "Qwen/Qwen2-7B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_theta": 1000000.0,
            "torch_dtype": "bfloat16",
            "vocab_size": 152128,
        },
    },
}

_QWEN_TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_token_id": 151654}
_QWEN_TOKENS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
_QWEN_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN2_VL_2B: dict[str, Any] = {
    **_QWEN_TEXT,
    **_QWEN_TOKENS,
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "sliding_window": 32768,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}
_QWEN2_5_VL_3B: dict[str, Any] = {
    **_QWEN_TEXT,
    **_QWEN_TOKENS,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "sliding_window": 32768,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}
_QWEN2_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
QWEN2_VL: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": _QWEN2_VL_2B,
    "qwen2-vl-7b": _QWEN2_VL_2B | _QWEN2_7B | {"vision_config": _QWEN2_VL_2B["vision_config"] | {"hidden_size": 3584}},
    "qwen2.5-vl-3b": _QWEN2_5_VL_3B,
    "qwen2.5-vl-7b": _QWEN2_5_VL_3B
    | _QWEN2_7B
    | {"vision_config": _QWEN2_5_VL_3B["vision_config"] | {"out_hidden_size": 3584}},
}

# InternVL3-1B, and one with the 6B tower of the largest.
_INTERNVIT_300M = {
    "architectures": ["InternVisionModel"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 1024,
    "image_size": [448, 448],
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-06,
    "layer_scale_init_value": 0.1,
    "model_type": "internvl_vision",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": [14, 14],
    "projection_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "use_qk_norm": False,
}
_INTERNVL3_1B: dict[str, Any] = {
    "architectures": ["InternVLForConditionalGeneration"],
    "downsample_ratio": 0.5,
    "image_seq_length": 256,
    "image_token_id": 151667,
    "model_type": "internvl",
    "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151674,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0",
    "vision_config": _INTERNVIT_300M,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
INTERNVL: dict[str, dict[str, Any]] = {
    "internvl3-1b": _INTERNVL3_1B,
    "internvit-6b": _INTERNVL3_1B
    | {
        "vision_config": _INTERNVIT_300M
        | {
            "attention_bias": False,
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "norm_type": "rms_norm",
            "num_attention_heads": 25,
            "num_hidden_layers": 45,
            "use_qk_norm": True,
        }
    },
}

_SMOLVLM_LEFTOVERS = {  # of the code that trained SmolVLM
    "_flash_attn_2_enabled": True,
    "_name_or_path": "None",
    "is_llama_config": True,
    "neftune_noise_alpha": 0.0,
    "perceiver_config": {
        "_attn_implementation_autoset": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "model_type": "vllama3",
        "num_key_value_heads": 1,
        "qk_layer_norms_perceiver": False,
        "resampler_depth": 6,
        "resampler_head_dim": 96,
        "resampler_n_heads": 16,
        "resampler_n_latents": 64,
        "transformers_version": "4.46.0",
    },
    "qk_layer_norms": False,
    "rope_interleaved": False,
    "use_resampler": False,
}
IDEFICS3: dict[str, dict[str, Any]] = {
    "idefics3-8b-llama3": {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 128257,
        "model_type": "idefics3",
        "scale_factor": 2,
        "text_config": {
            "_name_or_path": "meta-llama/Meta-Llama-3.1-8B-Instruct",
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "model_type": "llama",
            "num_key_value_heads": 8,
            "pad_token_id": 128002,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "vocab_size": 128259,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 364,
            "intermediate_size": 4304,
            "model_type": "idefics3",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    },
    "smolvlm-256m": {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 49190,
        "model_type": "idefics3",
        "scale_factor": 4,
        "text_config": _SMOLVLM_LEFTOVERS
        | {
            "architectures": ["VLlama3ForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 64,
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pixel_shuffle_factor": 4,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
            "vocab_size": 49280,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"dtype": "auto"},
        "transformers_version": "4.46.0",
        "use_cache": True,
        "use_reentrant_checkpointing": False,
        "vision_config": {
            "hidden_size": 768,
            "image_size": 512,
            "max_image_size": {"longest_edge": 512},
            "model_type": "idefics3",
            "num_attention_heads": 12,
            "patch_size": 16,
            "size": {"longest_edge": 2048},
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_base_siglip": False,
        },
        "vocab_size": 49280,
    },
    "smolvlm2-2.2b": {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": 49190,
        "model_type": "smolvlm",
        "pad_token_id": 128002,
        "scale_factor": 3,
        "text_config": _SMOLVLM_LEFTOVERS
        | {
            "architectures": ["VLlama3ForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "num_key_value_heads": 32,
            "pad_token_id": 2,
            "pixel_shuffle_factor": 3,
            "rms_norm_eps": 1e-05,
            "rope_theta": 130000,
            "torch_dtype": "bfloat16",
            "vocab_size": 49280,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.47.1",
        "use_cache": False,
        "use_reentrant_checkpointing": False,
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "max_image_size": {"longest_edge": 384},
            "model_type": "smolvlm_vision",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "size": {"longest_edge": 1920},
            "tie_word_embeddings": False,
            "use_base_siglip": False,
        },
        "vocab_size": 49280,
    },
}

_PHI3_LONG_FACTOR = """
    1.0299999713897705 1.0499999523162842 1.0499999523162842 1.0799999237060547 1.2299998998641968
    1.2299998998641968 1.2999999523162842 1.4499999284744263 1.5999999046325684 1.6499998569488525
    1.8999998569488525 2.859999895095825 3.68999981880188 5.419999599456787 5.489999771118164 5.489999771118164
    9.09000015258789 11.579999923706055 15.65999984741211 15.769999504089355 15.789999961853027 18.360000610351562
    21.989999771118164 23.079999923706055 30.009998321533203 32.35000228881836 32.590003967285156
    35.56000518798828 39.95000457763672 53.840003967285156 56.20000457763672 57.95000457763672 59.29000473022461
    59.77000427246094 59.920005798339844 61.190006256103516 61.96000671386719 62.50000762939453 63.3700065612793
    63.48000717163086 63.48000717163086 63.66000747680664 63.850006103515625 64.08000946044922 64.760009765625
    64.80001068115234 64.81001281738281 64.81001281738281
    """
_PHI3_SHORT_FACTOR = """
    1.05 1.05 1.05 1.1 1.1 1.1 1.2500000000000002 1.2500000000000002 1.4000000000000004 1.4500000000000004
    1.5500000000000005 1.8500000000000008 1.9000000000000008 2.000000000000001 2.000000000000001 2.000000000000001
    2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001
    2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001
    2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.1000000000000005 2.1000000000000005
    2.2 2.3499999999999996 2.3499999999999996 2.3499999999999996 2.3499999999999996 2.3999999999999995
    2.3999999999999995 2.6499999999999986 2.6999999999999984 2.8999999999999977 2.9499999999999975
    3.049999999999997 3.049999999999997 3.049999999999997
    """
_PHI3_5_LONG_FACTOR = """
    1.0800000429153442 1.1100000143051147 1.1399999856948853 1.340000033378601 1.5899999141693115
    1.600000023841858 1.6200000047683716 2.620000123977661 3.2300000190734863 3.2300000190734863
    4.789999961853027 7.400000095367432 7.700000286102295 9.09000015258789 12.199999809265137 17.670000076293945
    24.46000099182129 28.57000160217285 30.420001983642578 30.840002059936523 32.590003967285156
    32.93000411987305 42.320003509521484 44.96000289916992 50.340003967285156 50.45000457763672
    57.55000305175781 57.93000411987305 58.21000289916992 60.1400032043457 62.61000442504883 62.62000274658203
    62.71000289916992 63.1400032043457 63.1400032043457 63.77000427246094 63.93000411987305 63.96000289916992
    63.970001220703125 64.02999877929688 64.06999969482422 64.08000183105469 64.12000274658203 64.41000366210938
    64.4800033569336 64.51000213623047 64.52999877929688 64.83999633789062
    """
_PHI3_5_SHORT_FACTOR = """
    1.08 1.1 1.1300000000000001 1.2800000000000002 1.3100000000000003 1.4500000000000004 1.4500000000000004
    1.9500000000000008 2.030000000000001 2.4299999999999926 2.5699999999999896 2.9499999999999815
    3.729999999999965 3.869999999999962 4.189999999999955 4.43999999999995 4.6399999999999455 4.979999999999938
    5.159999999999934 5.279999999999932 5.759999999999922 5.889999999999919 5.889999999999919 5.969999999999917
    6.089999999999915 6.2799999999999105 6.7699999999999 6.8899999999998975 7.109999999999893 7.129999999999892
    7.179999999999891 7.289999999999889 7.339999999999888 7.559999999999883 7.619999999999882 7.69999999999988
    7.879999999999876 7.879999999999876 7.879999999999876 7.939999999999875 7.949999999999875 7.979999999999874
    8.19999999999987 8.439999999999864 8.469999999999864 8.589999999999861 8.809999999999857 8.999999999999853
    """


def _phi3_factors(long: str, short: str) -> dict[str, Any]:
    factors = {"long_factor": long, "short_factor": short}
    return {"type": "su", **{name: [float(factor) for factor in given.split()] for name, given in factors.items()}}


_PHI3_V: dict[str, Any] = {
    "_attn_implementation": "flash_attention_2",
    "_name_or_path": "Phi-3-vision-128k-instruct",
    "architectures": ["Phi3VForCausalLM"],
    "attention_dropout": 0.0,
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
    "hidden_size": 3072,
    "img_processor": {
        "image_dim_out": 1024,
        "model_name": "openai/clip-vit-large-patch14-336",
        "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3_v",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "resid_pdrop": 0.0,
    "rope_scaling": _phi3_factors(_PHI3_LONG_FACTOR, _PHI3_SHORT_FACTOR),
    "rope_theta": 10000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.1",
    "use_cache": True,
    "vocab_size": 32064,
}
_PHI3_5_V = _PHI3_V | {
    "_name_or_path": "Phi-3.5-vision-instruct",
    "pad_token_id": 32000,
    "rope_scaling": _phi3_factors(_PHI3_5_LONG_FACTOR, _PHI3_5_SHORT_FACTOR),
    "sliding_window": 262144,
}
PHI3_V: dict[str, dict[str, Any]] = {
    "phi-3-vision-128k": _PHI3_V,
    "phi-3.5-vision": _PHI3_5_V,
    "vlm2vec-full": _PHI3_5_V | {"_name_or_path": "microsoft/Phi-3.5-vision-instruct"},
}

_SIGLIP_PALIGEMMA: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_image_tokens": 256,
    "patch_size": 14,
    "vision_use_head": False,
}
_PALIGEMMA: dict[str, Any] = {
    "_vocab_size": 257152,
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
}
PALIGEMMA: dict[str, dict[str, Any]] = {
    "paligemma-3b-pt-224": _PALIGEMMA
    | {
        "ignore_index": -100,
        "projection_dim": 2048,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_image_tokens": 256,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
            "vocab_size": 257216,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.41.0.dev0",
        "vision_config": _SIGLIP_PALIGEMMA | {"projection_dim": 2048, "projector_hidden_act": "gelu_fast"},
    },
    "paligemma2-3b-pt-224": _PALIGEMMA
    | {
        "num_hidden_layers": 26,
        "projection_dim": 2304,
        "text_config": {
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 107],
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "model_type": "gemma2",
            "num_hidden_layers": 26,
            "num_image_tokens": 256,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "torch_dtype": "bfloat16",
            "vocab_size": 257216,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0.dev0",
        "vision_config": _SIGLIP_PALIGEMMA | {"num_positions": 256, "projection_dim": 2304, "torch_dtype": "bfloat16"},
    },
}

GEMMA3: dict[str, dict[str, Any]] = {
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
}

MISTRAL3: dict[str, dict[str, Any]] = {
    "mistral-small-3.1-24b": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "use_cache": True,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "image_size": 1540,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "model_type": "pixtral",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "rope_theta": 10000.0,
        },
        "vision_feature_layer": -1,
    },
    "pixtral-12b": {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 1,
        "image_token_index": 10,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "is_composition": True,
            "max_position_embeddings": 1024000,
            "model_type": "mistral",
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "vision_config": {
            "head_dim": 64,
            "hidden_act": "silu",
            "image_size": 1024,
            "is_composition": True,
            "model_type": "pixtral",
            "patch_size": 16,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}

_GLM4V_TOKENS = {"image_start_token_id": 151339, "image_end_token_id": 151340}
_GLM4V_TOKENS |= {"video_start_token_id": 151341, "video_end_token_id": 151342}
_GLM4V: dict[str, Any] = {
    **_GLM4V_TOKENS,
    "architectures": ["Glm4vForConditionalGeneration"],
    "model_type": "glm4v",
    "text_config": {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338, 151348],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 13696,
        "model_type": "glm4v_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default"},
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 151552,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "depth": 24,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 1536,
        "image_size": 336,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 13696,
        "num_heads": 12,
        "out_hidden_size": 4096,
        "patch_size": 14,
        "rms_norm_eps": 1e-05,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def _glm4v(image: int, max_position: int) -> dict[str, Any]:
    text = {**_GLM4V["text_config"], "max_position_embeddings": max_position}
    return {**_GLM4V, "image_token_id": image, "video_token_id": image + 1, "text_config": text}


GLM4V: dict[str, dict[str, Any]] = {
    "glm-4.1v-9b-thinking": _glm4v(151343, 65536),
    "glm-4.6v-flash": _glm4v(151363, 131072),
}

QWEN3_VL: dict[str, dict[str, Any]] = {
    "qwen3-vl-4b-instruct": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "initializer_range": 0.02,
            "intermediate_size": 9728,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17],
            "depth": 24,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2560,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    },
}
