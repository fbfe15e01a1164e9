"""``POST /v1/responses``: OpenAI's Responses API for text."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllmlite.server.conversation import conversation
from vllmlite.server.errors import ApiError, as_api_error, renamed
from vllmlite.server.generation import Generation
from vllmlite.server.openai import logprobs
from vllmlite.server.openai.chat_protocol import ChatPrompt
from vllmlite.server.openapi import documented
from vllmlite.server.parsers.parts import Content, Reasoning
from vllmlite.server.reading import Reader, begin, reads_marks
from vllmlite.server.responses.items import Items, as_messages
from vllmlite.server.responses.protocol import (
    LOGPROBS,
    InputTokens,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from vllmlite.server.responses.store import StoredResponse, input_items, owner_of
from vllmlite.server.service import Service, request_id
from vllmlite.server.sse import JSON, Stream, named_event
from vllmlite.server.tools import ToolUse

router = APIRouter()

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logit_bias",
    "thinking_token_budget",
)  # fmt: skip


@router.post("/v1/responses", responses=documented(ResponseObject, streams=True))
@router.post("/responses", responses=documented(ResponseObject, streams=True), include_in_schema=False)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation in output items."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    tools = _tool_use(body, service)
    store = service.responses
    keeps = store.keeps(body.store)
    if body.background and not keeps:
        raise ParameterError("background", True, "needs store=true and a server with --max-stored-responses")
    if body.background and body.stream:
        raise ParameterError(
            "stream", True, "cannot be combined with background: fetch the response by its id"
        )
    owner = owner_of(request)
    earlier = store.before(owner, body.previous_response_id)
    # A stored response can be read by its id, so clients must not choose the id.
    name = None if keeps else request_id(body.request_id, request)
    with renamed(max_tokens="max_output_tokens", logprobs="top_logprobs", prompt="input", messages="input"):
        params = _params(body, service, tools)
        generation, (reader,) = await begin(
            service, "resp_", _talk(body, tools, earlier), params, tools,
            request_id=name, priority=body.priority, cache_salt=body.cache_salt,
            arrival_time=arrival, model=model,
        )  # fmt: skip
    answer = _Answer(service, body, generation, params, tools, reader)
    if keeps:
        answer.store(owner, earlier)
    if body.background:
        return JSON(answer.begin_in_background())
    if body.stream:
        return Stream(answer.events(), generation.close, error_event=answer.error_event)
    (output,) = await generation.finished(request.receive)
    return JSON(answer.complete(output))


@router.post("/v1/responses/input_tokens", responses=documented(InputTokens))
async def count_input_tokens(body: ResponsesRequest, request: Request) -> Response:
    """Count the tokens of a request's input."""
    service: Service = request.app.state.service
    service.check(body, request)
    tools = _tool_use(body, service)
    earlier = service.responses.before(owner_of(request), body.previous_response_id)
    prompt = await service.encode_chat(_talk(body, tools, earlier), tools.shown)
    answer: InputTokens = {"object": "response.input_tokens", "input_tokens": len(prompt["prompt_token_ids"])}
    return JSON(answer)


