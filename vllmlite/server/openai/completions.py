"""``POST /v1/completions``, and vLLM's plain ``POST /generate``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, RequestOutput
from vllmlite.sampling_params import SamplingParams
from vllmlite.server.generation import Generation
from vllmlite.server.openai import logprobs
from vllmlite.server.openai.completions_protocol import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    Generated,
    GenerateRequest,
)
from vllmlite.server.openapi import documented
from vllmlite.server.protocol.base import Usage
from vllmlite.server.protocol.sampling import stream_usage, token_limit
from vllmlite.server.service import Service, request_id
from vllmlite.server.sse import DONE, JSON, LINES, Chunks, Stream, error_line, event, to_json

router = APIRouter()


@router.post("/v1/completions", responses=documented(Completion, streams=True))
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete one or several prompts."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    scored = bool(body.echo) and body.max_tokens == 0
    changes: dict[str, Any] = {"logprobs": body.logprobs}
    if body.max_tokens is not None:
        changes["max_tokens"] = 1 if scored else token_limit(body.max_tokens)
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        if body.stream:
            raise ParameterError("echo", True, "with logprobs cannot be combined with stream=true")
        changes["prompt_logprobs"] = body.logprobs
    params = body.sampling_params(service.default_params, **changes)
    truncation = service.engine.llm_engine.truncation(params)
    prompts = await service.encode_all(body.prompt, body.add_special_tokens, truncation)
    generation = await service.generate(
        "cmpl-", prompts, params, request_id=request_id(body.request_id, request), priority=body.priority,
        cache_salt=body.cache_salt, arrival_time=arrival, model=model,
    )  # fmt: skip
    answer = _Answer(service, body, generation, scored)
    if body.stream:
        return Stream(answer.events(), generation.close)
    return JSON(answer.complete(await generation.finished(request.receive)))


class _Answer:
    """Formats the choices of one request; completion c of prompt p has index p × n + c."""

    def __init__(
        self, service: Service, body: CompletionRequest, generation: Generation, scored: bool
    ) -> None:
        self._service = service
        self._body = body
        self._generation = generation
        self._scored = scored
        self._ids = service.config.return_tokens_as_token_ids or bool(body.return_tokens_as_token_ids)
        self._echoed: dict[int, int] = {}
        """Index of each choice that has begun → number of prompt characters echoed before its completion."""

    def complete(self, outputs: list[RequestOutput]) -> Completion:
        choices = [
            self._choice(prompt, output, completion)
            for prompt, output in enumerate(outputs)
            for completion in output.outputs
        ]
        nulls: dict[str, Any] = dict.fromkeys(("token_ids", "prompt_token_ids", "prompt_logprobs"))
        return {
            **self._frame([{**nulls, **choice} for choice in choices]),  # type: ignore[typeddict-item]
            "usage": self._usage(),
            "service_tier": None,
            "system_fingerprint": None,
            "kv_transfer_params": None,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        forced = self._service.config.enable_force_include_usage
        usage, continuous = stream_usage(self._body.stream_options, forced)
        frame = self._frame([])
        chunks = Chunks({**frame, "usage": None} if usage and not continuous else frame)
        while batch := await self._generation.take():
            pieces = []
            for prompt, output in batch:
                for completion in output.outputs:
                    if not (
                        completion.text
                        or completion.finish_reason
                        or completion.logprobs
                        or self._body.return_token_ids
                    ):
                        continue  # an incomplete character or a possible stop string
                    choice = self._choice(prompt, output, completion)
                    if continuous:
                        chunk: Completion = {**frame, "choices": [choice], "usage": self._usage()}
                        pieces.append(event(chunk))
                    else:
                        pieces.append(chunks.event(choice))
            if pieces:
                yield b"".join(pieces)
        last = event({**frame, "usage": self._usage()}) if usage else b""
        yield last + DONE

    def _usage(self) -> Usage:
        """Return the token counts so far; the token generated while scoring a prompt does not count."""
        usage = self._generation.usage()
        if self._scored:
            usage["completion_tokens"], usage["total_tokens"] = 0, usage["prompt_tokens"]
        return usage

    def _frame(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self._generation.id,
            "object": "text_completion",
            "created": self._generation.created,
            "model": self._generation.model,
            "choices": choices,
        }

    def _choice(self, prompt: int, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        body, index = self._body, prompt * self._generation.n + completion.index
        first, tokenizer = index not in self._echoed, self._service.tokenizer
        text, token_ids, entries = completion.text, completion.token_ids, completion.logprobs
        offsets = completion.text_offsets or []
        finish_reason, stop_reason = completion.finish_reason, completion.stop_reason
        if self._scored:
            text, token_ids, entries, offsets = "", [], entries and [], []
            finish_reason, stop_reason = finish_reason and "length", None
        generated = token_ids
        if body.echo and first:
            before = output.prompt
            if before is None or body.truncate_prompt_tokens is not None:
                before = tokenizer.decode(output.prompt_token_ids)
            text = before + text
            self._echoed[index] = len(before)
        echoed = self._echoed.setdefault(index, 0)
        if offsets:
            offsets = [echoed + offset for offset in offsets]
        if body.echo and first and entries is not None:
            entries = [*(output.prompt_logprobs or [None] * len(output.prompt_token_ids)), *entries]  # type: ignore[list-item]
            offsets = [*logprobs.prompt_offsets(tokenizer, output.prompt_token_ids, before or ""), *offsets]
            token_ids = [*output.prompt_token_ids, *token_ids]
        choice: CompletionChoice = {
            "index": index,
            "text": text,
            "logprobs": None
            if entries is None or body.logprobs is None
            else logprobs.for_completion(
                entries, token_ids, offsets, body.logprobs, self._ids, tokenizer, body.logprob_token_ids or ()
            ),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = generated
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.for_prompt(output.prompt_logprobs)
        return choice


@router.post("/generate", responses=documented(Generated, lines=True))
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Complete one prompt, repeating it in the answer. A stream is JSON lines, each with all text so far."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    changes: dict[str, Any] = {"logprobs": body.logprobs}
    if body.max_tokens is not None:
        changes["max_tokens"] = token_limit(body.max_tokens)
    params = body.sampling_params(service.default_params, **changes)
    prompts = await service.encode_all(body.prompt, truncation=service.engine.llm_engine.truncation(params))
    if len(prompts) > 1:
        raise ParameterError("prompt", len(prompts), "must be one prompt")
    generation = await service.generate(
        "gen-", prompts, params, request_id=request_id(body.request_id, request), priority=body.priority,
        cache_salt=body.cache_salt, arrival_time=arrival, model=model,
    )  # fmt: skip
    if body.stream:
        return Stream(_lines(service, generation, params), generation.close, LINES, error_line)
    (output,) = await generation.finished(request.receive)
    before = _prompt_text(service, output)
    return JSON({"text": [before + completion.text for completion in output.outputs]})


async def _lines(
    service: Service, generation: Generation, params: SamplingParams
) -> AsyncGenerator[bytes, None]:
    texts: list[str] = []
    while batch := await generation.take():
        for _, output in batch:
            texts = texts or [_prompt_text(service, output)] * params.n
            for completion in output.outputs:
                texts[completion.index] += completion.text
        yield to_json({"text": texts}) + b"\n"


def _prompt_text(service: Service, output: RequestOutput) -> str:
    return service.tokenizer.decode(output.prompt_token_ids) if output.prompt is None else output.prompt
