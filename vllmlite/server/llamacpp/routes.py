"""llama.cpp's own endpoints: ``/completion``, ``/infill``, ``/embedding``, ``/apply-template`` and ``/props``."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllmlite import __version__
from vllmlite.chat.sources import TOOL_USE
from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import (
    MAX_LOGIT_BIAS,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from vllmlite.server.errors import renamed
from vllmlite.server.generation import Generation
from vllmlite.server.llamacpp.infill import infill_ids
from vllmlite.server.llamacpp.line_limits import LineLimits
from vllmlite.server.llamacpp.prompts import encode_prompts
from vllmlite.server.llamacpp.protocol import (
    AppliedTemplate,
    InfillRequest,
    LlamaAdapter,
    LlamaAnswer,
    LlamaCompletionRequest,
    LlamaEmbedding,
    LlamaEmbeddingRequest,
    LlamaError,
    LlamaProps,
    LlamaRequest,
    LlamaTimings,
)
from vllmlite.server.llamacpp.samplers import turned_off, used
from vllmlite.server.llamacpp.slots import remember
from vllmlite.server.openai import logprobs
from vllmlite.server.openai.chat_protocol import ChatPrompt
from vllmlite.server.openapi import documented
from vllmlite.server.service import INLINE_CHARACTERS, Service, request_id
from vllmlite.server.sse import JSON, Stream, event, llamacpp_error_event, unless_gone
from vllmlite.tokenizers.tokenizer import Tokenizer

router = APIRouter()

SAMPLING = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "ignore_eos": "ignore_eos", "stop": "stop",
}  # fmt: skip
"""Names of sampling parameters: llama.cpp's to vLLM's."""
STOP_TYPES = {"length": "limit", "stop": "eos"}
NO_BIAS = -100.0
RANDOM_SEEDS = (-1, 2**32 - 1)
"""Seeds that ask for a random seed."""
_MISSING = object()


COMPLETED = documented(LlamaAnswer | list[LlamaAnswer], streams=True, error=LlamaError)


@router.post("/completion", responses=COMPLETED)
@router.post("/completions", responses=COMPLETED, include_in_schema=False)
async def complete(body: LlamaCompletionRequest, request: Request) -> Response:
    """Complete a prompt; a list of prompts is answered with a list."""
    service: Service = request.app.state.service
    return await _answer(service, body, await encode_prompts(service, body.prompt), request)


@router.post("/infill", responses=documented(LlamaAnswer, streams=True, error=LlamaError))
async def infill(body: InfillRequest, request: Request) -> Response:
    """Generate the text between two texts."""
    service: Service = request.app.state.service
    texts = body.input_prefix, body.input_suffix, body.prompt
    length = sum(map(len, texts)) + sum(len(file.filename) + len(file.text) for file in body.input_extra)
    ids = await service.tokenised(length, infill_ids, service.tokenizer, *texts, body.input_extra)
    return await _answer(service, body, [await service.encode(ids)], request)


@router.post("/embedding", responses=documented(list[LlamaEmbedding], error=LlamaError))
async def embed(body: LlamaEmbeddingRequest, request: Request) -> Response:
    """Return an embedding of each text."""
    arrival = time.monotonic()
    service: Service = request.app.state.service
    model = service.check(body, request)
    with renamed(prompt="content", prompt_token_ids="content"):
        prompts = await encode_prompts(service, body.content)
        generation = await service.generate(
            "embd-", prompts, PoolingParams(), arrival_time=arrival, model=model
        )
    outputs = await generation.finished(request.receive)
    answer: list[LlamaEmbedding] = [
        {"index": index, "embedding": [output.embedding or []]} for index, output in enumerate(outputs)
    ]
    return JSON(answer)


@router.post("/apply-template", responses=documented(AppliedTemplate, error=LlamaError))
async def apply_template(body: ChatPrompt, request: Request) -> Response:
    """Return the prompt of a conversation."""
    service: Service = request.app.state.service
    service.check(body, request)
    encoded = await service.encode_chat(body)
    answer: AppliedTemplate = {"prompt": encoded["prompt"]}
    return JSON(answer)


@router.get("/props", responses=documented(LlamaProps, error=LlamaError))
async def props(request: Request) -> Response:
    """Describe the server and its default sampling parameters."""
    service: Service = request.app.state.service
    config = service.engine.llm_engine.config
    answer: LlamaProps = {
        "default_generation_settings": {
            "n_ctx": service.max_model_len,
            "params": _settings(service.default_params.clone(max_tokens=None), None),
        },
        "total_slots": config.max_num_seqs,
        "model_alias": service.model,
        "model_path": config.model or service.model,
        "modalities": {"vision": False, "audio": False},
        "chat_template": service.chat_template(),
        "bos_token": service.tokenizer.special_text("bos_token"),
        "eos_token": service.tokenizer.special_text("eos_token"),
        "build_info": f"vllmlite {__version__}",
    }
    if service.config.chat_template is None and TOOL_USE in service.tokenizer.chat_templates:
        answer["chat_template_tool_use"] = service.tokenizer.chat_templates[TOOL_USE]
    return JSON(answer)


@router.get("/lora-adapters", responses=documented(list[LlamaAdapter], error=LlamaError))
async def list_adapters(request: Request) -> Response:
    """List the adapters. Their scale is 0: a request uses one by its name as the model."""
    service: Service = request.app.state.service
    found: list[LlamaAdapter] = [
        {"id": each.lora_int_id, "path": each.lora_path, "scale": 0.0}
        for each in service.adapters.all().values()
    ]
    return JSON(found)


async def _answer(
    service: Service, body: LlamaRequest, prompts: list[dict[str, Any]], request: Request
) -> Response:
    arrival = time.monotonic()
    model = service.check(body, request)
    with renamed(repetition_penalty="repeat_penalty", logprobs="n_probs", max_tokens="n_predict"):
        params = _params(body, service)
        generation = await service.generate(
            "cmpl-", prompts, params, request_id=request_id(None, request), arrival_time=arrival,
            model=model,
        )  # fmt: skip
    answer = _Answer(service, body, params, generation)
    if body.stream:
        return Stream(answer.events(), generation.close, error_event=llamacpp_error_event)
    try:
        return JSON(await unless_gone(request.receive, answer.complete()))
    finally:
        generation.close()


def _params(body: LlamaRequest, service: Service) -> SamplingParams:
    given: dict[str, Any] = {
        theirs: getattr(body, ours) for ours, theirs in SAMPLING.items() if getattr(body, ours) is not None
    }
    if body.seed not in (None, *RANDOM_SEEDS):
        given["seed"] = body.seed
    if body.logit_bias is not None:
        given["logit_bias"] = _bias(body.logit_bias, service.tokenizer)
    if body.n_probs:
        given["logprobs"] = body.n_probs
    if body.grammar and body.json_schema is not None:
        raise ParameterError("grammar", body.grammar, "cannot be combined with json_schema")
    if body.grammar:
        given["structured_outputs"] = StructuredOutputsParams(grammar=body.grammar)
    if body.json_schema is not None:
        given["structured_outputs"] = StructuredOutputsParams(json=body.json_schema)
    given |= turned_off(body.samplers)
    limit = None if body.n_predict in (None, -1) else max(body.n_predict or 0, 1)
    by_lines = body.n_indent > 0 or body.t_max_predict_ms > 0
    kind = RequestOutputKind.DELTA if body.stream or by_lines else RequestOutputKind.FINAL_ONLY
    return service.default_params.clone(**given, max_tokens=limit, output_kind=kind)


def _bias(given: Any, tokenizer: Tokenizer) -> dict[int, float]:
    """Return biases by token id. Raises :class:`ParameterError`.

    ``given`` is a mapping or a list of pairs. A key is an id, or a text whose tokens are all meant; in a mapping, a key
    of digits is an id. A value is a number, or false to ban the token."""
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise ParameterError("logit_bias", given, "must be pairs of a token id or text and a number")
    for count, limit, unit in (
        (len(pairs), MAX_LOGIT_BIAS, "pairs"),
        (sum(len(token) for token, _ in pairs if isinstance(token, str)), INLINE_CHARACTERS, "characters"),
    ):
        if count > limit:
            raise ParameterError("logit_bias", f"{count} {unit}", f"must be at most {limit}")
    found = {}
    for token, bias in pairs:
        if isinstance(given, dict) and re.fullmatch(r"\d{1,18}", token):
            ids = [int(token)]
        elif isinstance(token, str) and token:
            ids = tokenizer.encode(token, False)
        elif type(token) is int:
            ids = [token]
        else:
            raise ParameterError("logit_bias", token, "must be a token id or a text")
        if bias is not False and type(bias) not in (int, float):
            raise ParameterError("logit_bias", bias, "must be a number, or false to ban the token")
        for token_id in ids:
            found[token_id] = NO_BIAS if bias is False else bias
    return found


def _settings(params: SamplingParams, samplers: Sequence[str] | None) -> dict[str, Any]:
    settings = {ours: getattr(params, theirs) for ours, theirs in SAMPLING.items()}
    limit = -1 if params.max_tokens is None else params.max_tokens
    seed = -1 if params.seed is None else params.seed
    return {
        **settings,
        "stop": params.stop or [],
        "n_predict": limit,
        "seed": seed,
        "samplers": used(samplers),
    }


class _Answer:
    """Formats the answers to the prompts of one request, complete or as stream events."""

    def __init__(
        self, service: Service, body: LlamaRequest, params: SamplingParams, generation: Generation
    ) -> None:
        self._generation = generation
        self._sequences = [
            _Sequence(service, body, params, generation.model, index)
            for index in range(len(generation.prompts))
        ]

    async def complete(self) -> Any:
        """Return the answer to the prompt, or a list of answers to several prompts."""
        pieces: dict[int, list[LlamaAnswer]] = {}
        async for index, piece in self._pieces():
            pieces.setdefault(index, []).append(piece)
        answers = [sequence.joined(pieces[index]) for index, sequence in enumerate(self._sequences)]
        return answers[0] if len(answers) == 1 else answers

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield each piece as an event; ``index`` is the index of its prompt."""
        async for index, piece in self._pieces():
            yield event(self._sequences[index].selected(piece) if piece["stop"] else piece)

    async def _pieces(self) -> AsyncGenerator[tuple[int, LlamaAnswer], None]:
        """Yield each piece with the index of its prompt."""
        while not all(sequence.ended for sequence in self._sequences):
            batch = await self._generation.take()
            if not batch:
                return
            for index, output in batch:
                for piece in self._sequences[index].add(output):
                    yield index, piece