def _talk(body: ResponsesRequest, tools: ToolUse, earlier: list[dict[str, Any]]) -> ChatPrompt:
    """Return the conversation: items of the ``earlier`` responses that this one continues, then the request's own."""
    given = [*earlier, *input_items(body.input)] if earlier else body.input
    talk = conversation(as_messages(given, body.instructions), "input", tools.tools)
    effort = body.reasoning.effort if body.reasoning else None
    options = {
        "reasoning_effort": effort,
        "enable_thinking": body.enable_thinking,
        "thinking": body.thinking,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return talk.model_copy(update=options)


def _tool_use(body: ResponsesRequest, service: Service) -> ToolUse:
    return ToolUse.of(_tools(body), _choice(body.tool_choice), body.parallel_tool_calls, service.config)


def _tools(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the tools in the form of OpenAI's chat."""
    return [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in body.functions()
    ]


def _choice(choice: Any) -> Any:
    """Return the tool choice in the form of OpenAI's chat."""
    if isinstance(choice, dict) and choice.keys() == {"type", "name"}:
        return {"type": choice["type"], "function": {"name": choice["name"]}}
    return choice


def _params(body: ResponsesRequest, service: Service, tools: ToolUse) -> SamplingParams:
    given = {name: getattr(body, name) for name in SAMPLING if getattr(body, name) is not None}
    structure = _structure(body)
    if structure is not None:
        given["structured_outputs"] = structure
    given |= tools.changes(structure is not None)
    if reads_marks(service.config, tools) and body.skip_special_tokens is None:
        given["skip_special_tokens"] = False
    if LOGPROBS in (body.include or ()):
        given["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise ParameterError("top_logprobs", body.top_logprobs, f"needs include: {LOGPROBS}")
    given["max_tokens"] = service.chat_limit(body.max_output_tokens)
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return service.default_params.clone(**given, output_kind=kind)


def _structure(body: ResponsesRequest) -> StructuredOutputsParams | None:
    form = body.text.format if body.text else None
    if body.structured_outputs is not None:
        if form is not None and form.type != "text":
            raise ParameterError("text.format", form.type, "cannot be combined with structured_outputs")
        return body.structured_outputs.params()
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if form.json_schema is None:
        raise ParameterError("text.format", form.type, "needs a schema")
    return StructuredOutputsParams(json=form.json_schema)


class _Answer:
    """Formats one answer, complete or as stream events."""

    def __init__(
        self,
        service: Service,
        body: ResponsesRequest,
        generation: Generation,
        params: SamplingParams,
        tools: ToolUse,
        reader: Reader,
    ) -> None:
        self._service = service
        self._body = body
        self._generation = generation
        self._params = params
        self._tools = tools
        self._reader = reader
        self._items = Items(tools.call_id, service.config.response_role)
        self._numbers = itertools.count()
        self._logprobs: list[Any] = []
        """Log-probabilities of tokens whose text has not been emitted yet."""
        self._stored: StoredResponse | None = None

    def store(self, owner: bytes, earlier: list[dict[str, Any]]) -> None:
        """Prepare storing the response for ``owner`` once it has finished; it continues the ``earlier`` items."""
        own = input_items(self._body.input)
        self._stored = StoredResponse(self._object(), owner, [*earlier, *own], len(own))

    def begin_in_background(self) -> ResponseObject:
        """Generate the response in the background; return it in its initial state."""
        assert self._stored is not None
        stored = self._stored
        try:
            self._service.responses.begin(stored)
        except ApiError:
            self._generation.close()
            raise
        stored.task = asyncio.get_running_loop().create_task(self._generate())
        stored.task.add_done_callback(self._store_result)
        return stored.response

    async def _generate(self) -> ResponseObject:
        last: RequestOutput | None = None
        while batch := await self._generation.take():
            ((_, last),) = batch[-1:]
        assert last is not None
        return self.complete(last)

    def _store_result(self, task: asyncio.Task[ResponseObject]) -> None:
        """Store the result of a background response."""
        assert self._stored is not None
        if task.cancelled():
            self._stored.response = {**self._stored.response, "status": "cancelled"}
        elif isinstance(error := task.exception(), Exception):
            self._stored.response = self._failed(error)
        else:
            self._stored.response = task.result()
        self._stored.task = None
        self._generation.close()
        if self._service.responses.has(self._stored):
            self._service.responses.keep(self._stored)

    def _keep(self, response: ResponseObject) -> ResponseObject:
        """Store a finished response, if requested."""
        if self._stored is not None and not self._body.background:
            self._stored.response = response
            self._service.responses.keep(self._stored)
        return response

    def complete(self, output: RequestOutput) -> ResponseObject:
        """Return the complete answer."""
        (completion,) = output.outputs
        self._new_events(completion)
        return self._keep(self._object(completion))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the documented stream events in order, numbered."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event({"type": kind, "response": self._object()})
        last: CompletionOutput | None = None
        while batch := await self._generation.take():
            pieces = b""
            for _, output in batch:
                (last,) = output.outputs
                pieces += b"".join(map(self._event, self._new_events(last)))
            if pieces:
                yield pieces
        assert last is not None
        response = self._keep(self._object(last))
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def error_event(self, error: Exception) -> bytes:
        """Return the last event of a stream that failed."""
        return self._event({"type": "response.failed", "response": self._failed(error)})

    def _failed(self, error: Exception) -> ResponseObject:
        failure = as_api_error(error)
        return {
            **self._object(),
            "status": "failed",
            "error": {"code": failure.type, "message": failure.message},
        }

    def _event(self, event: dict[str, Any]) -> bytes:
        return named_event({**event, "sequence_number": next(self._numbers)})

    def _new_events(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """Return the events of new output."""
        if completion.logprobs is not None:
            count = self._body.top_logprobs or 0
            found = logprobs.for_chat(
                completion.logprobs, completion.token_ids, count, False, self._service.tokenizer
            )
            self._logprobs += found["content"]
        parts = self._reader.read(completion)
        if not self._body.include_reasoning:
            parts = [part for part in parts if not isinstance(part, Reasoning)]
        events: list[dict[str, Any]] = []
        for part in parts:
            entries: list[Any] = []
            if isinstance(part, Content):
                entries, self._logprobs = self._logprobs, entries
            events += self._items.add(part, entries)
        if completion.finish_reason is not None:
            status = "incomplete" if completion.finish_reason == "length" else "completed"
            events += self._items.end(status, self._logprobs)
        return events

    def _object(self, completion: CompletionOutput | None = None) -> ResponseObject:
        """Return the response so far; ``completion`` is its last output if it has ended."""
        body, params = self._body, self._params
        cut = completion is not None and completion.finish_reason == "length"
        form = body.text.format if body.text else None
        return {
            "id": self._generation.id,
            "object": "response",
            "created_at": self._generation.created,
            "status": "in_progress" if completion is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._generation.model,
            "output": list(self._items.items),
            "parallel_tool_calls": self._tools.parallel,
            "previous_response_id": body.previous_response_id,
            "background": bool(body.background),
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": self._service.responses.keeps(body.store),
            "temperature": params.temperature,
            "text": {
                "format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
            },
            "tool_choice": body.tool_choice or self._tools.choice,
            "tools": [tool.model_dump() for tool in body.functions()],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if completion is None else self._usage(),
        }

    def _usage(self) -> ResponseUsage:
        usage = self._generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],  # type: ignore[typeddict-item]
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": self._reader.reasoning_tokens(self._service.tokenizer)
            },
            "total_tokens": usage["total_tokens"],
        }
