"""opsin runs vision-language models: pictures and text in, text out.

Public names only, each loaded when it is first used, so that ``import opsin`` stays free of torch: media workers and
``opsin --help`` start in a fraction of a second.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.async_llm import AsyncLLM
    from opsin.errors import (
        ConfigError,
        ContextLengthError,
        EngineDeadError,
        MediaError,
        OpsinError,
        RequestError,
        RequestFailedError,
        UnsupportedModelError,
        WeightError,
    )
    from opsin.llm import LLM
    from opsin.params import BeamSearchParams, PoolingParams, SamplingParams

__version__ = "0.1.0.dev0"

_HOMES = {
    "LLM": "opsin.llm",
    "AsyncLLM": "opsin.async_llm",
    "BeamSearchParams": "opsin.params",
    "ConfigError": "opsin.errors",
    "ContextLengthError": "opsin.errors",
    "EngineDeadError": "opsin.errors",
    "MediaError": "opsin.errors",
    "OpsinError": "opsin.errors",
    "PoolingParams": "opsin.params",
    "RequestError": "opsin.errors",
    "RequestFailedError": "opsin.errors",
    "SamplingParams": "opsin.params",
    "UnsupportedModelError": "opsin.errors",
    "WeightError": "opsin.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "ConfigError",
    "ContextLengthError",
    "EngineDeadError",
    "MediaError",
    "OpsinError",
    "PoolingParams",
    "RequestError",
    "RequestFailedError",
    "SamplingParams",
    "UnsupportedModelError",
    "WeightError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
