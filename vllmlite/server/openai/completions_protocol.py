"""Request and response types of ``/v1/completions`` and ``/generate``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 -- pydantic's wish before 3.12

from vllmlite.server.openai.logprobs_protocol import CompletionLogprobs, PromptLogprobs
from vllmlite.server.protocol.base import Prompts, Usage
from vllmlite.server.protocol.sampling import SamplingRequest


class CompletionRequest(SamplingRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: int | None = Field(
        None, description="Default: the model's, or 16. 0 with echo only scores the prompt."
    )
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class GenerateRequest(SamplingRequest):
    """Body of ``POST /generate``: vLLM's minimal endpoint, with a prompt and SamplingParams."""

    prompt: Prompts
    max_tokens: int | None = None
    logprobs: int | None = None


class CompletionChoice(TypedDict):
    """One completion, or its new part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int] | None]
    prompt_token_ids: NotRequired[list[int] | None]
    prompt_logprobs: NotRequired[PromptLogprobs | None]


class Completion(TypedDict):
    """Answer of ``/v1/completions``, and a chunk of its stream. Fields that are null exist for clients of vLLM."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    service_tier: NotRequired[None]
    system_fingerprint: NotRequired[None]
    kv_transfer_params: NotRequired[None]


class Generated(TypedDict):
    """Answer of ``/generate``, and a line of its stream: prompts with their completions."""

    text: list[str]
