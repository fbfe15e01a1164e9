"""LLM: offline batches, with vLLM's interface."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, TypeAlias, TypeVar

from vllmlite.beam_search import BeamSearchOutput, BeamSearchParams, beam_search_output, sampling_params
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError, VllmliteError
from vllmlite.exclusive_calls import Turns, takes_turn
from vllmlite.inputs import as_batch, refuse
from vllmlite.llm_engine import LLMEngine, Prompt
from vllmlite.lora.request import LoRARequest
from vllmlite.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.terminal import is_terminal
from vllmlite.tokenizers.tokenizer import Tokenizer

Messages: TypeAlias = Iterable[Mapping[str, Any]]
Prompts: TypeAlias = Prompt | Iterable[Prompt]
T = TypeVar("T")


class LLM:
    """A model with an engine that runs batches of prompts to completion."""

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """Load ``model`` (default: the built-in one); ``options`` are the fields of :class:`EngineConfig`."""
        self.llm_engine = LLMEngine(EngineConfig.from_kwargs(model=model, **options))
        self.turns = Turns("LLM")
        self._ids = count()
        self._unfinished: set[str] = set()
        """Ids of the requests of the running call, or of an interrupted call that could not abort them."""

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Return a copy of the default sampling parameters, from the checkpoint's generation config."""
        return self.llm_engine.default_sampling_params.clone()

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Mapping[str, Any] | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: Sequence[int] | None = None,
        **absent: object,
    ) -> list[RequestOutput]:
        """Run prompts to completion; return outputs in the order of the prompts.

        A prompt is text, token ids, or a mapping of either (``prompt``, ``prompt_token_ids``). One
        :class:`SamplingParams`, or a mapping of its fields, applies to all prompts; or each prompt has its own.
        ``lora_request`` is a LoRA adapter for all prompts, or a list with an adapter or None for each; it needs
        ``enable_lora``. ``use_tqdm`` shows a progress bar on a terminal, or is a function that makes the bar. Other
        arguments of vLLM must be None. Raises :class:`ParameterError` before anything runs if a prompt or parameter is
        invalid.
        """
        refuse(absent)
        batch = as_batch(prompts)
        params = self._params_for(batch, sampling_params)
        if priority is not None and (not isinstance(priority, Sequence) or len(priority) != len(batch)):
            raise ParameterError("priority", priority, f"must have one entry per prompt, {len(batch)}")
        finals = [each.clone(output_kind=RequestOutputKind.FINAL_ONLY) for each in params]
        return self._run(batch, finals, priority, use_tqdm, lora_request)

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling_params: PoolingParams | Iterable[PoolingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        **absent: object,
    ) -> list[EmbeddingRequestOutput]:
        """Return an embedding of each prompt: its pooled hidden states after the last norm, computed as
        ``pooling_params`` say. Prompts and errors are those of :meth:`generate`."""
        refuse(absent)
        batch = as_batch(prompts)
        if pooling_params is None:
            pooling_params = PoolingParams()
        params = _listed("pooling_params", pooling_params, PoolingParams, len(batch))
        if len(params) != len(batch):
            raise ParameterError(
                "pooling_params", len(params), f"must be one, or one per prompt, {len(batch)}"
            )
        return [
            EmbeddingRequestOutput(
                output.request_id,
                output.prompt,
                output.prompt_token_ids,
                EmbeddingOutput(output.embedding or []),
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in self._run(batch, params, None, use_tqdm, lora_request)
        ]

    def chat(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: SamplingParams | Mapping[str, Any] | Iterable[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **absent: object,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, using the model's chat template."""
        refuse(absent)
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
            raise ParameterError("messages", messages, "must be a list of messages, or a list of such lists")
        listed: list[Any] = list(messages)
        if not listed:
            raise ParameterError("messages", listed, "must have at least one message")
        conversations = [listed] if isinstance(listed[0], Mapping) else listed
        tokenizer = self.get_tokenizer()
        template = tokenizer.find_chat_template(chat_template, with_tools=bool(tools))
        from vllmlite.chat.template import PromptOptions  # imports Jinja, which generate does not need

        options = PromptOptions(add_generation_prompt, continue_final_message, chat_template_content_format)
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = template.prompt(conversation, options, tools, chat_template_kwargs)
            prompts.append(
                {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
            )
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empty the prefix cache and return True, as in vLLM. vLLM's arguments must be False."""
        return self.llm_engine.reset_prefix_cache(reset_running_requests, reset_connector)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free the engine's memory until :meth:`wake_up`, which needs ``enable_sleep_mode``. At ``level`` 1 the weights
        are kept in main memory, at 2 they are read again from the checkpoint. ``mode`` is that of
        :meth:`LLMEngine.sleep`."""
        self.llm_engine.sleep(level, mode)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Allocate the freed memory again. With ``tags``, which are ``weights`` and ``kv_cache``, this happens once
        both have been given, in one call or in several."""
        self.llm_engine.wake_up(tags)

    def is_sleeping(self) -> bool:
        """Return whether the engine sleeps."""
        return self.llm_engine.is_sleeping()

    def beam_search(
        self,
        prompts: Prompts,
        params: BeamSearchParams,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
        **absent: object,
    ) -> list[BeamSearchOutput]:
        """Find the most likely outputs of each prompt with beam search, the best first.

        Prompts are as in :meth:`generate`. ``concurrency_limit`` has no effect: the engine runs as many prompts at a
        time as fit."""
        refuse(absent)
        del concurrency_limit
        batch = as_batch(prompts)
        outputs = self._run(batch, [sampling_params(params)] * len(batch), None, use_tqdm, lora_request)
        tokenizer = self.llm_engine.tokenizer
        return [beam_search_output(output, params, tokenizer) for output in outputs]

    def _params_for(
        self,
        batch: Sequence[Prompt],
        params: SamplingParams | Mapping[str, Any] | Iterable[SamplingParams] | None,
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.llm_engine.default_sampling_params
        if isinstance(params, Mapping):
            if not all(isinstance(name, str) for name in params):
                raise ParameterError(
                    "sampling_params", params, "must be a mapping from parameter names to values"
                )
            params = SamplingParams.from_optional(**params)
        listed = _listed("sampling_params", params, SamplingParams, len(batch))
        if len(listed) != len(batch):
            raise ParameterError(
                "sampling_params", len(listed), f"must be one, or one per prompt, {len(batch)}"
            )
        return listed

    @takes_turn
    def _run(
        self,
        batch: Sequence[Prompt],
        params: Sequence[SamplingParams | PoolingParams],
        priority: Sequence[int] | None,
        use_tqdm: bool | Callable[..., Any],
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
    ) -> list[RequestOutput]:
        """Add all requests, or none if one is invalid; step until they are finished; return outputs in order."""
        adapters = _adapters_for(lora_request, len(batch))
        self._abort_unfinished()
        request_ids = [str(next(self._ids)) for _ in batch]
        try:
            self._unfinished.update(request_ids)
            for index, (prompt, its_params) in enumerate(zip(batch, params, strict=True)):
                self.llm_engine.add_request(
                    request_ids[index],
                    prompt,
                    its_params,
                    lora_request=adapters[index],
                    priority=priority[index] if priority else 0,
                )
            return self._finish(request_ids, use_tqdm)
        finally:
            self._abort_unfinished()

    def _abort_unfinished(self) -> None:
        self.llm_engine.abort_request(self._unfinished)
        self._unfinished.clear()

    def _finish(self, request_ids: Sequence[str], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        progress = _progress_bar(len(request_ids), use_tqdm) if use_tqdm else None
        finished: dict[str, RequestOutput] = {}
        while len(finished) < len(request_ids) and self.llm_engine.has_unfinished_requests():
            for output in self.llm_engine.step():
                if output.request_id not in self._unfinished:
                    continue  # a request added directly to the engine
                finished[output.request_id] = output
                if progress is not None:
                    progress.update(1)
        if progress is not None:
            progress.close()
        for request_id in request_ids:
            error = self.llm_engine.take_error(request_id)
            if error is not None:
                raise VllmliteError(f"request {request_id}: a step failed: {error}")
            if request_id not in finished:
                raise VllmliteError(f"request {request_id} was aborted while it ran")
        return [finished[request_id] for request_id in request_ids]


def _adapters_for(given: object, count: int) -> Sequence[LoRARequest | None]:
    """Return the adapter of each of ``count`` prompts."""
    if given is None or isinstance(given, LoRARequest):
        return [given] * count
    listed: list[Any] = (
        list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) else [given]
    )
    if len(listed) != count or not all(each is None or isinstance(each, LoRARequest) for each in listed):
        raise ParameterError(
            "lora_request", given, f"must be a LoRARequest, or a list of one per prompt, {count}"
        )
    return listed


def _listed(name: str, given: Any, kind: type[T], count: int) -> list[T]:
    """Return ``given`` as a list: one value of ``kind`` repeated ``count`` times, or an iterable's values."""
    if isinstance(given, kind):
        return [given] * count
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) else [given]
    for entry in listed:
        if not isinstance(entry, kind):
            raise ParameterError(name, entry, f"must be {kind.__name__}, or one for each prompt")
    return listed


def _progress_bar(total: int, make: bool | Callable[..., Any]) -> Any:
    """Return a progress bar on standard error, hidden if that is no terminal; None if tqdm is not installed."""
    if callable(make):
        return make(total=total, desc="Prompts")
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return tqdm(total=total, desc="Prompts", disable=not is_terminal(sys.stderr))
