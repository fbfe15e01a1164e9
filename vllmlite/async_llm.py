"""AsyncLLM: one engine in a thread of its own, streams of outputs to any number of asyncio tasks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from vllmlite.config import EngineConfig
from vllmlite.engine_process import EngineProcess
from vllmlite.errors import EngineDeadError, VllmliteError
from vllmlite.llm_engine import LLMEngine, Prompt
from vllmlite.outputs import EngineStats, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

DELIVERY_SECONDS = 0.05
"""How long event loops get to deal with outputs before those that have come since are handed over all the same."""
MAX_FAILED_STEPS = 3
"""After this many failed steps in a row the engine counts as broken: a device error rarely mends itself."""


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What :meth:`LLMEngine.add_request` takes."""

    request_id: str
    prompt: Prompt
    params: SamplingParams | PoolingParams
    priority: int = 0
    arrival_time: float | None = None


class OutputStream:
    """Outputs of requests that were submitted together, for one task of the event loop that submitted them.

    A reader that falls behind finds all that has come since in its next :meth:`take`, in one output a request; it
    holds up nobody."""

    def __init__(self, engine: AsyncLLM, requests: Sequence[NewRequest]) -> None:
        """Made by :meth:`AsyncLLM.submit`."""
        self.loop = asyncio.get_running_loop()
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
        """What has come since the last call, after waiting for something; empty once every request has finished.

        Raises VllmliteError, and drops the other requests, if a step failed or the engine ended one."""
        while not self._items:
            if self._error is not None:
                self.close()
                raise self._error
            if not self._unfinished:
                return []
            self._waiter = self.loop.create_future()
            await self._waiter
        items, self._items = list(self._items.values()), {}
        for item in items:
            if item.finished:
                self._unfinished.discard(item.request_id)
        return items

    def close(self) -> None:
        """Abort what has not finished; its blocks are free before the engine's next step."""
        if self._unfinished:
            self._engine._drop(list(self._unfinished))
            self._unfinished.clear()

    def put(self, item: RequestOutput | BaseException) -> None:
        """Hand over an output or the end of it all; called on the event loop."""
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
    """The engine for servers: :meth:`generate` from any number of tasks; the thread sleeps while there is no work."""

    def __init__(self, config: EngineConfig, *, engine_process: bool = False) -> None:
        """Load the model and start the thread that steps the engine, or that hears from its process."""
        self._engine = LLMEngine(config, engine_process=engine_process)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._end: EngineDeadError | None = None
        self._death: EngineDeadError | None = None
        self._check: Callable[[], None] | None = None
        """Raises, once the engine's process has ended."""
        self._streams: dict[str, OutputStream] = {}
        self._busy_loops: set[asyncio.AbstractEventLoop] = set()
        """Those whose tasks have not seen the outputs that were last handed over."""
        self._patience_ends = 0.0
        self._failed_steps_in_a_row = 0
        self._on_death: Callable[[], object] | None = None
        self._thread = threading.Thread(target=self._run, name="vllmlite-engine", daemon=True)
        core = self._engine.engine_core
        if isinstance(core, EngineProcess):
            core.on_end = partial(self._notice_end, core)
        self._thread.start()

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> AsyncLLM:
        """vLLM's way to make one."""
        return cls(engine_args)

    @property
    def llm_engine(self) -> LLMEngine:
        """The engine; what it does belongs to its thread, what does not change may be read from any."""
        return self._engine

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why the engine's thread has ended by itself; None while it lives."""
        return self._death

    @property
    def last_step_failed(self) -> bool:
        """Whether the step before this raised."""
        return self._failed_steps_in_a_row > 0

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.get_tokenizer()

    async def submit(self, requests: Sequence[NewRequest]) -> OutputStream:
        """Add requests, all or none; returns once the engine has taken them in.

        Raises :class:`ParameterError` if one can never be served."""
        stream = OutputStream(self, requests)

        def add() -> None:
            added: list[str] = []
            try:
                for request in requests:
                    self._engine.add_request(
                        request.request_id,
                        request.prompt,
                        request.params,
                        arrival_time=request.arrival_time,
                        priority=request.priority,
                    )
                    added.append(request.request_id)
                    self._streams[request.request_id] = stream
            except Exception:
                self._forget(added)
                raise

        try:
            await self.call(add)
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of a request as its ``output_kind`` says. Leaving the iteration early aborts the request.

        Raises :class:`ParameterError` if it can never be served, VllmliteError if a step failed."""
        encoded = self._engine.encode(
            prompt
        )  # here, so that a long text does not hold up the engine's thread
        stream = await self.submit(
            [NewRequest(request_id, encoded, sampling_params, priority, time.monotonic())]
        )
        try:
            while outputs := await stream.take():
                for output in outputs:
                    yield output
        finally:
            stream.close()

    async def abort(self, request_id: str) -> None:
        """End a request; its stream raises VllmliteError."""
        await self.call(lambda: self._fail([request_id], VllmliteError(f"request {request_id} was aborted")))

    async def abort_all(self, reason: str) -> None:
        """End every request; their streams raise VllmliteError with ``reason``."""
        await self.call(lambda: self._fail(list(self._streams), VllmliteError(reason)))

    async def stats(self) -> EngineStats:
        """The engine's counters."""
        return await self.call(lambda: replace(self._engine.stats()))

    async def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        await self.call(self._engine.reset_prefix_cache)

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the engine's thread, between two steps; its result or its exception."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def answer(result: T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
            try:
                if self._end is not None:
                    raise self._end
                result = function()
            except Exception as error:
                _call_soon(loop, answer, None, error)
            else:
                _call_soon(loop, answer, result, None)

        self._post(run)
        return await future

    def on_death(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called, in the engine's thread, if that ends by itself."""
        self._on_death = callback

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop the thread after its current step, for which ``timeout`` seconds are waited; open streams raise."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)
        self._engine.close()

    def _notice_end(self, engine: EngineProcess) -> None:
        """Have the thread find out that the engine's process has ended, though it may have nothing to wait for."""
        with self._wake:
            self._check = engine.check
            self._wake.notify()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._end is not None:
                raise self._end
            if self._closed:
                raise EngineDeadError("the engine has been shut down")
            self._commands.append(command)
            self._wake.notify()

    def _drop(self, request_ids: list[str]) -> None:
        """Have requests forgotten that nobody waits for any more; nothing to do where the engine is gone."""
        try:
            self._post(lambda: self._forget(request_ids))
        except EngineDeadError:
            return

    def _run(self) -> None:
        end = EngineDeadError("the engine has been shut down")
        try:
            while self._turn():
                pass
        except BaseException as error:
            logger.exception("the engine's thread ends")
            end = self._death = EngineDeadError(f"the engine is dead: {type(error).__name__}: {error}")
        with self._wake:
            self._end = end
        for stream in set(self._streams.values()):
            _call_soon(stream.loop, stream.put, end)
        self._streams.clear()
        for command in self._commands:  # that came too late: each tells its caller so
            command()
        if self._death is not None and self._on_death is not None:
            self._on_death()

    def _turn(self) -> bool:
        """Wait for work, do the commands, run a step; False once the engine is to shut down."""
        engine = self._engine
        with self._wake:
            while not self._wake.wait_for(self._has_to_act, self._patience()):
                self._busy_loops.clear()
            if self._closed:
                return False
            commands, self._commands = self._commands, deque()
        if self._check is not None:
            self._check()
        for command in commands:
            command()
        if self._busy_loops or not engine.has_unfinished_requests():
            return True
        failed_before = engine.engine_core.stats.num_failed_steps
        self._publish(engine.step())
        stats = engine.engine_core.stats
        if stats.num_failed_steps == failed_before:
            self._failed_steps_in_a_row = 0
        else:
            self._failed_steps_in_a_row += stats.num_failed_steps - failed_before
            if self._failed_steps_in_a_row >= MAX_FAILED_STEPS:
                raise VllmliteError(f"{MAX_FAILED_STEPS} steps in a row failed: {stats.last_error}")
        return True

    def _has_to_act(self) -> bool:
        if self._commands or self._closed or self._check is not None:
            return True
        return self._engine.has_unfinished_requests() and not self._busy_loops

    def _patience(self) -> float | None:
        return max(self._patience_ends - time.monotonic(), 0) if self._busy_loops else None

    def _publish(self, outputs: list[RequestOutput]) -> None:
        """Hand a step's outputs over, waking each event loop once."""
        batches: dict[
            asyncio.AbstractEventLoop, list[tuple[OutputStream, RequestOutput | BaseException]]
        ] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            item: RequestOutput | BaseException = output
            if output.finished:
                error = self._engine.take_error(output.request_id)
                if error is not None:
                    item = VllmliteError(f"a step failed: {error}")
                self._streams.pop(output.request_id, None)
            if stream is not None:
                batches.setdefault(stream.loop, []).append((stream, item))
        if isinstance(self._engine.engine_core, EngineProcess):
            # It steps without being asked. What it gives while the event loops are at work waits for them in one
            # piece a request, rather than that this thread takes the interpreter from them for each.
            self._busy_loops.update(batches)
            self._patience_ends = time.monotonic() + DELIVERY_SECONDS
        for loop, batch in batches.items():
            _call_soon(loop, self._deliver, loop, batch)

    def _deliver(
        self, loop: asyncio.AbstractEventLoop, batch: list[tuple[OutputStream, RequestOutput | BaseException]]
    ) -> None:
        for stream, item in batch:
            stream.put(item)
        loop.call_soon(self._delivered, loop)  # after the tasks that this has woken

    def _delivered(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._wake:
            self._busy_loops.discard(loop)
            self._wake.notify()

    def _fail(self, request_ids: Sequence[str], error: VllmliteError) -> None:
        for request_id in request_ids:
            stream = self._streams.get(request_id)
            if stream is not None:
                _call_soon(stream.loop, stream.put, error)
        self._forget(request_ids)

    def _forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None:
                self._engine.abort_request(request_id)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:  # the caller's event loop is closed: nobody is left to tell
        return
