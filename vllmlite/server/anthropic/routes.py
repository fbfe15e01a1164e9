"""``POST /v1/messages`` and ``POST /v1/messages/count_tokens``: Anthropic's API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllmlite.server.anthropic.blocks import Blocks, as_messages
from vllmlite.server.anthropic.protocol import (
    AnthropicAnswer,
    AnthropicChoice,
    AnthropicError,
    AnthropicUsage,
    CountRequest,
    MessagesRequest,
)
from vllmlite.server.apis import Api
from vllmlite.server.conversation import conversation
from vllmlite.server.errors import ApiError, as_api_error, renamed
from vllmlite.server.generation import Generation
from vllmlite.server.openai.chat_protocol import ChatPrompt, Counted, thinking_variables
from vllmlite.server.openapi import documented
from vllmlite.server.reading import Reader, begin, reads_marks
from vllmlite.server.service import Service, request_id
from vllmlite.server.sse import JSON, Stream, named_event
from vllmlite.server.tools import ToolUse

router = APIRouter()

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
"""Anthropic's stop reasons by OpenAI's finish reasons."""
NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
"""Error details that make Anthropic's tool runner, which first asks for a thread, continue without one."""


@router.post("/v1/messages", responses=documented(AnthropicAnswer, streams=True, error=AnthropicError))
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation in content blocks."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    if body.thread is not None:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            "thread: not supported: send the whole conversation",
            details=NO_THREADS,
        )
    tools = _tool_use(body, service)
    with renamed(stop="stop_sequences", prompt="messages"):
        params = _params(body, service, tools)
        generation, (reader,) = await begin(
            service, "msg_", _talk(body, tools), params, tools, request_id=request_id(None, request),
            cache_salt=body.cache_salt, arrival_time=arrival, model=model,
        )  # fmt: skip
    answer = _Answer(service, body, generation, reader, Blocks(tools.call_id))
    if body.stream:
        return Stream(answer.events(), generation.close, error_event=_error_event)
    (output,) = await generation.finished(request.receive)
    return JSON(answer.complete(output))


@router.post("/v1/messages/count_tokens", responses=documented(Counted, error=AnthropicError))
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """Count the prompt tokens of a conversation."""
    service: Service = request.app.state.service
    service.check(body, request)
    tools = _tool_use(body, service)
    prompt = await service.encode_chat(_talk(body, tools), tools.shown)
    return JSON({"input_tokens": len(prompt["prompt_token_ids"])})


def _talk(body: CountRequest, tools: ToolUse) -> ChatPrompt:
    messages = as_messages(body.messages, body.system)
    talk = conversation(messages, "messages", tools.tools).model_copy(update=_thinking_options(body))
    if body.messages[-1].role == "assistant":  # Anthropic's way of prefilling the answer
        talk = talk.model_copy(update={"add_generation_prompt": False, "continue_final_message": True})
    return talk


def _thinking_options(body: CountRequest) -> dict[str, Any]:
    """Return the chat prompt's fields about thinking."""
    variables = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        variables = thinking_variables(body.thinking.type != "disabled") | variables
    effort = body.output_config.effort if body.output_config else None
    return {
        "reasoning_effort": effort,
        "enable_thinking": body.enable_thinking,
        "chat_template_kwargs": variables,
    }


def _structure(body: CountRequest) -> StructuredOutputsParams | None:
    form = (body.output_config.format if body.output_config else None) or body.output_format
    return StructuredOutputsParams(json=form.json_schema) if form else None


def _tool_use(body: CountRequest, service: Service) -> ToolUse:
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "parameters": tool.input_schema,
                **({"strict": tool.strict} if tool.strict is not None else {}),
            },
        }
        for tool in body.functions()
    ]
    choice = body.tool_choice or AnthropicChoice(type="auto" if tools else "none")
    wanted: Any = {"any": "required"}.get(choice.type, choice.type)
    if choice.type == "tool":
        wanted = {"type": "function", "function": {"name": choice.name}}
    elif choice.name is not None:
        raise ParameterError("tool_choice.name", choice.name, "needs type tool")
    return ToolUse.of(tools, wanted, not choice.disable_parallel_tool_use, service.config)


