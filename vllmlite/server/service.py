"""Service: one engine with its model names, admission of requests, and tokenisation and chat templates."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import Receive

from vllmlite.async_llm import AsyncLLM, NewRequest, OutputStream
from vllmlite.chat.builtin import BUILT_IN
from vllmlite.chat.template import PromptOptions
from vllmlite.config.options import did_you_mean
from vllmlite.errors import ContextLengthError, ParameterError
from vllmlite.guided.compiler import PARALLEL
from vllmlite.outputs import RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import SamplingParams, StructuredOutputsParams
from vllmlite.server.apis import Api, api_of, path_of
from vllmlite.server.config import ServerConfig
from vllmlite.server.conversation import as_mapping, is_small
from vllmlite.server.errors import ApiError, renamed
from vllmlite.server.log_once import Notes
from vllmlite.server.metrics import Metrics
from vllmlite.server.openai.chat_protocol import ChatPrompt
from vllmlite.server.protocol.base import Request, Usage
from vllmlite.server.protocol.sampling import token_limit
from vllmlite.server.responses.store import ResponseStore
from vllmlite.server.sse import unless_gone
from vllmlite.tokenizers.truncation import Truncation

logger = logging.getLogger(__name__)

INLINE_CHARACTERS = 4096
"""Up to this many characters or ids are processed on the event loop; more in a thread."""


MAX_REQUEST_ID = 256
"""Maximum characters of a request's name."""

COMPILE_SECONDS = 60
"""Maximum time to wait for a grammar, including those queued before it."""


class Generation:
    """The engine's requests that answer one HTTP request, one per prompt; must be closed when the answer ends."""

    def __init__(
        self,
        service: Service,
        kind: str,
        request_id: str | None,
        prompts: Sequence[dict[str, Any]],
        params: SamplingParams | PoolingParams,
    ) -> None:
        """``kind`` is the prefix of the answer's id."""
        self.id = kind + (request_id or uuid.uuid4().hex)
        self.created = int(time.time())
        self.prompts = prompts
        self.params = params
        self.n = params.n if isinstance(params, SamplingParams) else 1
        """Completions per prompt."""
        self._service = service
        self._stream: OutputStream | None = None
        self._index = {uuid.uuid4().hex: index for index in range(len(prompts))}
        self._prompt_tokens = [0] * len(prompts)
        self._cached_tokens = [0] * len(prompts)
        self._completion_tokens = 0
        self._lengths = [[0] * self.n for _ in prompts]
        """Tokens of each completion, by prompt."""
        self._running = [self.n] * len(prompts)
        """Number of unfinished completions of each prompt."""
        self._unfinished = len(prompts) * self.n

    async def start(self, priority: int, arrival_time: float) -> None:
        """Submit the prompts to the engine. Raises ApiError if the queue is full, ParameterError if one cannot run."""
        self._service.admit(self._unfinished)
        try:
            self._stream = await self._service.engine.submit(
                [
                    NewRequest(request_id, self.prompts[index], self.params, priority, arrival_time)
                    for request_id, index in self._index.items()
                ]
            )
        except BaseException:
            self._service.release(self._unfinished)
            self._unfinished = 0
            raise
        if isinstance(self.params, SamplingParams):
            self._service.metrics.requested(self.params, len(self.prompts))

    async def take(self) -> list[tuple[int, RequestOutput]]:
        """Return new outputs as (index of the prompt, output), waiting for some; empty once all have finished."""
        assert self._stream is not None
        found = []
        ended = 0
        for output in await self._stream.take():
            index = self._index[output.request_id]
            self._prompt_tokens[index] = len(output.prompt_token_ids)
            self._cached_tokens[index] = output.num_cached_tokens
            for completion in output.outputs:
                self._completion_tokens += len(completion.token_ids)
                self._lengths[index][completion.index] += len(completion.token_ids)
                if completion.finish_reason is not None:
                    ended += 1
                    self._running[index] -= 1
                    if not self._running[index]:
                        self._service.metrics.completed(max(self._lengths[index]))
            ended += output.embedding is not None
            found.append((index, output))
        self._service.release(ended)
        self._unfinished -= ended
        return found

    async def finished(self, receive: Receive) -> list[RequestOutput]:
        """Return the final output of each prompt, in order. Raises ClientGone, and aborts, if the client
        disconnects."""

        async def gather() -> list[RequestOutput]:
            last: dict[int, RequestOutput] = {}
            while batch := await self.take():
                last.update(batch)
            return [last[index] for index in range(len(self.prompts))]

        try:
            return await unless_gone(receive, gather())
        finally:
            self.close()

    def usage(self, without: int = 0) -> Usage:
        """Return the token counts so far, not counting the last ``without`` completion tokens."""
        prompt, completion = sum(self._prompt_tokens), self._completion_tokens - without
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    def close(self) -> None:
        """Abort unfinished requests."""
        if self._stream is not None:
            self._stream.close()
        if self._unfinished:
            self._service.release(self._unfinished)
            self._service.metrics.aborted(self._unfinished)
            self._unfinished = 0


