"""vllmlite: vLLM's engine made small enough to own. Public names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "AsyncLLMEngine": "async_llm",
    "LLMEngine": "llm_engine",
    "LoRARequest": "lora.request",
    "AsyncEngineArgs": "config.arguments",
    "EngineArgs": "config.arguments",
    "EngineConfig": "config.engine_config",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "sampling_params",
    "PoolingParams": "pooling_params",
    "TextPrompt": "inputs",
    "TokensPrompt": "inputs",
    "RequestOutput": "outputs",
    "EmbeddingRequestOutput": "outputs",
    "CompletionOutput": "outputs",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineConfig",
    "LLMEngine",
    "LoRARequest",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

if TYPE_CHECKING:
    from vllmlite.async_llm import AsyncLLM, AsyncLLMEngine
    from vllmlite.config.arguments import AsyncEngineArgs, EngineArgs
    from vllmlite.config.engine_config import EngineConfig
    from vllmlite.inputs import TextPrompt, TokensPrompt
    from vllmlite.llm import LLM
    from vllmlite.llm_engine import LLMEngine
    from vllmlite.lora.request import LoRARequest
    from vllmlite.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
    from vllmlite.pooling_params import PoolingParams
    from vllmlite.sampling_params import SamplingParams, StructuredOutputsParams


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
