"""The table of model families.

One row is all that ``tests/models/test_parity.py`` and ``tests/engine/test_families.py`` need to hold a family to
transformers. What only one family does is tested in files of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from opsin.errors import MediaError, RequestError
from opsin.types import MediaLayout
from tests import factory
from tests.factories import (
    gemma3,
    glm4v,
    hub_configs,
    idefics3,
    internvl,
    llava_next,
    llava_onevision,
    mistral3,
    paligemma,
    phi3_v,
    qwen2_vl,
    qwen3_vl,
)
from tests.factories.family import FEATURE_SIZES, Family
from tests.factories.gemma3 import Gemma3Shape
from tests.factories.glm4v import Glm4vShape
from tests.factories.idefics3 import Idefics3Shape
from tests.factories.internvl import InternVLShape
from tests.factories.llava_onevision import OnevisionShape
from tests.factories.mistral3 import Mistral3Shape
from tests.factories.paligemma import PaliGemmaShape
from tests.factories.phi3_v import Phi3VShape
from tests.factories.qwen2_vl import Qwen2VLShape
from tests.factories.qwen3_vl import Qwen3VLShape
from tests.factory import LlavaShape

WINDOW = (("use_sliding_window", True), ("sliding_window", 12), ("max_window_layers", 1))  # Qwen2's
LLAMA3_ROPE = (
    "rope_parameters",
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)


def over(pick: Callable[[Family], Sequence[str] | Mapping[str, Any]]) -> Any:
    """Run a test over (family, name) for each name that ``pick`` finds in a row of the table."""
    cases = [pytest.param(row, name, id=f"{row.name}-{name}") for row in FAMILIES for name in pick(row)]
    return pytest.mark.parametrize(("family", "name"), cases)


LLAVA = Family(
    name="llava",
    write=factory.write_llava,
    hf_inputs=factory.hf_inputs,
    shapes={
        "mha": LlavaShape(),
        "gqa": LlavaShape(num_kv_heads=2),
        "mqa-3-layers": LlavaShape(num_kv_heads=1, num_layers=3),
        "tied": LlavaShape(tied=True),
        "odd-size": LlavaShape(image_size=44),
        "full-last-layer": LlavaShape(strategy="full", feature_layer=-1),
        "several-layers": LlavaShape(feature_layer=(-2, 0, 3)),
        "siglip": LlavaShape(tower="siglip", strategy="full", feature_layer=-1),
        "siglip-default": LlavaShape(tower="siglip"),
        "qwen2": LlavaShape(text="qwen2", num_kv_heads=2),
        "qwen2-window": LlavaShape(text="qwen2", num_kv_heads=2, text_extra=WINDOW),
        "mistral": LlavaShape(text="mistral", num_kv_heads=2),
        "mistral-window": LlavaShape(text="mistral", num_kv_heads=2, window=12),
        "head-dim": LlavaShape(text_extra=(("head_dim", 24),)),
        "biases": LlavaShape(text_extra=(("attention_bias", True), ("mlp_bias", True))),
        "llama3-rope": LlavaShape(text_extra=(LLAMA3_ROPE,)),
    },
    paged=("gqa", "mistral-window", "qwen2-window"),
    towers=("gqa", "siglip"),
    served=("siglip",),  # and CLIP's in tests/engine/test_offline.py
    hub_configs=hub_configs.LLAVA,
    num_blocks=26,
    options=[({"resample": 0}, {"resample": 0})],
    bad_embeddings=lambda parts, layouts: ({"image_embeds": parts, "image_grid_thw": [1, 1]}, "image_grid_thw"),
    refused=[((90, 70), {"num_crops": 4}, RequestError, "num_crops")],
)


def _next_embeddings(parts: list[torch.Tensor], layouts: list[MediaLayout]) -> list[Any]:
    sizes = torch.tensor([(layout.plan.height, layout.plan.width) for layout in layouts])
    return [parts, {"image_embeds": parts}, {"image_embeds": parts, "image_sizes": sizes}]


def _next_bad_embeddings(parts: list[torch.Tensor], layouts: list[MediaLayout]) -> tuple[Any, str]:
    *_, sized = _next_embeddings(parts, layouts)
    return sized | {"image_sizes": sized["image_sizes"].flip(0)}, "newlines included"


LLAVA_NEXT = Family(
    name="llava_next",
    write=llava_next.write_llava_next,
    hf_inputs=llava_next.hf_inputs,
    shapes={
        "mha": LlavaShape(),
        "llama": LlavaShape(num_kv_heads=2),
        "mistral": LlavaShape(text="mistral", num_kv_heads=2, num_layers=3),
        "mistral-2-layers": LlavaShape(text="mistral", num_kv_heads=2),
        "mistral-window": LlavaShape(text="mistral", num_kv_heads=2, window=12),
        "qwen2-tied": LlavaShape(text="qwen2", num_kv_heads=2, tied=True),
        "several-layers": LlavaShape(feature_layer=(-2, 0, 3)),
        "siglip": LlavaShape(tower="siglip", strategy="full", feature_layer=-1),
    },
    paged=("mha", "mistral-window"),
    towers=("mha", "siglip"),
    served=("llama", "mistral-2-layers"),
    hub_configs=hub_configs.LLAVA_NEXT,
    sizes=((90, 60), (40, 100)),  # mosaics of four and three tiles, rows and columns of which are cut
    feature_sizes=(*FEATURE_SIZES, (1, 900), (900, 1)),
    asked=([(90, 60)], [(200, 33), (40, 100)], [], [(90, 60)], [(30, 30), (30, 30), (900, 1)], [(640, 480)]),
    num_blocks=70,
    options=[({"resample": 0}, {"resample": 0})],
    embeddings=_next_embeddings,
    bad_embeddings=_next_bad_embeddings,
    refused=[((90, 60), {"image_grid_pinpoints": [[32, 32]]}, RequestError, "cannot change image_grid_pinpoints")],
)

LLAVA_ONEVISION = Family(
    name="llava_onevision",
    write=llava_onevision.write_llava_onevision,
    hf_inputs=llava_onevision.hf_inputs,
    shapes={
        "qwen2": OnevisionShape(),
        "qwen2-tied": OnevisionShape(tied=True, num_kv_heads=1),
        "qwen2-window": OnevisionShape(text_extra=WINDOW),
        "one-tile-3-layers": OnevisionShape(max_tiles=1, num_layers=3),
        "never-shrunk": OnevisionShape(max_tiles=9),
    },
    paged=("qwen2", "qwen2-window"),
    towers=("qwen2", "never-shrunk"),
    served=("qwen2",),
    hub_configs=hub_configs.LLAVA_ONEVISION,
    sizes=((96, 90), (40, 100)),  # a mosaic of nine tiles, shrunk, and one of three
    feature_sizes=(*FEATURE_SIZES, (1, 900), (900, 1)),
    asked=([(90, 60)], [(200, 33), (40, 100)], [], [(90, 60)], [(30, 30), (30, 30), (900, 1)], [(640, 480)]),
    num_blocks=70,
    options=[({"resample": 0}, {"resample": 0})],
    embeddings=_next_embeddings,
    bad_embeddings=_next_bad_embeddings,
    refused=[((90, 60), {"vision_aspect_ratio": "anyres_max_2"}, RequestError, "cannot change vision_aspect_ratio")],
)


def _qwen_embeddings(parts: list[torch.Tensor], layouts: list[MediaLayout]) -> list[Any]:
    grids = torch.tensor([layout.numbers for layout in layouts])
    return [{"image_embeds": given, "image_grid_thw": grids} for given in (torch.cat(parts), parts)]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mrope_section": [2, 3, 3],
}
QWEN2_VL = Family(
    name="qwen2_vl",
    write=qwen2_vl.write_qwen2_vl,
    hf_inputs=qwen2_vl.hf_inputs,
    image=qwen2_vl.IMAGE,
    shapes={
        "qwen2": Qwen2VLShape(),
        "qwen2-mha-3-layers": Qwen2VLShape(num_kv_heads=4, num_layers=3),
        "qwen2-mqa-tied": Qwen2VLShape(num_kv_heads=1, tied=True),
        "qwen2-flat": Qwen2VLShape(flat=True),
        "qwen2-flat-tied": Qwen2VLShape(flat=True, tied=True),
        "qwen2-yarn": Qwen2VLShape(text_extra=(("rope_parameters", YARN),)),
        "qwen2-window": Qwen2VLShape(text_extra=WINDOW),
        "qwen2.5": Qwen2VLShape(version="2.5"),
        "qwen2.5-tied": Qwen2VLShape(version="2.5", tied=True),
    },
    paged=("qwen2", "qwen2-window", "qwen2.5"),
    towers=("qwen2", "qwen2.5"),
    served=("qwen2", "qwen2.5"),
    hub_configs=hub_configs.QWEN2_VL,
    options=[({}, {}), ({"max_pixels": 1024}, {"size": {"shortest_edge": 1024, "longest_edge": 1024}})],
    embeddings=_qwen_embeddings,
    bad_embeddings=lambda parts, layouts: (parts, "image_grid_thw"),
    refused=[((900, 3), {}, MediaError, "200 times")],
)

GEMMA2 = (("attn_logit_softcapping", 2.0), ("final_logit_softcapping", 3.0), ("query_pre_attn_scalar", 20))
INTERNVL = Family(
    name="internvl",
    write=internvl.write_internvl,
    hf_inputs=internvl.hf_inputs,
    image=internvl.IMAGE,
    shapes={
        "qwen2": InternVLShape(),
        "qwen2-tied-mqa": InternVLShape(num_kv_heads=1, tied=True),
        "qwen2-window": InternVLShape(text_extra=WINDOW),
        "llama": InternVLShape(text="llama", num_kv_heads=4, num_layers=3),
        "llama-6b": InternVLShape(text="llama", vision_extra=(("norm_type", "rms_norm"), ("use_qk_norm", True))),
        "internvit-300m": InternVLShape(vision_extra=(("attention_bias", True),)),
        "internvit-6b": InternVLShape(vision_extra=(("norm_type", "rms_norm"), ("use_qk_norm", True))),
        "no-positions": InternVLShape(vision_extra=(("use_absolute_position_embeddings", False),)),
        "final-norm": InternVLShape(vision_extra=(("use_mean_pooling", False),)),
        "last-layer-by-number": InternVLShape(feature_layer=3, vision_extra=(("use_mean_pooling", False),)),
        "earlier-layer": InternVLShape(feature_layer=-2),
        "first-layer-mask-token": InternVLShape(feature_layer=1, vision_extra=(("use_mask_token", True),)),
        "ratio-1": InternVLShape(image_size=16, downsample_ratio=1.0),
        "ratio-quarter": InternVLShape(downsample_ratio=0.25),
        "large-tile": InternVLShape(image_size=64, max_patches=3),
        "dynamic-ntk": InternVLShape(
            text_extra=(("rope_parameters", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),)
        ),
    },
    paged=("qwen2", "qwen2-window"),
    towers=("internvit-300m", "internvit-6b"),
    served=("internvit-300m", "llama-6b"),
    hub_configs=hub_configs.INTERNVL,
    options=[
        (options, options)
        for options in ({"max_patches": 6}, {"max_patches": 4}, {"max_patches": 1}, {"crop_to_patches": False})
    ],
    bad_embeddings=lambda parts, layouts: ([parts[0][:-1], parts[1]], "whole tiles of 4"),
    refused=[((90, 70), {"max_patches": 0}, RequestError, "max_patches 0")],
)


def _sized_embeddings(parts: list[torch.Tensor], layouts: list[MediaLayout]) -> list[Any]:
    sizes = [(layout.plan.height, layout.plan.width) for layout in layouts]
    return [{"image_embeds": parts, "image_sizes": given} for given in (sizes, torch.tensor(sizes))]


IDEFICS3 = Family(
    name="idefics3",
    write=idefics3.write_idefics3,
    hf_inputs=idefics3.hf_inputs,
    shapes={
        "idefics3": Idefics3Shape(),
        "idefics3-tied-mqa": Idefics3Shape(num_kv_heads=1, tied=True, num_layers=3),
        "idefics3-llama3-rope": Idefics3Shape(text_extra=(LLAMA3_ROPE,)),
        "smolvlm": Idefics3Shape(version="smolvlm"),
        "smolvlm-scale-4": Idefics3Shape(version="smolvlm", scale_factor=4),
        "smolvlm-scale-3-odd-size": Idefics3Shape(version="smolvlm", edge=52, scale_factor=3, longest_edge=156),
    },
    paged=("idefics3", "smolvlm"),
    towers=("idefics3", "smolvlm-scale-3-odd-size"),
    served=("idefics3", "smolvlm-scale-3-odd-size"),
    hub_configs=hub_configs.IDEFICS3,
    num_blocks=58,
    options=[
        (options, options)
        for options in ({"do_image_splitting": False}, {"size": {"longest_edge": 64}}, {"resample": 0})
    ],
    embeddings=_sized_embeddings,
    bad_embeddings=lambda parts, layouts: (parts, "image_sizes"),
    refused=[((90, 70), {"size": {"longest_edge": 0}}, RequestError, "longest_edge")],
    renamed=False,
)

PALIGEMMA = Family(
    name="paligemma",
    write=paligemma.write_paligemma,
    hf_inputs=paligemma.hf_inputs,
    shapes={
        "gemma": PaliGemmaShape(),
        "gemma-mha-3-layers": PaliGemmaShape(num_kv_heads=4, num_layers=3, image_size=44),
        "gemma-untied": PaliGemmaShape(tied=False, text_extra=(("attention_bias", True),)),
        "gemma2": PaliGemmaShape(text="gemma2", num_kv_heads=2, adds_bos=False, text_extra=GEMMA2),
        "gemma2-window": PaliGemmaShape(text="gemma2", num_layers=3, text_extra=(*GEMMA2, ("sliding_window", 12))),
        "gemma2-no-caps": PaliGemmaShape(
            text="gemma2", text_extra=(("attn_logit_softcapping", None), ("final_logit_softcapping", None))
        ),
    },
    paged=("gemma", "gemma2-window"),
    towers=("gemma", "gemma2"),
    served=("gemma", "gemma2-window"),
    hub_configs=hub_configs.PALIGEMMA,
    num_blocks=30,
    least_step=128,
    is_prefix_lm=True,
    closing="\n",
    options=[({"resample": 0}, {"resample": 0})],
    bad_embeddings=lambda parts, layouts: ({"image_embeds": parts, "image_grid_thw": [1, 1]}, "image_grid_thw"),
    refused=[((90, 70), {"size": {"height": 64, "width": 64}}, RequestError, "32 x 32")],
)

PHI3_V = Family(
    name="phi3_v",
    write=phi3_v.write_phi3_v,
    hf_inputs=phi3_v.hf_inputs,
    image="<|image_{index}|>",
    shapes={
        "mha": Phi3VShape(original=None),
        "gqa-3-layers": Phi3VShape(num_kv_heads=2, num_layers=3, original=None),
        "mqa-tied": Phi3VShape(num_kv_heads=1, tied=True, original=None),
        # The short ones while the context is longer are in test_phi3_v_recorded.py: transformers turns to the long ones
        # by each prompt's length, opsin by the longest that it may run.
        "long-factors": Phi3VShape(original=4),
        "short-factors": Phi3VShape(original=2048),
        "window": Phi3VShape(window=12, original=None),
        "large-tiles": Phi3VShape(edge=48, num_crops=2, original=None),
        "last-layer": Phi3VShape(layer=-1, original=None),
    },
    paged=("gqa-3-layers", "long-factors", "window"),
    towers=("mha", "large-tiles"),
    served=("gqa-3-layers", "long-factors"),
    hub_configs={},  # tests/models/test_phi3_v_recorded.py
    feature_sizes=(*((w, h) for w, h in FEATURE_SIZES if max(w, h) <= 96 * min(w, h)), (1, 96), (96, 1)),
    options=[(options, options) for options in ({"num_crops": 1}, {"num_crops": 9})],
    bad_embeddings=lambda parts, layouts: ([parts[0][:-1], parts[1]], "no picture has as many"),
    refused=[
        ((90, 70), {"num_crops": 0}, RequestError, "num_crops is 0"),
        ((90, 70), {"num_img_tokens": 9}, RequestError, "cannot change num_img_tokens"),
        ((900, 3), {}, MediaError, "too narrow"),
    ],
    oracle=phi3_v.Phi3V.load,
)

_CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_min_ratio_to_activate": 1.0}
GEMMA3 = Family(
    name="gemma3",
    write=gemma3.write_gemma3,
    hf_inputs=gemma3.hf_inputs,
    image=gemma3.IMAGE,
    shapes={
        "sliding-full": Gemma3Shape(),
        "mqa-untied": Gemma3Shape(num_kv_heads=1, layer_types="SSF", tied=False),
        "full-first": Gemma3Shape(layer_types="FS"),
        "window-in-a-picture": Gemma3Shape(num_features=16, window=6),
        "biases": Gemma3Shape(text_extra=(("attention_bias", True),)),
    },
    paged=("sliding-full", "window-in-a-picture"),
    towers=("sliding-full", "window-in-a-picture"),
    served=("sliding-full", "window-in-a-picture"),
    hub_configs=hub_configs.GEMMA3,
    num_blocks=34,
    least_step=16,
    options=[
        (options, options)
        for options in ({"resample": 0}, _CROPS, _CROPS | {"pan_and_scan_max_num_crops": 1}, {"do_pan_and_scan": True})
    ],
    bad_embeddings=lambda parts, layouts: ([parts[0][:-1], parts[1]], "as many for each of its crops"),
    refused=[((90, 70), _CROPS | {"pan_and_scan_min_crop_size": 0}, RequestError, "pan_and_scan_min_crop_size")],
)

MISTRAL3 = Family(
    name="mistral3",
    write=mistral3.write_mistral3,
    hf_inputs=mistral3.hf_inputs,
    image=mistral3.IMAGE,
    shapes={
        "mistral3": Mistral3Shape(),
        "mistral3-head-dim-tied": Mistral3Shape(head_dim=24, tied=True, num_layers=3),
        "mistral3-merge-3": Mistral3Shape(merge=3, projector_bias=True),
        "mistral3-window": Mistral3Shape(window=12),
        "pixtral": Mistral3Shape(version="pixtral", projector_bias=True, longest_edge=64),
        "pixtral-several-layers": Mistral3Shape(version="pixtral", feature_layer=(-2, 0, 3), tied=True),
        "pixtral-silu": Mistral3Shape(version="pixtral", vision_extra=(("hidden_act", "silu"),)),
    },
    paged=("mistral3", "mistral3-window", "pixtral"),
    towers=("mistral3", "mistral3-merge-3", "pixtral"),
    served=("mistral3", "pixtral"),
    hub_configs=hub_configs.MISTRAL3,
    feature_sizes=(
        *((16, 16), (300, 40), (48, 48), (48, 48), (96, 49), (40, 300), (1, 1), (640, 480), (7, 30), (1, 64), (64, 1)),
        *((32, 32), (500, 470)),
    ),
    options=[(options, options) for options in ({"size": {"longest_edge": 48}}, {"resample": 0})],
    embeddings=_sized_embeddings,
    bad_embeddings=lambda parts, layouts: (parts, "image_sizes"),
    refused=[((150, 1), {}, MediaError, "too narrow")],
)

QWEN3_VL = Family(
    name="qwen3_vl",
    write=qwen3_vl.write_qwen3_vl,
    hf_inputs=qwen3_vl.hf_inputs,
    image=qwen2_vl.IMAGE,
    shapes={
        "deep-2": Qwen3VLShape(),
        "deep-2-layers-2-tied": Qwen3VLShape(num_layers=2, tied=True, num_kv_heads=1),
        "deep-1": Qwen3VLShape(deep_layers=(1,), position_edge=7, num_kv_heads=4),
        "shallow": Qwen3VLShape(deep_layers=(), text_extra=(("attention_bias", True),)),
    },
    paged=("deep-2", "deep-1"),
    towers=("deep-2", "shallow"),
    served=("deep-2", "deep-1"),
    least_features_gb=6e-5,
    hub_configs=hub_configs.QWEN3_VL,
    options=[({}, {}), ({"max_pixels": 1024}, {"size": {"shortest_edge": 1024, "longest_edge": 1024}})],
    embeddings=_qwen_embeddings,
    bad_embeddings=lambda parts, layouts: (parts, "image_grid_thw"),
    refused=[((900, 3), {}, MediaError, "200 times")],
    renamed=False,
)

GLM4V = Family(
    name="glm4v",
    write=glm4v.write_glm4v,
    hf_inputs=glm4v.hf_inputs,
    image=glm4v.IMAGE,
    shapes={
        "4.1": Glm4vShape(),
        "4.1-mqa-tied-3-layers": Glm4vShape(num_kv_heads=1, num_layers=3, tied=True),
        "4.1-all-rotated": Glm4vShape(rotated=1.0, num_kv_heads=4),
        "4.1-vision-biases": Glm4vShape(
            vision_extra=(("attention_bias", True), ("rms_norm_eps", 1e-2)), position_edge=12
        ),
        "4.6": Glm4vShape(version="4.6", position_edge=3, text_extra=(("attention_bias", True),)),
    },
    paged=("4.1", "4.1-all-rotated"),
    towers=("4.1", "4.1-vision-biases", "4.6"),
    served=("4.1", "4.6"),
    hub_configs=hub_configs.GLM4V,
    options=[(options, options) for options in ({}, {"size": {"shortest_edge": 1024, "longest_edge": 4096}})],
    embeddings=_qwen_embeddings,
    bad_embeddings=lambda parts, layouts: (parts, "image_grid_thw"),
    refused=[((9000, 3), {}, MediaError, "200 times"), ((90, 70), {"max_pixels": 1024}, RequestError, "max_pixels")],
    renamed=False,
)

FAMILIES = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_VL,
    INTERNVL,
    IDEFICS3,
    MISTRAL3,
    PALIGEMMA,
    PHI3_V,
    GEMMA3,
    QWEN3_VL,
    GLM4V,
)
