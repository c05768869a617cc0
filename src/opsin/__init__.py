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
    from opsin.inputs import PromptType, TextPrompt, TokensPrompt
    from opsin.llm import LLM, EngineArgs
    from opsin.outputs import CompletionOutput, RequestOutput
    from opsin.params import BeamSearchParams, PoolingParams, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0.dev0"

_HOMES = {
    "LLM": "opsin.llm",
    "AsyncLLM": "opsin.async_llm",
    "BeamSearchParams": "opsin.params",
    "CompletionOutput": "opsin.outputs",
    "ConfigError": "opsin.errors",
    "ContextLengthError": "opsin.errors",
    "EngineArgs": "opsin.llm",
    "EngineDeadError": "opsin.errors",
    "MediaError": "opsin.errors",
    "OpsinError": "opsin.errors",
    "PoolingParams": "opsin.params",
    "PromptType": "opsin.inputs",
    "RequestError": "opsin.errors",
    "RequestFailedError": "opsin.errors",
    "RequestOutput": "opsin.outputs",
    "SamplingParams": "opsin.params",
    "StructuredOutputsParams": "opsin.params",
    "TextPrompt": "opsin.inputs",
    "TokensPrompt": "opsin.inputs",
    "UnsupportedModelError": "opsin.errors",
    "WeightError": "opsin.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "EngineArgs",
    "EngineDeadError",
    "MediaError",
    "OpsinError",
    "PoolingParams",
    "PromptType",
    "RequestError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
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
