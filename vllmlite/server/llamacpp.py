"""llama.cpp's own endpoints: ``POST /completion``, ``POST /infill`` and ``GET /props``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite import __version__
from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllmlite.server import logprobs
from vllmlite.server.documented import documented
from vllmlite.server.infill import infill_ids
from vllmlite.server.protocol.llamacpp import (
    InfillRequest,
    LlamaAnswer,
    LlamaCompletionRequest,
    LlamaProps,
    LlamaRequest,
    LlamaTimings,
)
from vllmlite.server.service import Generation, Service
from vllmlite.server.sse import JSON, Stream, event

router = APIRouter()

SAMPLING = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "ignore_eos": "ignore_eos", "stop": "stop",
}  # fmt: skip
"""llama.cpp's names of sampling parameters, and vLLM's."""
STOP_TYPES = {"length": "limit", "stop": "eos"}
NO_BIAS = -100.0


@router.post("/completion", responses=documented(LlamaAnswer, streams=True))
@router.post("/completions", responses=documented(LlamaAnswer, streams=True), include_in_schema=False)
async def complete(body: LlamaCompletionRequest, request: Request) -> Response:
    """Complete one prompt."""
    service: Service = request.app.state.service
    prompts = await service.encode_all(body.prompt)
    if len(prompts) > 1:
        raise ParameterError("prompt", len(prompts), "must be one prompt")
    return await _answer(service, body, prompts[0], request)


@router.post("/infill", responses=documented(LlamaAnswer, streams=True))
async def infill(body: InfillRequest, request: Request) -> Response:
    """Fill in what is between two texts."""
    service: Service = request.app.state.service
    ids = infill_ids(service.tokenizer, body.input_prefix, body.input_suffix, body.prompt, body.input_extra)
    return await _answer(service, body, await service.encode(ids), request)


@router.get("/props", responses=documented(LlamaProps))
async def props(request: Request) -> Response:
    """What the server is and how it samples where a request says nothing."""
    service: Service = request.app.state.service
    config = service.engine.llm_engine.config
    answer: LlamaProps = {
        "default_generation_settings": {
            "n_ctx": service.max_model_len,
            "params": _settings(service.default_params.clone(max_tokens=None)),
        },
        "total_slots": config.max_num_seqs,
        "model_alias": service.model,
        "model_path": config.model or service.model,
        "modalities": {"vision": False, "audio": False},
        "chat_template": service.config.chat_template or service.tokenizer.chat_template or "",
        "bos_token": service.tokenizer.special_text("bos_token"),
        "eos_token": service.tokenizer.special_text("eos_token"),
        "build_info": f"vllmlite {__version__}",
    }
    return JSON(answer)


async def _answer(service: Service, body: LlamaRequest, prompt: dict[str, Any], request: Request) -> Response:
    arrival = time.monotonic()
    service.check_model(body.model)
    params = _params(body, service.default_params)
    generation = await service.generate("cmpl", [prompt], params, arrival_time=arrival)
    answer = _Answer(service, body, params, generation)
    if body.stream:
        return Stream(answer.events(), generation.close)
    (output,) = await generation.finished(request.receive)
    return JSON(answer.piece(output, output.outputs[0]))


def _params(body: LlamaRequest, default: SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {
        theirs: getattr(body, ours) for ours, theirs in SAMPLING.items() if getattr(body, ours) is not None
    }
    if body.seed is not None and body.seed != -1:
        given["seed"] = body.seed
    if body.logit_bias is not None:
        given["logit_bias"] = _bias(body.logit_bias)
    if body.n_probs:
        given["logprobs"] = body.n_probs
    if body.grammar and body.json_schema is not None:
        raise ParameterError("grammar", body.grammar, "does not go with json_schema")
    if body.grammar:
        given["structured_outputs"] = StructuredOutputsParams(grammar=body.grammar)
    if body.json_schema is not None:
        given["structured_outputs"] = StructuredOutputsParams(json=body.json_schema)
    limit = None if body.n_predict in (None, -1) else body.n_predict
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return default.clone(**given, max_tokens=limit, output_kind=kind)


def _bias(given: Any) -> dict[int, float]:
    """Biases as a mapping or as pairs of an id and a number, or false to ban. Raises :class:`ParameterError`."""
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise ParameterError("logit_bias", given, "must be pairs of a token id and a number")
    found = {}
    for token, bias in pairs:
        try:
            token_id = token if type(token) is int else int(token if isinstance(given, dict) else "")
        except (TypeError, ValueError):
            raise ParameterError("logit_bias", token, "must be a token id") from None
        if bias is not False and type(bias) not in (int, float):
            raise ParameterError("logit_bias", bias, "must be a number, or false to ban the token")
        found[token_id] = NO_BIAS if bias is False else float(bias)
    return found


def _settings(params: SamplingParams) -> dict[str, Any]:
    settings = {ours: getattr(params, theirs) for ours, theirs in SAMPLING.items()}
    limit = -1 if params.max_tokens is None else params.max_tokens
    seed = -1 if params.seed is None else params.seed
    return {**settings, "stop": params.stop or [], "n_predict": limit, "seed": seed}


class _Answer:
    """One answer, whole or as it comes."""

    def __init__(
        self, service: Service, body: LlamaRequest, params: SamplingParams, generation: Generation
    ) -> None:
        self._service = service
        self._body = body
        self._params = params
        self._generation = generation
        self._has_line = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Pieces; the last has no text of its own unless the end brought some."""
        async for batch in self._generation.outputs():
            pieces = [
                event(self.piece(output, completion))
                for _, output in batch
                for completion in output.outputs
                if completion.text
                or completion.finish_reason
                or completion.logprobs
                or self._body.return_tokens
            ]
            if pieces:
                yield b"".join(pieces)

    def piece(self, output: RequestOutput, completion: CompletionOutput) -> LlamaAnswer:
        """What is new; with the end, what there is to say of the whole."""
        ended = completion.finish_reason is not None
        self._has_line = self._has_line or "\n" in completion.text
        answer: LlamaAnswer = {
            "index": 0,
            "content": completion.text,
            "tokens": completion.token_ids if self._body.return_tokens else [],
            "stop": ended,
            "id_slot": -1,
        }
        if completion.logprobs:
            content = logprobs.for_chat(completion.logprobs, completion.token_ids, self._body.n_probs, False)[
                "content"
            ]
            answer["completion_probabilities"] = [
                {"id": token_id, **entry}
                for token_id, entry in zip(completion.token_ids, content, strict=True)
            ]
        if self._body.timings_per_token or ended:
            answer["timings"] = self._timings(output.metrics)
        if ended:
            usage, word = self._generation.usage(), completion.stop_reason
            answer["model"] = self._service.model
            answer["prompt"] = (
                self._service.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
                if output.prompt is None
                else output.prompt
            )
            answer["tokens_predicted"] = usage["completion_tokens"]
            answer["tokens_evaluated"] = usage["prompt_tokens"]
            answer["tokens_cached"] = usage["prompt_tokens_details"]["cached_tokens"]
            answer["truncated"] = False
            answer["has_new_line"] = self._has_line
            answer["stopping_word"] = word if isinstance(word, str) else ""
            kind = "word" if isinstance(word, str) else STOP_TYPES.get(completion.finish_reason or "", "none")
            answer["stop_type"] = kind  # type: ignore[typeddict-item]
            answer["generation_settings"] = _settings(self._params)
        return answer

    def _timings(self, metrics: RequestMetrics | None) -> LlamaTimings:
        usage = self._generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        prompt, predicted = usage["prompt_tokens"] - cached, usage["completion_tokens"]
        prompt_ms = predicted_ms = 0.0
        if metrics is not None and metrics.first_token_time and metrics.last_token_time:
            begun = metrics.first_scheduled_time or metrics.arrival_time
            prompt_ms = (metrics.first_token_time - begun) * 1000
            predicted_ms = (metrics.last_token_time - metrics.first_token_time) * 1000
        return {
            "cache_n": cached,
            "prompt_n": prompt,
            "prompt_ms": prompt_ms,
            "prompt_per_second": prompt / prompt_ms * 1000 if prompt_ms else 0.0,
            "predicted_n": predicted,
            "predicted_ms": predicted_ms,
            "predicted_per_second": predicted / predicted_ms * 1000 if predicted_ms else 0.0,
        }
