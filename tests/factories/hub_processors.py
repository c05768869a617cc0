"""preprocessor_config.json and processor_config.json of checkpoints on the hub.

Found as whole copies in public code: those of LLaVA-1.6-Mistral (a printed processor in an issue on it), OneVision (a
script that rebuilds the conversion of llava-hf), Gemma 3 (training code that writes it back), SmolVLM-256M (Spark NLP),
SmolVLM2-500M (an offline cache for SmolVLA), Mistral-Small (a test of a Swift runtime), Qwen2.5-VL and Qwen3-VL (tests
of a Rust server and others). GLM-4.1V's and GLM-4.6V-Flash's are those of GLM-OCR, their sister (a test of a Go
runtime, verbatim), under the names of their own classes. LLaVA-1.5's and Pixtral's are of their classes' form;
PaliGemma's and InternVL3's are what transformers' scripts that convert them write. SmolVLM2-2.2B's is the 500M's with
its own edges, which a test of public code has, and Idefics3's of SmolVLM's form. Those of Phi-3-vision and MiniCPM-V
come from the code published with the models.
"""

from __future__ import annotations

from typing import Any

from tests.factories.hub_configs import LLAVA_NEXT, LLAVA_ONEVISION


def _pictures(kind: str, resample: int, mean: tuple[float, ...], std: tuple[float, ...], **more: Any) -> dict[str, Any]:
    steps = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True}
    norm = {"image_mean": list(mean), "image_std": list(std), "rescale_factor": 0.00392156862745098}
    return {**steps, **norm, "image_processor_type": kind, "resample": resample, **more}


def _square(edge: int) -> dict[str, int]:
    return {"height": edge, "width": edge}


def _tiles(kind: str, longest: int, tile: int, **more: Any) -> dict[str, Any]:
    edges = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    return _pictures(kind, 1, *_HALVES, do_image_splitting=True, do_pad=True, **edges, **more)


def _pixtral(longest: int, patch: int, **more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"size": {"longest_edge": longest}, "patch_size": _square(patch)}
    return _pictures("PixtralImageProcessor", 3, *_CLIP, processor_class="PixtralProcessor", **sizes, **more)


def _qwen(joint: str) -> dict[str, Any]:
    sizes = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    norm = {"image_mean": list(_CLIP[0]), "image_std": list(_CLIP[1])}
    return {**sizes, **norm, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": joint}


def _glm(version: str) -> dict[str, Any]:
    sizes = {"size": {"shortest_edge": 12544, "longest_edge": 9633792}, "patch_size": 14, "merge_size": 2}
    norm = {"image_mean": list(_CLIP[0]), "image_std": list(_CLIP[1]), "do_rescale": True, "temporal_patch_size": 2}
    names = {"image_processor_type": f"{version}ImageProcessor", "processor_class": f"{version}Processor"}
    return {**sizes, **norm, **names}


_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PIXTRAL_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_CLIP_336: dict[str, Any] = {
    "crop_size": _square(336),
    "do_center_crop": True,
    "size": {"shortest_edge": 336},
}

PICTURES: dict[str, dict[str, Any]] = {
    "llava-1.5": _pictures("CLIPImageProcessor", 3, *_CLIP, processor_class="LlavaProcessor", **_CLIP_336),
    "llava-1.6": _pictures(
        "LlavaNextImageProcessor",
        3,
        *_CLIP,
        aspect_ratio_setting="anyres",
        do_pad=True,
        image_grid_pinpoints=LLAVA_NEXT["v1.6-mistral-7b"]["image_grid_pinpoints"],
        processor_class="LlavaNextProcessor",
        **_CLIP_336,
    ),
    "onevision": _pictures(
        "LlavaOnevisionImageProcessor",
        3,
        *_HALVES,
        do_pad=True,
        image_grid_pinpoints=LLAVA_ONEVISION["qwen2-7b-ov"]["image_grid_pinpoints"],
        processor_class="LlavaOnevisionProcessor",
        size=_square(384),
    ),
    "qwen2-vl": _qwen("Qwen2VLProcessor"),
    "qwen2.5-vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3-vl": {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": list(_HALVES[0]),
        "image_std": list(_HALVES[1]),
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "glm-4.1v": _glm("Glm4v"),
    "glm-4.6v-flash": _glm("Glm46V"),
    "internvl3": _pictures(
        "GotOcr2ImageProcessorFast",
        3,
        *_IMAGENET,
        crop_to_patches=False,  # which its joint processor overrules
        min_patches=1,
        max_patches=12,
        processor_class="InternVLProcessor",
        size=_square(448),
    ),
    "idefics3": _tiles("Idefics3ImageProcessor", 1456, 364, processor_class="Idefics3Processor"),
    "smolvlm-256m": _tiles("Idefics3ImageProcessor", 2048, 512, processor_class="Idefics3Processor"),
    "smolvlm2-2.2b": _tiles(
        "SmolVLMImageProcessor",
        1536,
        384,
        processor_class="SmolVLMProcessor",
        video_sampling={"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 384}},
    ),
    "gemma3": _pictures(
        "Gemma3ImageProcessor",
        2,
        *_HALVES,
        image_seq_length=256,
        processor_class="Gemma3Processor",
        size=_square(896),
    )
    | {
        "do_convert_rgb": None,
        "do_pan_and_scan": None,
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
    },
    "paligemma-224": _pictures(
        "SiglipImageProcessor",
        3,
        *_HALVES,
        image_seq_length=256,
        processor_class="PaliGemmaProcessor",
        size=_square(224),
    ),
    "pixtral-12b": _pixtral(1024, 16),
    "mistral-small-3.1": _pixtral(
        1540,
        14,
        crop_size=None,
        data_format="channels_first",
        default_to_square=True,
        device=None,
        do_center_crop=None,
        input_data_format=None,
        return_tensors=None,
    ),
    "phi-3-vision": {"image_processor_type": "Phi3VImageProcessor", "num_img_tokens": 144, "num_crops": 16},
    "phi-3.5-vision": {"image_processor_type": "Phi3VImageProcessor", "num_img_tokens": 144, "num_crops": 4},
    "minicpm-v-2.6": {
        "image_processor_type": "MiniCPMVImageProcessor",
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "use_image_id": True,
        "image_feature_size": 64,
        "slice_mode": True,
        "norm_mean": list(_HALVES[0]),
        "norm_std": list(_HALVES[1]),
        "version": 2.6,
    },
}

JOINT: dict[str, dict[str, Any]] = {
    "llava-1.5": {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 14}
    | {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "llava-1.6": {"processor_class": "LlavaNextProcessor", "image_token": "<image>", "patch_size": 14}
    | {"vision_feature_select_strategy": "default"},
    "onevision": {"processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>"}
    | {"num_image_tokens": 729, "vision_feature_select_strategy": "full"},
    "idefics3": {"processor_class": "Idefics3Processor", "image_seq_len": 169},
    "smolvlm-256m": {"processor_class": "Idefics3Processor", "image_seq_len": 64},
    "smolvlm2-2.2b": {"processor_class": "SmolVLMProcessor", "image_seq_len": 81},
    "gemma3": {"processor_class": "Gemma3Processor", "image_seq_length": 256},
    "pixtral-12b": {"processor_class": "PixtralProcessor", "patch_size": 16, **_PIXTRAL_TOKENS},
    "mistral-small-3.1": {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    | _PIXTRAL_TOKENS,
}
"""Of those that have one."""
