"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite.chat.messages import content_of, text_of
from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, RequestOutput
from vllmlite.sampling_params import SamplingParams
from vllmlite.server.errors import renamed
from vllmlite.server.generation import Generation
from vllmlite.server.llamacpp.samplers import turned_off
from vllmlite.server.openai import logprobs
from vllmlite.server.openai.chat_protocol import (
    BatchChatRequest,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatDelta,
    ChatMessage,
    Counted,
    FunctionCall,
)
from vllmlite.server.openai.logprobs_protocol import ChatLogprobs
from vllmlite.server.openapi import documented
from vllmlite.server.parsers.parts import CallArguments, CallBegin, Content, Part, Reasoning
from vllmlite.server.protocol.base import Usage
from vllmlite.server.protocol.sampling import stream_usage
from vllmlite.server.reading import Reader, Reading, begin, begin_batch, reads_marks
from vllmlite.server.service import Service, request_id
from vllmlite.server.sse import DONE, JSON, Chunks, Stream, event
from vllmlite.server.tools import ToolUse

router = APIRouter()


@router.post("/v1/chat/completions", responses=documented(ChatCompletion, streams=True))
@router.post("/chat/completions", responses=documented(ChatCompletion, streams=True), include_in_schema=False)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    tools = _tool_use(body, service)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    with renamed(max_tokens=limit, logprobs="top_logprobs", prompt="messages"):
        params = _params(body, service, tools)
        generation, readers = await begin(
            service, "chatcmpl-", body, params, tools, body.reasoning_format in ("none", "raw"),
            request_id=request_id(body.request_id, request), priority=body.priority, cache_salt=body.cache_salt,
            arrival_time=arrival, model=model,
        )  # fmt: skip
    answer = _Answer(service, body, generation, tools, readers)
    if body.stream:
        return Stream(answer.events(), generation.close)
    (output,) = await generation.finished(request.receive)
    return JSON(answer.complete(output))


