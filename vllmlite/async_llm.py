"""AsyncLLM: one engine in a thread of its own, an asyncio stream a request."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from vllmlite.config import EngineConfig
from vllmlite.errors import VllmliteError
from vllmlite.llm_engine import LLMEngine, Prompt
from vllmlite.outputs import EngineStats, RequestOutput
from vllmlite.sampling_params import SamplingParams
from vllmlite.tokenizer import Tokenizer


@dataclass(slots=True)
class _Stream:
    """Where a request's outputs go: a queue of the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[RequestOutput | BaseException]


class AsyncLLM:
    """The engine for servers: :meth:`generate` from any number of tasks; the thread sleeps while there is no work."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model and start the engine's thread."""
        self._engine = LLMEngine(config)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._streams: dict[str, _Stream] = {}
        self._thread = threading.Thread(target=self._run, name="vllmlite-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> AsyncLLM:
        """vLLM's way to make one."""
        return cls(engine_args)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.get_tokenizer()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of a request as its ``output_kind`` says. Leaving the iteration early aborts the request.

        Raises :class:`ParameterError` if it can never be served, VllmliteError if a step failed."""
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        prepared = self._engine.encode(
            prompt
        )  # here, so that a long text does not hold up the engine's thread

        def add() -> None:
            try:
                self._engine.add_request(request_id, prepared, sampling_params, priority=priority)
            except Exception as error:
                _put(stream, error)
            else:
                self._streams[request_id] = stream

        self._post(add)
        done = False
        try:
            while not done:
                item = await stream.queue.get()
                if isinstance(item, BaseException):
                    done = True
                    raise item
                done = item.finished
                yield item
        finally:
            if not done:
                self._post(lambda: self._drop(request_id, stream))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream raises VllmliteError."""

        def abort() -> None:
            stream = self._streams.get(request_id)
            if stream is not None:
                self._drop(request_id, stream)
                _put(stream, VllmliteError(f"request {request_id} was aborted"))

        self._post(abort)

    async def stats(self) -> EngineStats:
        """The engine's counters."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EngineStats] = loop.create_future()

        def read() -> None:
            loop.call_soon_threadsafe(answer, replace(self._engine.stats()))

        def answer(stats: EngineStats) -> None:
            if not future.done():
                future.set_result(stats)

        self._post(read)
        return await future

    def shutdown(self) -> None:
        """Stop the thread after its current step; open streams raise VllmliteError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise VllmliteError("the engine has been shut down")
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        engine = self._engine
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._commands or self._closed or engine.has_unfinished_requests()
                )
                if self._closed:
                    break
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            for output in engine.step():
                self._publish(output)
        for stream in self._streams.values():
            _put(stream, VllmliteError("the engine has been shut down"))
        self._streams.clear()

    def _publish(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        error = self._engine.take_error(output.request_id)
        if output.finished:
            self._streams.pop(output.request_id, None)
        if stream is not None:
            _put(stream, output if error is None else VllmliteError(f"a step failed: {error}"))

    def _drop(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort_request(request_id)


def _put(stream: _Stream, item: RequestOutput | BaseException) -> None:
    try:
        stream.loop.call_soon_threadsafe(stream.queue.put_nowait, item)
    except RuntimeError:  # the caller's event loop is closed: nobody is left to tell
        return
