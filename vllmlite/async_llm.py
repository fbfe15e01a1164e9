"""AsyncLLM: an engine in its own thread or process, used by any number of tasks of one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllmlite.beam_search import BeamSearchOutput, BeamSearchParams, beam_search_output, sampling_params
from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.sleeping import check_sleep, check_tags
from vllmlite.engine_process.client import EngineClient
from vllmlite.engine_process.replicas import ReplicaClient
from vllmlite.engine_process.start import start_process, start_replicas, start_thread
from vllmlite.errors import EngineDeadError, EngineSleepingError, ParameterError, VllmliteError
from vllmlite.inputs import refuse
from vllmlite.llm_engine import LLMEngine, Prompt
from vllmlite.lora.request import LoRARequest
from vllmlite.outputs import EngineStats, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.05
"""Interval in seconds at which an engine that is to sleep checks whether its requests have finished."""
MAX_FAILED_STEPS = 3
"""Number of consecutive failed steps after which the engine is shut down, since a device rarely recovers from an
error."""


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request to submit: the arguments of :meth:`LLMEngine.add_request`."""

    request_id: str
    prompt: Prompt
    params: SamplingParams | PoolingParams
    priority: int = 0
    arrival_time: float | None = None
    lora_request: LoRARequest | None = None


class OutputStream:
    """The outputs of requests that were submitted together, to be read by one task.

    A slow reader does not delay the engine or other readers: its next :meth:`take` returns everything that has arrived
    since, merged into one output per request."""

    def __init__(self, engine: AsyncLLM, requests: Sequence[NewRequest]) -> None:
        """Create a stream for ``requests``, which :meth:`AsyncLLM.submit` is about to add to ``engine``."""
        self._engine = engine
        self._unfinished = {request.request_id for request in requests}
        self._deltas = {
            request.request_id
            for request in requests
            if isinstance(request.params, SamplingParams)
            and request.params.output_kind is RequestOutputKind.DELTA
        }
        self._items: dict[str, RequestOutput] = {}
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> list[RequestOutput]:
        """Wait for outputs, and return those that have arrived since the last call; [] once every request has finished.

        Raises VllmliteError if a step failed or the engine ended a request; the other requests are then aborted."""
        while not self._items:
            if self._error is not None:
                self.close()
                raise self._error
            if not self._unfinished:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = list(self._items.values()), {}
        for item in items:
            if item.finished:
                self._unfinished.discard(item.request_id)
        return items

    def close(self) -> None:
        """Abort the requests that have not finished; the engine frees their blocks before its next step."""
        if self._unfinished:
            self._engine._forget(self._unfinished)
            self._unfinished.clear()

    def put(self, item: RequestOutput | BaseException) -> None:
        """Add an output, or an error, after which the stream ends."""
        if isinstance(item, RequestOutput):
            earlier = self._items.get(item.request_id)
            if earlier is not None and item.request_id in self._deltas:
                earlier.extend(item)
            else:
                self._items[item.request_id] = item
        elif self._error is None:
            self._error = item
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncLLM:
    """The engine for servers: any number of tasks of one event loop may call :meth:`generate`. The loop is the one that
    runs at the first call; after it has been closed, another loop may use the engine.

    The engine does not wait for the loop. While the loop is busy, outputs accumulate, and the next ones that it reads
    have several tokens each."""

    def __init__(self, config: EngineConfig, *, engine_process: bool = False) -> None:
        """Load the model and start the engine's thread or, with ``engine_process``, its process. Replicas of the engine
        (``data_parallel_size``) have processes of their own in any case."""
        if config.data_parallel_size > 1:
            self._engine = LLMEngine(config, start_replicas)
        else:
            self._engine = LLMEngine(config, start_process if engine_process else start_thread)
        core = self._engine.engine_core
        assert isinstance(core, EngineClient | ReplicaClient)
        self._core = core
        self._end: EngineDeadError | None = None
        self._death: EngineDeadError | None = None
        self._streams: dict[str, OutputStream] = {}
        self._on_death: Callable[[], object] | None = None
        self._refuses = False
        """Whether new requests are refused because the engine sleeps or is about to sleep."""

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig, **_absent: object) -> AsyncLLM:
        """Create an AsyncLLM from a configuration, as in vLLM; ``usage_context`` and other arguments have no effect."""
        return cls(engine_args)

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine as this thread sees it, a client of the engine's thread or process."""
        return self._engine

    @property
    def dead_error(self) -> EngineDeadError | None:
        """The reason why the engine died; None if it has not died, or was shut down."""
        return self._death

    @property
    def last_step_failed(self) -> bool:
        """Whether the engine's latest steps failed."""
        return self._core.failed_steps_in_a_row > 0

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self._engine.get_tokenizer()

    async def submit(self, requests: Sequence[NewRequest]) -> OutputStream:
        """Add requests, all or none. Raises :class:`ParameterError` if one can never be served.

        A grammar that has not been compiled yet is compiled here, which blocks the event loop; :meth:`generate`
        compiles it in a thread first."""
        self._use_running_loop()
        if self._refuses:
            raise EngineSleepingError
        stream = OutputStream(self, requests)
        added: list[str] = []
        try:
            for request in requests:
                if request.request_id in self._streams:
                    raise ParameterError(
                        "request_id", request.request_id, "is in use by a request that has not finished"
                    )
                added.append(request.request_id)
                self._streams[request.request_id] = stream
                self._engine.add_request(
                    request.request_id,
                    request.prompt,
                    request.params,
                    arrival_time=request.arrival_time,
                    lora_request=request.lora_request,
                    priority=request.priority,
                )
        except BaseException:
            self._forget(added)
            raise
        return stream

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        **absent: object,
    ) -> AsyncIterator[RequestOutput]:
        """Generate the outputs of a request, in the form that its ``output_kind`` names. Leaving the iteration early
        aborts the request.

        ``trace_headers`` have no effect; the other arguments that vLLM has must be None. Raises :class:`ParameterError`
        if the request can never be served, VllmliteError if a step failed."""
        refuse(absent)
        if not isinstance(sampling_params, SamplingParams):
            raise ParameterError("sampling_params", sampling_params, "must be SamplingParams")
        structure = sampling_params.structured_outputs
        if structure is not None:
            await asyncio.to_thread(self._engine.grammars.compile, structure)
        stream = await self.submit(
            [NewRequest(request_id, prompt, sampling_params, priority, time.monotonic(), lora_request)]
        )
        try:
            while outputs := await stream.take():
                for output in outputs:
                    yield output
        finally:
            stream.close()

    async def beam_search(
        self,
        prompt: Prompt,
        request_id: str,
        params: BeamSearchParams,
        lora_request: LoRARequest | None = None,
        **absent: object,
    ) -> AsyncIterator[BeamSearchOutput]:
        """Generate the one output of a beam search. Raises the same errors as :meth:`generate`."""
        refuse(absent)
        async for output in self.generate(
            prompt, sampling_params(params), request_id, lora_request=lora_request
        ):
            yield beam_search_output(output, params, self._engine.tokenizer)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Abort one or several requests; their streams raise VllmliteError."""
        for each in [request_id] if isinstance(request_id, str) else list(request_id):
            self._fail([each], VllmliteError(f"request {each} was aborted"))

    async def abort_all(self, reason: str) -> None:
        """Abort every request; their streams raise EngineDeadError with ``reason``."""
        self._fail(list(self._streams), EngineDeadError(reason))

    async def stats(self) -> EngineStats:
        """Return the engine's counters."""
        stats: EngineStats = await self.ask("current_stats")
        return stats

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empty the prefix cache. Returns True, as vLLM does on success. vLLM's arguments must be False."""
        refuse({"reset_running_requests": reset_running_requests, "reset_connector": reset_connector})
        await self.ask("reset_prefix_cache")
        return True

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free the engine's memory until :meth:`wake_up`; new requests are refused meanwhile. At ``level`` 1 the
        weights are kept in main memory, at 2 they are read again from the checkpoint. ``mode`` says what happens to
        unfinished requests: ``abort`` ends them, ``wait`` lets them finish first, and ``keep`` computes them again
        after waking up. Raises ParameterError if ``enable_sleep_mode`` is not set."""
        check_sleep(level, mode)
        if not self._engine.config.enable_sleep_mode:
            raise ParameterError("enable_sleep_mode", False, "must be True for an engine that is to sleep")
        self._use_running_loop()
        self._refuses = True
        try:
            if mode == "abort":
                self._fail(
                    list(self._streams), EngineSleepingError("the request was aborted: the engine sleeps")
                )
            while mode == "wait" and self._streams:
                await asyncio.sleep(DRAIN_POLL_SECONDS)
                if not self._refuses:
                    raise VllmliteError("the engine was woken up while it waited for requests to finish")
            await self.ask("sleep", level)
        except BaseException:
            if self._end is None and self._refuses:
                await asyncio.shield(self.wake_up())  # replicas may sleep already
            raise
        self._refuses = await self.ask("is_sleeping")

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Allocate the freed memory again. With ``tags``, which are ``weights`` and ``kv_cache``, this happens once
        both have been given, in one call or in several."""
        await self.ask("wake_up", check_tags(tags))
        self._refuses = await self.ask("is_sleeping")

    async def is_sleeping(self) -> bool:
        """Return whether the engine sleeps."""
        sleeping: bool = await self.ask("is_sleeping")
        return sleeping

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read and check an adapter before its first use, and return True. Raises ModelError or ParameterError if it
        cannot be used."""
        self._use_running_loop()
        await self._core.ask("add_adapter", self._engine.checked_lora(lora_request))
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        """Forget the adapter with number ``lora_id``; return whether there was one. Unfinished requests go on."""
        self._use_running_loop()
        return self._engine.remove_lora(lora_id)

    async def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that have been added or named by requests."""
        return self._engine.list_loras()

    async def ask(self, name: str, *args: object) -> Any:
        """Call the engine's method ``name`` between two steps, and return its result."""
        self._use_running_loop()
        return await self._core.ask(name, *args)

    def on_death(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called if the engine dies while the running event loop runs."""
        self._on_death = callback
        self._use_running_loop()

    def shutdown(self) -> None:
        """End the engine; open streams raise EngineDeadError."""
        self._finish(EngineDeadError("the engine has been shut down"))

    def _use_running_loop(self) -> None:
        """Have the running event loop receive the engine's outputs. Raises EngineDeadError if the engine has ended."""
        if self._end is not None:
            raise self._end
        self._engine.turns.check()
        self._core.join_loop(asyncio.get_running_loop(), self._receive_outputs)

    def _receive_outputs(self) -> None:
        """Receive the outputs that the engine has sent, and put them into the streams."""
        try:
            self._core.receive()
            while self._core.has_outputs():
                outputs = self._engine.step()
                self._watch_failures()
                self._publish(outputs)
            self._core.check()
        except BaseException as error:
            # This includes exceptions of signal handlers: they lose outputs that have not reached a stream.
            logger.exception("the engine is dead")
            self._death = EngineDeadError(f"the engine is dead: {type(error).__name__}: {error}")
            self._finish(self._death)
            if self._on_death is not None:
                self._on_death()
            if not isinstance(error, Exception):
                raise

    def _watch_failures(self) -> None:
        if self._core.failed_steps_in_a_row >= MAX_FAILED_STEPS:
            raise VllmliteError(f"{MAX_FAILED_STEPS} steps in a row failed: {self._core.stats.last_error}")

    def _publish(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            request_id = output.request_id
            item: RequestOutput | BaseException = output
            if output.finished:
                stream = self._streams.pop(request_id, None)
                error = self._engine.take_error(request_id)
                if error is not None:
                    item = VllmliteError(f"a step failed: {error}")
            else:
                stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(item)

    def _fail(self, request_ids: Sequence[str], error: VllmliteError) -> None:
        for request_id in request_ids:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(error)
        self._forget(request_ids)

    def _forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests whose outputs are no longer read, and abort them unless the engine has ended."""
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None and self._end is None:
                self._engine.abort_request(request_id)

    def _finish(self, end: EngineDeadError) -> None:
        if self._end is not None:
            return
        self._end = end
        streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.put(end)
        self._engine.close()


AsyncLLMEngine = AsyncLLM
"""vLLM's older name of AsyncLLM."""
