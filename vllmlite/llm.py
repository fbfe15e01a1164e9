"""LLM: offline batches, with vLLM's interface."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from vllmlite.config import EngineConfig
from vllmlite.errors import ParameterError, VllmliteError
from vllmlite.llm_engine import LLMEngine, Prompt
from vllmlite.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.terminal import is_terminal
from vllmlite.tokenizer import Tokenizer
from vllmlite.turns import Turns, takes_turn

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model and an engine that runs batches of prompts to their end."""

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """Load ``model`` (default: the built-in one); ``options`` are :class:`EngineConfig`'s fields."""
        self.llm_engine = LLMEngine(EngineConfig.from_kwargs(model=model, **options))
        self.turns = Turns("LLM")
        self._ids = count()
        self._unfinished: set[str] = set()
        """Requests of the call that runs, or of one that was interrupted and could not drop them."""

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation config asks for; a copy to change."""
        return self.llm_engine.default_sampling_params.clone()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Run prompts to their end; outputs in the order of the prompts.

        A prompt is text, token ids, or a mapping of either (``prompt``, ``prompt_token_ids``). One
        :class:`SamplingParams` serves all prompts, or each has its own. Raises :class:`ParameterError` before
        anything runs if a prompt or parameter is unusable; ``use_tqdm`` shows progress on a terminal.
        """
        batch = _as_batch(prompts)
        params = self._params_for(batch, sampling_params)
        if priority is not None and len(priority) != len(batch):
            raise ParameterError("priority", len(priority), f"must have one entry a prompt, {len(batch)}")
        finals = [each.clone(output_kind=RequestOutputKind.FINAL_ONLY) for each in params]
        return self._run(batch, finals, priority, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector of each prompt, of the model's hidden states after its last norm, as ``pooling_params`` say.

        Prompts are as :meth:`generate` takes them; raises as it does."""
        batch = _as_batch(prompts)
        if pooling_params is None:
            pooling_params = PoolingParams()
        params = (
            [pooling_params] * len(batch) if isinstance(pooling_params, PoolingParams) else pooling_params
        )
        if len(params) != len(batch):
            raise ParameterError("pooling_params", len(params), f"must be one, or one a prompt, {len(batch)}")
        return [
            EmbeddingRequestOutput(
                output.request_id,
                output.prompt,
                output.prompt_token_ids,
                EmbeddingOutput(output.embedding or []),
                num_cached_tokens=output.num_cached_tokens,
            )
            for output in self._run(batch, params, None, use_tqdm)
        ]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the model's chat template."""
        if not messages:
            raise ParameterError("messages", messages, "must hold at least one message")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        tokenizer = self.get_tokenizer()
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            prompts.append(
                {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
            )
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _params_for(
        self, batch: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Iterable[SamplingParams]:
        if params is None:
            params = self.llm_engine.default_sampling_params
        if isinstance(params, SamplingParams):
            return [params] * len(batch)
        if len(params) != len(batch):
            raise ParameterError(
                "sampling_params", len(params), f"must be one, or one a prompt, {len(batch)}"
            )
        return params

    @takes_turn
    def _run(
        self,
        batch: Sequence[Prompt],
        params: Sequence[SamplingParams | PoolingParams],
        priority: Sequence[int] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Add requests, all or none, and step until they are done; outputs in their order."""
        self._abort_unfinished()
        request_ids = [str(next(self._ids)) for _ in batch]
        try:
            self._unfinished.update(request_ids)
            for index, (prompt, its_params) in enumerate(zip(batch, params, strict=True)):
                self.llm_engine.add_request(
                    request_ids[index], prompt, its_params, priority=priority[index] if priority else 0
                )
            return self._finish(request_ids, use_tqdm)
        finally:
            self._abort_unfinished()

    def _abort_unfinished(self) -> None:
        self.llm_engine.abort_request(self._unfinished)
        self._unfinished.clear()

    def _finish(self, request_ids: Sequence[str], use_tqdm: bool) -> list[RequestOutput]:
        progress = _progress_bar(len(request_ids)) if use_tqdm else None
        finished: dict[str, RequestOutput] = {}
        while len(finished) < len(request_ids) and self.llm_engine.has_unfinished_requests():
            for output in self.llm_engine.step():
                if output.request_id not in self._unfinished:
                    continue  # a request that was added to the engine itself
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


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and all(type(entry) is int for entry in prompts):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _progress_bar(total: int) -> Any:
    """A bar on standard error if that is a terminal; None where tqdm is not installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return tqdm(total=total, desc="Prompts", disable=not is_terminal(sys.stderr))
