"""The transformers side of ``opsin verify``: the same prompts and pictures through Hugging Face's own model."""

# transformers does not type what it loads.
# pyright: basic

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

_PICTURE_INPUTS = frozenset(
    {"pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images"}
)
_WHOLE_PROCESSORS = ("mistral3",)  # whose picture processor alone prepares pictures for another patch size


@dataclass(frozen=True, slots=True)
class OracleAnswer:
    """What transformers makes of one prompt.

    Attributes:
        prompt_token_ids: its processor's, or None where that cannot be loaded here.
        pixels: the values that its processor gives the tower, flat; None without pictures.
        logprobs_TV: log-probabilities of each token of the answer that is scored, float32.
    """

    prompt_token_ids: list[int] | None
    pixels: npt.NDArray[np.float32] | None
    logprobs_TV: npt.NDArray[np.float32]


class Oracle:
    """transformers' model and processors of one folder.

    Raises:
        ValueError: transformers has no such architecture.
        ImportError: it needs what is not installed.
    """

    def __init__(self, folder: Path, device: Any, dtype: Any) -> None:
        import torch
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._torch = torch
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.name = f"transformers {_version()}"
        self._model = AutoModelForImageTextToText.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        self._model = self._model.to(device).eval()
        self._device = device
        self._image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, **_pillow())
        self._processor = _processor(folder)
        if self._processor is not None:
            self._processor.image_processor = self._image_processor
        elif config.model_type in _WHOLE_PROCESSORS:
            raise ImportError("its processor needs torchvision (pip install torchvision)")
        self._image_options = _image_options(config.model_type)
        self._image_token_id = getattr(config, "image_token_id", getattr(config, "image_token_index", None))

    def answer(
        self, prompt: str, pictures: Sequence[Image.Image], prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> OracleAnswer:
        """Score an answer token by token, up to one that stands for a picture: the model would look for its features.

        Args:
            prompt_ids: the expanded prompt as opsin has it, which the model is run on.
        """
        torch = self._torch
        made = self._processed(prompt, pictures)
        theirs = made.pop("input_ids", None)
        made = {name: value for name, value in made.items() if name in _PICTURE_INPUTS}
        given = list(takewhile(lambda token_id: token_id != self._image_token_id, answer_ids[:-1]))
        ids = torch.tensor([[*prompt_ids, *given]], device=self._device)
        inputs = {name: _to(value, self._device, self._model.dtype) for name, value in made.items()}
        is_picture = (ids == self._image_token_id).int()
        is_answer = torch.zeros_like(is_picture)
        is_answer[:, len(prompt_ids) :] = 1
        taken = inspect.signature(self._model.forward).parameters
        if "token_type_ids" in taken:  # what sees ahead: PaliGemma's prompt, other models' pictures
            inputs["token_type_ids"] = is_answer if self._model.config.model_type == "paligemma" else is_picture
        if "mm_token_type_ids" in taken:
            inputs["mm_token_type_ids"] = is_picture
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
        logprobs_TV = logits[0, len(prompt_ids) - 1 :].float().log_softmax(-1).cpu().numpy()
        pixels = made.get("pixel_values")
        return OracleAnswer(
            None if theirs is None else theirs[0].tolist(),
            None if pixels is None else np.asarray(pixels, np.float32).reshape(-1),
            logprobs_TV,
        )

    def _processed(self, prompt: str, pictures: Sequence[Image.Image]) -> dict[str, Any]:
        if not pictures:  # not every processor takes text alone
            return {}
        if self._processor is not None:
            return dict(self._processor(text=[prompt], images=list(pictures), return_tensors="pt"))
        return dict(self._image_processor(images=list(pictures), return_tensors="pt", **self._image_options))


def _pillow() -> Mapping[str, Any]:
    """Asks for the picture processor that resizes with Pillow, as opsin does: torchvision's values differ a little."""
    release = tuple(int(part) for part in _version().split(".")[:2])
    return {"backend": "pil"} if release >= (5, 4) else {"use_fast": False}


def _processor(folder: Path) -> Any:
    """transformers' joint processor.

    None where it needs what is not installed (torchvision, for videos), or tokens that the tokenizer does not name.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ImportError, ValueError, OSError, TypeError, AttributeError):
        return None


def _image_options(model_type: str) -> Mapping[str, Any]:
    """What the joint processor of a family asks of its picture processor by default."""
    try:
        module = importlib.import_module(f"transformers.models.{model_type}.processing_{model_type}")
    except ImportError:
        return {}
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.endswith("ProcessorKwargs"):
            found |= getattr(value, "_defaults", {}).get("images_kwargs", {})
        elif name.endswith("Processor"):
            found |= getattr(value, "images_kwargs", {})
    return found


def _to(value: Any, device: Any, dtype: Any) -> Any:
    if not hasattr(value, "to"):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _version() -> str:
    import transformers

    return transformers.__version__