def _params(body: MessagesRequest, service: Service, tools: ToolUse) -> SamplingParams:
    given = {name: getattr(body, name) for name in ("temperature", "top_k", "top_p")}
    changes = {name: value for name, value in given.items() if value is not None}
    structure = _structure(body)
    if structure is not None:
        changes["structured_outputs"] = structure
    changes |= tools.changes(structure is not None)
    if reads_marks(service.config, tools):
        changes["skip_special_tokens"] = False
    thinking = body.thinking
    if thinking is not None and thinking.type == "enabled" and service.knows_reasoning:
        changes["thinking_token_budget"] = thinking.budget_tokens
    if body.stop_sequences:
        changes["stop"] = body.stop_sequences
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return service.default_params.clone(**changes, max_tokens=body.max_tokens, output_kind=kind)


def _error_event(error: Exception) -> bytes:
    return named_event(as_api_error(error).body(Api.ANTHROPIC))


class _Answer:
    """Formats one answer, complete or as stream events."""

    def __init__(
        self, service: Service, body: MessagesRequest, generation: Generation, reader: Reader, blocks: Blocks
    ) -> None:
        self._service = service
        self._edits: dict[str, Any] = {}
        if body.context_management is not None:
            self._edits["context_management"] = {"applied_edits": []}
        self._generation = generation
        self._reader = reader
        self._blocks = blocks

    def complete(self, output: RequestOutput) -> AnthropicAnswer:
        """Return the complete answer."""
        (completion,) = output.outputs
        self._new_events(completion)
        return self._message(completion)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the documented stream events in order."""
        begun = False
        last: CompletionOutput | None = None
        while batch := await self._generation.take():
            pieces = b""
            if not begun:  # the prompt's length is known from the first output on
                begun = True
                usage = {**self._usage(), "output_tokens": 0}
                message = {**self._message(), "content": [], "usage": usage}
                pieces += named_event({"type": "message_start", "message": message})
                pieces += named_event({"type": "ping"})
            for _, output in batch:
                (last,) = output.outputs
                pieces += b"".join(map(named_event, self._new_events(last)))
            if pieces:
                yield pieces
        assert last is not None
        ended = self._message(last)
        delta = {"stop_reason": ended["stop_reason"], "stop_sequence": ended["stop_sequence"]}
        end = named_event({"type": "message_delta", "delta": delta, "usage": ended["usage"], **self._edits})
        yield end + named_event({"type": "message_stop"})

    def _new_events(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """Return the events of new output."""
        events = [event for part in self._reader.read(completion) for event in self._blocks.add(part)]
        if completion.finish_reason is not None:
            events += self._blocks.end()
        return events

    def _message(self, completion: CompletionOutput | None = None) -> AnthropicAnswer:
        """Return the answer so far; ``completion`` is its last output if it has ended."""
        reason = sequence = None
        if completion is not None:
            reason = STOP_REASONS[self._reader.finish_reason(completion.finish_reason) or "stop"]
            if self._reader.called and reason == "end_turn":
                reason = "tool_use"
            if isinstance(completion.stop_reason, str):
                reason, sequence = "stop_sequence", completion.stop_reason
        return {
            "id": self._generation.id,
            "type": "message",
            "role": "assistant",
            "model": self._generation.model,
            "content": self._blocks.blocks,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
            **self._edits,  # type: ignore[typeddict-item]
        }

    def _usage(self) -> AnthropicUsage:
        usage = self._generation.usage()
        prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        config = self._service.engine.llm_engine.config
        # A repeated prompt would hit its full blocks, except that its last token is always computed.
        kept = (prompt - 1) // config.block_size * config.block_size if config.enable_prefix_caching else 0
        created = max(kept - cached, 0)
        return {
            "input_tokens": prompt - cached - created,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