@router.post("/v1/chat/completions/batch", responses=documented(ChatCompletion))
async def create_chat_batch(body: BatchChatRequest, request: Request) -> Response:
    """Answer several conversations, as in vLLM: choice i answers conversation i."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    for name, value in (
        ("stream", body.stream),
        ("tools", body.tools),
        ("prompt_logprobs", body.prompt_logprobs),
    ):
        if value:
            raise ParameterError(
                name, value, "cannot be used with a batch of conversations: send them separately"
            )
    if body.n not in (None, 1):
        raise ParameterError("n", body.n, "must be 1: each conversation of a batch is answered once")
    bodies = body.each()
    if len(bodies) > service.config.max_prompts:
        raise ParameterError(
            "messages", len(bodies), f"must be at most {service.config.max_prompts} conversations"
        )
    tools = ToolUse()
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    with renamed(max_tokens=limit, logprobs="top_logprobs", prompt="messages"):
        params = _params(bodies[0], service, tools)
        generation, readers = await begin_batch(
            service, "chatcmpl-", bodies, params, tools, body.reasoning_format in ("none", "raw"),
            request_id=request_id(body.request_id, request), priority=body.priority, cache_salt=body.cache_salt,
            arrival_time=arrival, model=model,
        )  # fmt: skip
    answers = [
        _Answer(service, one, generation, tools, [reader])
        for one, reader in zip(bodies, readers, strict=True)
    ]
    whole: ChatCompletion | None = None
    for index, (answer, output) in enumerate(
        zip(answers, await generation.finished(request.receive), strict=True)
    ):
        found = answer.complete(output)
        found["choices"][0]["index"] = index
        if whole is None:
            whole = found
        else:
            whole["choices"] += found["choices"]
    assert whole is not None
    whole["prompt_token_ids"] = None
    whole["usage"] = usage_of(service, generation, readers)
    return JSON(whole)


@router.post("/v1/chat/completions/input_tokens", responses=documented(Counted))
@router.post("/chat/completions/input_tokens", responses=documented(Counted), include_in_schema=False)
async def count_input_tokens(body: ChatCompletionRequest, request: Request) -> Response:
    """Count the prompt tokens of a conversation, as in llama.cpp."""
    service: Service = request.app.state.service
    service.check(body, request)
    prompt = await service.encode_chat(body, _tool_use(body, service).shown)
    answer: Counted = {"input_tokens": len(prompt["prompt_token_ids"])}
    return JSON(answer)


def _tool_use(body: ChatCompletionRequest, service: Service) -> ToolUse:
    return ToolUse.of(body.functions(), body.tool_choice, body.parallel_tool_calls, service.config)


def _params(body: ChatCompletionRequest, service: Service, tools: ToolUse) -> SamplingParams:
    default = service.default_params
    changes: dict[str, Any] = tools.changes(body.asks_for_structure())
    if reads_marks(service.config, tools) and body.skip_special_tokens is None:
        changes["skip_special_tokens"] = False
    if body.top_logprobs and not body.logprobs:
        raise ParameterError("top_logprobs", body.top_logprobs, "needs logprobs=true")
    if body.logprobs:
        changes["logprobs"] = body.top_logprobs or 0
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    changes["max_tokens"] = service.chat_limit(limit)
    changes |= turned_off(body.samplers)
    budget = body.reasoning_budget()
    if budget is not None and (service.knows_reasoning or body.thinking_token_budget is not None):
        changes["thinking_token_budget"] = budget
    return body.sampling_params(default, **changes)


class _Answer:
    """Formats the ``n`` answers of one request, complete or as stream events."""

    def __init__(
        self,
        service: Service,
        body: ChatCompletionRequest,
        generation: Generation,
        tools: ToolUse,
        readers: list[Reader],
    ) -> None:
        self._service = service
        self._body = body
        self._generation = generation
        self._tools = tools
        self._readers = readers
        self._shows_reasoning = body.shows_reasoning()
        self._ids = service.config.return_tokens_as_token_ids or bool(body.return_tokens_as_token_ids)
        last = body.messages[-1]
        self._role = service.config.response_role if body.add_generation_prompt else last.role
        echoed = content_of(last.content, "messages.content") if body.echo and last.role == self._role else ""
        self._begin = text_of(echoed) or ""

    def complete(self, output: RequestOutput) -> ChatCompletion:
        return {
            "id": self._generation.id,
            "object": "chat.completion",
            "created": self._generation.created,
            "model": self._generation.model,
            "choices": [self._choice(completion) for completion in output.outputs],
            "usage": self._usage(),
            "service_tier": None,
            "system_fingerprint": None,
            "prompt_logprobs": logprobs.for_prompt(output.prompt_logprobs),
            "prompt_token_ids": output.prompt_token_ids if self._body.return_token_ids else None,
            "kv_transfer_params": None,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        forced = self._service.config.enable_force_include_usage
        usage, continuous = stream_usage(self._body.stream_options, forced)
        begun: set[int] = set()
        frame = self._frame([])
        if usage and not continuous:
            frame["usage"] = None
        chunks = Chunks(frame)
        while batch := await self._generation.take():
            choices: list[ChatChunkChoice] = []
            pieces: list[bytes] = []
            outputs = [(output, completion) for _, output in batch for completion in output.outputs]
            for output, completion in outputs:
                if completion.index not in begun:
                    begun.add(completion.index)
                    first: ChatChunk = {**frame, "choices": [self._opening(completion.index)]}
                    if continuous:
                        new = sum(len(later.token_ids) for _, later in outputs)
                        first["usage"] = self._generation.usage(without=new)
                    if self._body.return_token_ids:
                        first["prompt_token_ids"] = output.prompt_token_ids
                    pieces.append(event(first))
                choices += self._chunk_choices(completion)
            if continuous:
                counted: ChatChunk = {**frame, "usage": self._generation.usage()}
                pieces += [event({**counted, "choices": [choice]}) for choice in choices]
            else:
                pieces += [chunks.event(choice) for choice in choices]
            if pieces:
                yield b"".join(pieces)
        last = event({**frame, "usage": self._usage()}) if usage else b""
        yield last + DONE

    def _opening(self, index: int) -> ChatChunkChoice:
        """Return the first delta of an answer, before any of its tokens."""
        return _delta(index, {"role": self._role, "content": self._begin})

    def _usage(self) -> Usage:
        """Return the token counts of the complete answer."""
        return usage_of(self._service, self._generation, self._readers)

    def _frame(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return {
            "id": self._generation.id,
            "object": "chat.completion.chunk",
            "created": self._generation.created,
            "model": self._generation.model,
            "choices": choices,
        }

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        reader = self._readers[completion.index]
        reading = Reading.of(reader.read(completion))
        content = self._begin + reading.content
        reasoning = reading.reasoning if reading.reasoning and self._shows_reasoning else None
        message: ChatMessage = {
            "role": self._role,
            "content": content,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
            "refusal": None,
        }
        if reading.calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {
                    "id": self._tools.call_id(begin),
                    "type": "function",
                    "function": {"name": begin.name, "arguments": arguments},
                }
                for begin, arguments in reading.calls
            ]
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion),
            "finish_reason": reader.finish_reason(completion.finish_reason),
            "stop_reason": completion.stop_reason,
            "token_ids": completion.token_ids if self._body.return_token_ids else None,
        }

    def _chunk_choices(self, completion: CompletionOutput) -> list[ChatChunkChoice]:
        """Return chunks for new output, one per part; none while a character or a possible stop string is
        incomplete."""
        reader = self._readers[completion.index]
        deltas = [delta for part in reader.read(completion) if (delta := self._part_delta(part))]
        found = self._logprobs(completion)
        if not (deltas or completion.finish_reason or found or self._body.return_token_ids):
            return []
        choices = [_delta(completion.index, delta) for delta in deltas or [{}]]
        choices[0]["logprobs"] = found
        if completion.finish_reason is not None:
            choices[-1]["finish_reason"] = reader.finish_reason(completion.finish_reason)
            choices[-1]["stop_reason"] = completion.stop_reason
        if self._body.return_token_ids:
            choices[0]["token_ids"] = completion.token_ids
        return choices

    def _part_delta(self, part: Part) -> ChatDelta | None:
        match part:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                both: ChatDelta = {"reasoning": text, "reasoning_content": text}
                return both if self._shows_reasoning else None
            case CallBegin(index, name) as begin:
                function: FunctionCall = {"name": name, "arguments": ""}
                return {
                    "tool_calls": [
                        {
                            "index": index,
                            "id": self._tools.call_id(begin),
                            "type": "function",
                            "function": function,
                        }
                    ]
                }
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        if completion.logprobs is None:
            return None
        count = self._body.top_logprobs or 0
        return logprobs.for_chat(
            completion.logprobs,
            completion.token_ids,
            count,
            self._ids,
            self._service.tokenizer,
            self._body.logprob_token_ids or (),
        )


def usage_of(service: Service, generation: Generation, readers: Sequence[Reader]) -> Usage:
    """Return the token counts of a complete answer, with those of reasoning if the server recognises it."""
    usage = generation.usage()
    if service.config.reasoning_parser is not None:
        count = sum(reader.reasoning_tokens(service.tokenizer) for reader in readers)
        usage["completion_tokens_details"] = {"reasoning_tokens": count}
    return usage


def _delta(index: int, delta: ChatDelta) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
