"""The generation of an answer: the engine's requests that belong to one HTTP request, with their outputs and token
counts.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from vllmlite.async_llm import AsyncLLM, NewRequest, OutputStream
from vllmlite.errors import EngineSleepingError
from vllmlite.lora.request import LoRARequest
from vllmlite.outputs import RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import SamplingParams
from vllmlite.server.admission import Admission
from vllmlite.server.metrics import Metrics
from vllmlite.server.protocol.base import Usage
from vllmlite.server.sse import unless_gone


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that a request names: its name in the answer and, if it is an adapter, the adapter."""

    name: str
    adapter: LoRARequest | None = None


class Generation:
    """The engine's requests that answer one HTTP request, one per prompt; must be closed when the answer ends."""

    def __init__(
        self,
        engine: AsyncLLM,
        admission: Admission,
        metrics: Metrics,
        kind: str,
        request_id: str | None,
        prompts: Sequence[dict[str, Any]],
        params: SamplingParams | PoolingParams,
        model: ServedModel,
    ) -> None:
        """Prepare the requests; :meth:`start` submits them. ``kind`` is the prefix of the answer's id."""
        self.id = kind + (request_id or uuid.uuid4().hex)
        self.created = int(time.time())
        self.prompts = prompts
        self.params = params
        self.model = model.name
        self.n = params.n if isinstance(params, SamplingParams) else 1
        """Number of completions per prompt."""
        self._engine = engine
        self._adapter = model.adapter
        self._admission = admission
        self._metrics = metrics
        self._stream: OutputStream | None = None
        self._index = {uuid.uuid4().hex: index for index in range(len(prompts))}
        self._prompt_tokens = [0] * len(prompts)
        self._cached_tokens = [0] * len(prompts)
        self._completion_tokens = 0
        self._lengths = [[0] * self.n for _ in prompts]
        """Number of tokens of each completion of each prompt."""
        self._running = [self.n] * len(prompts)
        """Number of unfinished completions of each prompt."""
        self._unfinished = len(prompts) * self.n

    async def start(self, priority: int, arrival_time: float) -> None:
        """Submit the prompts to the engine. Raises ApiError if the queue is full, EngineSleepingError if the engine
        sleeps, ParameterError if a prompt cannot run."""
        self._admission.admit(self._unfinished)
        try:
            self._stream = await self._engine.submit(
                [
                    NewRequest(
                        request_id, self.prompts[index], self.params, priority, arrival_time, self._adapter
                    )
                    for request_id, index in self._index.items()
                ]
            )
        except BaseException as error:
            self._admission.release(self._unfinished)
            self._unfinished = 0
            if isinstance(error, EngineSleepingError):
                self._metrics.rejected("sleeping")
            raise
        if self._adapter is not None:
            self._metrics.adapter_used(self._adapter.lora_name, len(self.prompts))
        if isinstance(self.params, SamplingParams):
            self._metrics.requested(self.params, len(self.prompts))

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
            if output.finished:
                # An embedding has no completions; a beam search may find fewer than were asked for.
                ended += self._running[index]
                self._running[index] = 0
                if output.outputs:
                    self._metrics.completed(max(self._lengths[index]))
            found.append((index, output))
        self._admission.release(ended)
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
            self._admission.release(self._unfinished)
            self._metrics.aborted(self._unfinished)
            self._unfinished = 0
