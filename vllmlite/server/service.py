"""Service: one engine with its model names, and the tokenisation and chat templates of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.requests import HTTPConnection

from vllmlite.async_llm import AsyncLLM
from vllmlite.chat.builtin import BUILT_IN
from vllmlite.chat.template import PromptOptions
from vllmlite.config.options import did_you_mean
from vllmlite.errors import ContextLengthError, ParameterError
from vllmlite.guided.compiler import PARALLEL
from vllmlite.hub import BUILT_IN_NAME
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import SamplingParams, StructuredOutputsParams
from vllmlite.server.adapters import ServedAdapters
from vllmlite.server.admission import Admission
from vllmlite.server.apis import Api, api_of, path_of
from vllmlite.server.config import ServerConfig
from vllmlite.server.conversation import as_mapping, is_small
from vllmlite.server.errors import ApiError, renamed
from vllmlite.server.generation import Generation, ServedModel
from vllmlite.server.log_once import Notes
from vllmlite.server.metrics import Metrics
from vllmlite.server.openai.chat_protocol import ChatPrompt
from vllmlite.server.protocol.base import Request
from vllmlite.server.protocol.sampling import token_limit
from vllmlite.server.responses.store import ResponseStore
from vllmlite.tokenizers.truncation import Truncation

logger = logging.getLogger(__name__)

INLINE_CHARACTERS = 4096
"""Up to this many characters or ids are processed on the event loop; more in a thread."""


MAX_REQUEST_ID = 256
"""Maximum characters of a request's name."""

COMPILE_SECONDS = 60
"""Maximum time to wait for a grammar, including those queued before it."""


def start_service(engine: AsyncLLM, config: ServerConfig) -> Service:
    """Return the service of ``engine``, with metrics of its steps."""
    inner = engine.llm_engine
    names = config.served_model_name or (inner.config.model or BUILT_IN_NAME,)
    metrics = Metrics(names[0], inner.max_model_len, inner.stats)
    inner.observer = metrics.observe_step
    return Service(engine, config, names, metrics)


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
        self.notes = Notes()
        self.num_answering = 0
        """Number of HTTP requests being answered by endpoints that compute: vLLM's server load."""
        inner = engine.llm_engine
        self.tokenizer = inner.get_tokenizer()
        if config.chat_template is not None:
            self.tokenizer.find_chat_template(config.chat_template)  # fail now if it is invalid
        self.max_model_len = inner.max_model_len
        self.responses = ResponseStore(config.max_stored_responses)
        self.slots: dict[int, tuple[int, ...]] = {}
        """``id_slot`` of llama.cpp → the token ids of its last text, if prompts may be saved."""
        self.adapters = ServedAdapters(engine, metrics, self.model_names, config.lora_root)
        self.default_params = inner.default_sampling_params
        self.knows_reasoning = inner.engine_core.bounds.reasoning is not None
        """Whether requests may limit their reasoning."""
        self.admission = Admission(inner.config.max_num_seqs, config.max_queue, metrics)
        self._truncating = ThreadPoolExecutor(1, "vllmlite-long-texts")
        """Tokenises texts that are long before truncation, one at a time, so that they only delay one another."""
        self._compiling = ThreadPoolExecutor(PARALLEL, "vllmlite-grammars")
        """Compiles a few grammars at a time, so that slow ones only delay other grammars."""

    def check(self, body: Request, connection: HTTPConnection) -> ServedModel:
        """Check what all requests have in common: the model's name, and fields without effect. Returns the model.

        llama.cpp's endpoints accept any model name, as llama-server does, but not on a server of adapters, where the
        name of one that is not loaded would stand for the base model. Raises :class:`ApiError`, or
        :class:`ParameterError` if ``strict_requests`` refuses a field."""
        path, name = path_of(connection.scope), getattr(body, "model", None)
        if api_of(path) is not Api.LLAMACPP or self.engine.llm_engine.config.enable_lora:
            self.check_model(name)
        self._check_fields(body, path)
        adapter = self.adapters.all().get(name or "")
        return ServedModel(self.model) if adapter is None else ServedModel(str(name), adapter)

    def _check_fields(self, body: Request, path: str) -> None:
        """Log fields without effect, once each, or refuse them with ``strict_requests``."""
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
        if name and name not in self.model_names and name not in self.adapters.all():
            served = ", ".join([*self.model_names, *self.adapters.all()])
            message = str(ParameterError("model", name, f"is not served; served: {served}"))
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")

    def chat_limit(self, wanted: int | None) -> int | None:
        """Return the maximum tokens of a chat answer: ``wanted``, or else the checkpoint's limit; None: up to the
        context."""
        limit = self.default_params.max_tokens
        if wanted is not None:
            return token_limit(wanted)
        return None if limit == SamplingParams().max_tokens else limit

    async def generate(
        self,
        kind: str,
        prompts: Sequence[dict[str, Any]],
        params: SamplingParams | PoolingParams,
        *,
        arrival_time: float,
        model: ServedModel,
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
        generation = Generation(
            self.engine, self.admission, self.metrics, kind, request_id, prompts, params, model
        )
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