class Service:
    """State and functions shared by the endpoints."""

    def __init__(
        self, engine: AsyncLLM, config: ServerConfig, model_names: Sequence[str], metrics: Metrics
    ) -> None:
        """Serve ``engine`` under ``model_names``; answers have the first one."""
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self.model_names = tuple(model_names)
        self.model = self.model_names[0]
        self.created = int(time.time())
        self.draining = False
        self.notes = Notes()
        self.num_answering = 0
        """Number of HTTP requests being answered by endpoints that compute: vLLM's server load."""
        inner = engine.llm_engine
        self.tokenizer = inner.get_tokenizer()
        if config.chat_template is not None:
            self.tokenizer.find_chat_template(config.chat_template)  # fail now if it is invalid
        self.max_model_len = inner.max_model_len
        self.responses = ResponseStore(config.max_stored_responses)
        self.default_params = inner.default_sampling_params
        self.knows_reasoning = inner.engine_core.bounds.reasoning is not None
        """Whether requests may limit their reasoning."""
        self._capacity = inner.config.max_num_seqs + config.max_queue
        self._max_num_seqs = inner.config.max_num_seqs
        self._unfinished = 0
        self._truncating = ThreadPoolExecutor(1, "vllmlite-long-texts")
        """Tokenises texts that are long before truncation, one at a time, so that they only delay one another."""
        self._compiling = ThreadPoolExecutor(PARALLEL, "vllmlite-grammars")
        """Compiles a few grammars at a time, so that slow ones only delay other grammars."""

    def check(self, body: Request, connection: HTTPConnection) -> None:
        """Check what all requests have in common: the model's name, and fields without effect.

        llama.cpp's endpoints accept any model name, as llama-server does. Raises :class:`ApiError`, or
        :class:`ParameterError` if ``strict_requests`` refuses a field."""
        path = path_of(connection.scope)
        if api_of(path) is not Api.LLAMACPP:
            self.check_model(getattr(body, "model", None))
        for field in body.unknown_fields():
            if self.notes.are_full and not self.config.strict_requests:
                return
            if self.config.strict_requests:
                reason = field.reason + did_you_mean(field.place, field.names)
                raise ParameterError(field.place, field.value, reason)
            self.notes.once(
                f"{path} {field.place}",
                lambda field=field: (  # type: ignore[misc]
                    f"{path}: {field.place!r} is ignored: {field.reason}{did_you_mean(field.place, field.names)}"
                ),
            )

    def check_model(self, name: str | None) -> None:
        """Raise a 404 ApiError unless ``name`` is served; an empty name means the served model."""
        if name and name not in self.model_names:
            served = ", ".join(self.model_names)
            message = str(ParameterError("model", name, f"is not served; served: {served}"))
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")

    def chat_limit(self, wanted: int | None) -> int | None:
        """Return the maximum tokens of a chat answer: ``wanted``, or else the checkpoint's limit; None: up to the
        context."""
        limit = self.default_params.max_tokens
        if wanted is not None:
            return token_limit(wanted)
        return None if limit == SamplingParams().max_tokens else limit

    def admit(self, count: int) -> None:
        """Admit ``count`` sequences. Raises ApiError if the queue is full or the server is shutting down."""
        if self.draining:
            self.metrics.rejected("shutting_down")
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", headers={"retry-after": "5"}
            )
        if count > self._capacity:
            raise ParameterError("n", count, f"prompts times n must be at most {self._capacity}")
        waiting = self._unfinished - self._max_num_seqs
        if self._unfinished + count > self._capacity:
            self.metrics.rejected("queue_full")
            wait = self.metrics.mean_latency() * (waiting + count) / self._max_num_seqs
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"the queue is full: {max(waiting, 0)} of at most {self.config.max_queue} sequences are waiting",
                code="queue_full",
                headers={"retry-after": str(min(max(math.ceil(wait), 1), 60))},
            )
        self._unfinished += count

    def release(self, count: int) -> None:
        """Count ``count`` sequences as ended."""
        self._unfinished -= count

    async def generate(
        self,
        kind: str,
        prompts: Sequence[dict[str, Any]],
        params: SamplingParams | PoolingParams,
        *,
        arrival_time: float,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Generation:
        """Start generating from, or embedding, the encoded ``prompts`` (see :meth:`encode`)."""
        for prompt in prompts:
            if cache_salt is not None:
                prompt["cache_salt"] = cache_salt
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            await self._compile(params.structured_outputs)
        generation = Generation(self, kind, request_id, prompts, params)
        if self.config.enable_log_requests:
            for prompt in prompts:
                shown = (prompt.get("prompt") or str(prompt["prompt_token_ids"]))[: self.config.max_log_len]
                logger.info(
                    "%s: %d tokens, %r, prompt %r",
                    generation.id,
                    len(prompt["prompt_token_ids"]),
                    params,
                    shown,
                )
        await generation.start(priority, arrival_time)
        return generation

    async def _compile(self, structure: StructuredOutputsParams) -> None:
        """Compile the grammar in a thread before the request is submitted."""
        compiling = asyncio.get_running_loop().run_in_executor(
            self._compiling, self.engine.llm_engine.grammars.compile, structure
        )
        try:
            await asyncio.wait_for(compiling, COMPILE_SECONDS)
        except TimeoutError:
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "too many grammars are being compiled",
                headers={"retry-after": "10"},
            ) from None

    def check_num_prompts(self, count: int) -> None:
        """Raise :class:`ParameterError` if a request has too many prompts."""
        if count > self.config.max_prompts:
            raise ParameterError("prompt", count, f"must be at most {self.config.max_prompts} prompts")

    async def encode_all(
        self, prompts: Any, add_special_tokens: bool = True, truncation: Truncation | None = None
    ) -> list[dict[str, Any]]:
        """Encode every prompt of ``prompts``: a text, ids, or a list of either. Raises :class:`ParameterError`."""
        if isinstance(prompts, str) or (isinstance(prompts, list) and prompts and type(prompts[0]) is int):
            prompts = [prompts]
        if not isinstance(prompts, list) or not prompts:
            raise ParameterError("prompt", prompts, "must be text, token ids, or a list of either")
        self.check_num_prompts(len(prompts))
        encoded = []
        for index, prompt in enumerate(prompts):
            if index:
                await asyncio.sleep(0)  # let other tasks run
            encoded.append(await self.encode(prompt, add_special_tokens, truncation))
        return encoded

    async def encode(
        self, prompt: Any, add_special_tokens: bool = True, truncation: Truncation | None = None
    ) -> dict[str, Any]:
        """Encode a prompt, applying ``truncation``; without it, a text that cannot fit is refused before
        tokenisation."""
        if isinstance(prompt, str):
            with renamed(text="prompt"):
                ids = await self.tokenised(
                    len(prompt), self.tokenizer.encode, prompt, add_special_tokens, truncation,
                    may_be_too_long=truncation is not None,
                )  # fmt: skip
            return {"prompt": prompt, "prompt_token_ids": ids}
        if not isinstance(prompt, list):
            raise ParameterError("prompt", prompt, "must be text or token ids")
        if truncation is None:
            self.check_num_ids(len(prompt))
        encoded = self.engine.llm_engine.encode({"prompt_token_ids": prompt})
        if truncation is not None:
            encoded["prompt_token_ids"] = truncation.of(encoded["prompt_token_ids"])
        return encoded

    def check_num_ids(self, count: int) -> None:
        """Raise :class:`ParameterError` if a prompt of ``count`` ids cannot fit."""
        if count > self.max_model_len:
            raise ContextLengthError("prompt", count, self.max_model_len - 1, self.max_model_len)

    async def tokenised(
        self, characters: int, encode: Callable[..., list[int]], *args: Any, may_be_too_long: bool = False
    ) -> list[int]:
        """Return ``encode(*args)`` for a text of ``characters``, run in a thread if it is long.

        Raises :class:`ParameterError` if the text cannot fit, unless it ``may_be_too_long``."""
        least = -(-characters // self.tokenizer.max_token_length)
        if least > self.max_model_len and not may_be_too_long:
            raise ContextLengthError("prompt", least, self.max_model_len - 1, self.max_model_len, exact=False)
        if characters <= INLINE_CHARACTERS:
            return encode(*args)
        where = self._truncating if least > self.max_model_len else None
        return await asyncio.get_running_loop().run_in_executor(where, encode, *args)

    async def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, special tokens included. Raises :class:`ParameterError` for invalid ids."""
        self.tokenizer.check_ids(ids)
        if len(ids) <= INLINE_CHARACTERS:
            return self.tokenizer.decode(ids, skip_special_tokens=False)
        return await asyncio.to_thread(self.tokenizer.decode, ids, skip_special_tokens=False)

    async def encode_chat(
        self, body: ChatPrompt, offer_tools: bool = True, truncation: Truncation | None = None
    ) -> dict[str, Any]:
        """Render and encode a conversation; ``offer_tools``: pass the tools to the chat template."""
        variables = {**self.config.default_chat_template_kwargs, **body.template_variables()}
        tools = body.functions() or None if offer_tools else None
        wanted = self._template_wanted(body.chat_template)
        template = self.tokenizer.find_chat_template(wanted, with_tools=bool(tools))
        if body.documents and "documents" not in template.variables:
            raise ParameterError(
                "documents",
                len(body.documents),
                "the chat template does not render documents: put them into the messages",
            )
        thinking = body.thinking_options()
        if thinking and not any(name in template.source for name in thinking):
            self.notes.once(
                "thinking",
                lambda: (
                    f"the chat template uses none of {', '.join(thinking)}: these fields of requests are ignored"
                ),
            )
        options = PromptOptions(
            body.add_generation_prompt, body.continue_final_message, self.config.chat_template_content_format
        )
        messages = [as_mapping(message) for message in body.messages]
        render = partial(template.prompt, messages, options, tools, variables)
        if is_small([messages, tools, variables], INLINE_CHARACTERS):
            text = render()
        else:
            text = await asyncio.get_running_loop().run_in_executor(None, render)
        return await self.encode(text, body.add_special_tokens, truncation)

    def chat_template(self) -> str:
        """Return the source of the chat template for conversations without tools; empty if there is none."""
        wanted = self.config.chat_template
        if wanted is None:
            return self.tokenizer.chat_template or ""
        return self.tokenizer.find_chat_template(wanted).source

    def _template_wanted(self, requested: str | None) -> str | None:
        """Return the chat template that a request selects, or the server's; None means the model's own.

        A request may name a known template; its own source needs ``trust_request_chat_template``. Raises
        :class:`ParameterError`."""
        known = requested in self.tokenizer.chat_templates or requested in BUILT_IN
        if requested is not None and not known and not self.config.trust_request_chat_template:
            raise ParameterError(
                "chat_template", requested,
                "is not the name of a template; its own source in a request needs --trust-request-chat-template",
            )  # fmt: skip
        return self.config.chat_template if requested is None else requested


def request_id(given: str | None, request: HTTPConnection) -> str | None:
    """Return a request's name: ``request_id`` of its body, or its X-Request-Id header."""
    return given or request.headers.get("x-request-id", "")[:MAX_REQUEST_ID] or None