class _Sequence:
    """Formats the answer to one prompt, in pieces."""

    def __init__(
        self, service: Service, body: LlamaRequest, params: SamplingParams, model: str, index: int
    ) -> None:
        self.ended = False
        self._model = model
        self._service = service
        self._body = body
        self._params = params
        self._index = index
        self._limits = LineLimits(body.n_indent, max(body.t_max_predict_ms, 0) / 1000)
        self._num_tokens = 0
        self._tokens: list[int] = []
        """Tokens that were not yet part of a piece."""
        self._all_tokens: list[int] = []

    def add(self, output: RequestOutput) -> list[LlamaAnswer]:
        """Return the pieces for new output; at the end, also the last piece with the totals."""
        if self.ended:
            return []
        (completion,) = output.outputs
        self._all_tokens += completion.token_ids
        text, by_lines = self._limits.add(completion.text)
        found: list[LlamaAnswer] = []
        if self._body.n_predict != 0:  # with 0, one token is computed but not returned
            self._num_tokens += len(completion.token_ids)
            self._tokens += completion.token_ids
            if text or completion.logprobs or self._body.return_tokens:
                found.append(self._piece(output, text, completion))
        if by_lines or completion.finish_reason is not None:
            self.ended = True
            remember(self._service, self._body.id_slot, output.prompt_token_ids + self._all_tokens)
            found.append(self._end(output, completion, by_lines))
        return found

    def joined(self, pieces: Sequence[LlamaAnswer]) -> dict[str, Any]:
        """Return all ``pieces`` merged into one answer."""
        tokens = [token for piece in pieces for token in piece["tokens"]]
        whole: LlamaAnswer = {
            **pieces[-1],
            "content": "".join(piece["content"] for piece in pieces),
            "tokens": tokens if self._body.return_tokens else [],
        }
        if self._body.n_probs:
            whole["completion_probabilities"] = [
                entry for piece in pieces for entry in piece.get("completion_probabilities", ())
            ]
        return self.selected(whole)

    def _piece(self, output: RequestOutput, text: str, completion: CompletionOutput) -> LlamaAnswer:
        answer = self._begin(output, text, stop=False)
        if completion.logprobs:
            answer["completion_probabilities"] = logprobs.for_llamacpp(
                completion.logprobs, completion.token_ids, self._body.n_probs, self._service.tokenizer
            )
        if self._body.timings_per_token:
            answer["timings"] = self._timings(output)
        return answer

    def _begin(self, output: RequestOutput, text: str, stop: bool) -> LlamaAnswer:
        tokens, self._tokens = self._tokens, []
        return {
            "index": self._index,
            "content": text,
            "tokens": tokens,
            "stop": stop,
            "id_slot": self._body.id_slot,
            "tokens_predicted": self._num_tokens,
            "tokens_evaluated": len(output.prompt_token_ids),
        }

    def _end(self, output: RequestOutput, completion: CompletionOutput, by_lines: bool) -> LlamaAnswer:
        word = completion.stop_reason
        kind = "word" if isinstance(word, str) else STOP_TYPES.get(completion.finish_reason or "", "none")
        prompt = output.prompt
        if prompt is None:
            prompt = self._service.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        return {
            **self._begin(output, "", stop=True),
            "model": self._model,
            "prompt": prompt,
            "tokens_cached": output.num_cached_tokens,
            "truncated": False,
            "has_new_line": self._limits.has_line,
            "stop_type": "limit" if by_lines else kind,  # type: ignore[typeddict-item]
            "stopping_word": word if isinstance(word, str) else "",
            "generation_settings": _settings(self._params, self._body.samplers),
            "timings": self._timings(output),
        }

    def selected(self, answer: LlamaAnswer) -> dict[str, Any]:
        """Return the fields that ``response_fields`` selects, under the names given there; without it, all fields."""
        if not self._body.response_fields:
            return dict(answer)
        found: dict[str, Any] = {}
        for path in self._body.response_fields:
            value: Any = answer
            for name in path.split("/"):
                value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
            if value is not _MISSING:
                found[path] = value
        return found

    def _timings(self, output: RequestOutput) -> LlamaTimings:
        """Return times of the prompt, and of the tokens after the first: n tokens have n - 1 intervals."""
        metrics, cached = output.metrics, output.num_cached_tokens
        prompt, predicted = len(output.prompt_token_ids) - cached, self._num_tokens
        intervals = max(predicted - 1, 0)
        prompt_ms = predicted_ms = 0.0
        if metrics is not None and metrics.first_token_time and metrics.last_token_time:
            begun = metrics.first_scheduled_time or metrics.arrival_time
            prompt_ms = (metrics.first_token_time - begun) * 1000
            predicted_ms = (metrics.last_token_time - metrics.first_token_time) * 1000
        return {
            "cache_n": cached,
            "prompt_n": prompt,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / prompt if prompt else 0.0,
            "prompt_per_second": prompt / prompt_ms * 1000 if prompt_ms else 0.0,
            "predicted_n": predicted,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / intervals if intervals else 0.0,
            "predicted_per_second": intervals / predicted_ms * 1000 if predicted_ms else 0.0,
        }
