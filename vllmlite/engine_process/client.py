"""Client of an engine in another thread or process; sends pickled messages over a socket pair."""

from __future__ import annotations

import asyncio
import pickle
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.engine import Engine
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.request import Grammar, RequestOptions
from vllmlite.engine_process.host import EngineThread
from vllmlite.engine_process.wire import (
    LENGTH,
    Answer,
    EngineCall,
    HostHandle,
    StepOutputs,
    has_logprobs,
    pack,
)
from vllmlite.errors import EngineDeadError, ParameterError, VllmliteError
from vllmlite.guided.grammars import MAX_KEPT, Matcher
from vllmlite.lora.request import LoRARequest
from vllmlite.outputs import EngineStats, RequestMetrics
from vllmlite.sampling_params import SamplingParams

RECEIVED_BYTES = 1 << 16
"""Maximum number of bytes that are read from the socket at a time."""


@dataclass(slots=True)
class _RemoteRequest:
    """A request that the host has not finished."""

    request_id: str
    name: str
    """Id of the request at the host. No other request gets it, since the host may still send outputs of an earlier
    request with the same ``request_id``."""
    prompt_token_ids: list[int]
    metrics: RequestMetrics
    num_cached_tokens: int = 0


class EngineClient:
    """Client of an engine that a :class:`~vllmlite.engine_process.host.Host` runs and steps. Not thread-safe.

    :meth:`step` merges all outputs that have arrived, so a slow caller gets several tokens of a request at a time. It
    waits for the socket, unless an event loop watches that (:meth:`join_loop`)."""

    def __init__(self, handle: HostHandle, bounds: RequestBounds, stats: EngineStats) -> None:
        """Connect to a host that is ready. ``bounds`` are the engine's, ``stats`` its counters at the start."""
        self.handle = handle
        self.bounds = bounds
        self.stats = stats
        """Counters as the host last sent them."""
        self.failed_steps_in_a_row = 0
        """Number of steps that failed since the last one that succeeded."""
        self._connection = handle.connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._received, self._unsent = bytearray(), bytearray()
        self._requests: dict[str, _RemoteRequest] = {}
        """The unfinished requests by their ids."""
        self._named: dict[str, _RemoteRequest] = {}
        """The same requests by their names at the host."""
        self._num_added = 0
        self._questions: dict[int, asyncio.Future[Any]] = {}
        """Unanswered questions by their numbers."""
        self._num_questions = 0
        self._sent: OrderedDict[str, None] = OrderedDict()
        """Keys of grammars that the host keeps, the oldest first; it drops them in the same order."""
        self._inbox: deque[StepOutputs] = deque()
        self._end: EngineDeadError | None = None

    @property
    def engine(self) -> Engine:
        """The engine itself, which only its own thread may use. Raises AttributeError if it is in another process."""
        if not isinstance(self.handle, EngineThread):
            raise AttributeError("the engine is in a process of its own")
        return self.handle.engine

    def join_loop(self, loop: asyncio.AbstractEventLoop, on_arrival: Callable[[], object]) -> None:
        """Have ``loop`` watch the socket: it calls ``on_arrival`` when messages arrive, which must call
        :meth:`receive`, and it sends messages that could not be sent at once. Raises VllmliteError if the client
        belongs to another open loop."""
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise VllmliteError("the engine belongs to another event loop")
        self._loop = loop
        loop.add_reader(self._connection, on_arrival)
        if self._unsent:
            loop.call_soon(self._flush)

    def leave_loop(self) -> None:
        """Undo :meth:`join_loop`."""
        if self._loop is not None and not self._loop.is_closed() and self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
        self._loop = None

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> None:
        """Queue a request. Raises :class:`ParameterError`, and adds nothing, if it can never be served.

        A ``grammar`` is sent in compiled form, unless the host has it from an earlier request."""
        if request_id in self._requests:
            raise ParameterError("request_id", request_id, "is in use by a request that has not finished")
        prompt = self.bounds.check(
            prompt_token_ids,
            params,
            options.get("bad_words", ()),
            generates=options.get("pooling_type") is None,
        )
        arrival = options.get("arrival_time")
        if arrival is None:
            arrival = time.monotonic()
        sent = {**options, "arrival_time": arrival, "grammar": self._to_send(options.get("grammar"))}
        self._num_added += 1  # first: a name is never used again, even if this call is interrupted
        name = str(self._num_added)
        remote = _RemoteRequest(
            request_id, name, prompt, RequestMetrics(arrival, num_prompt_tokens=len(prompt))
        )
        self._named[name] = self._requests[request_id] = remote
        self._send(EngineCall("add_request", (name, prompt, params), sent))

    def finish(self, request_id: str, reason: str = "abort", stop_reason: int | str | None = None) -> bool:
        """End a request; its blocks are free before the engine's next step. Returns False if there is no such
        unfinished request."""
        remote = self._requests.pop(request_id, None)
        if remote is None:
            return False
        del self._named[remote.name]
        self._send(EngineCall("finish", (remote.name, reason, stop_reason)))
        return True

    def has_unfinished_requests(self) -> bool:
        """Return whether any request has not finished."""
        return bool(self._requests)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self._send(EngineCall("reset_prefix_cache"))

    def add_adapter(self, adapter: LoRARequest) -> None:
        """Have the host read an adapter. If it cannot, requests with the adapter end with an error."""
        self._send(EngineCall("add_adapter", (adapter,)))

    def remove_adapter(self, adapter: LoRARequest) -> None:
        """Have the host forget an adapter."""
        self._send(EngineCall("remove_adapter", (adapter,)))

    def expect_grammars(self) -> None:
        """Have the host import the modules that grammars need."""
        self._send(EngineCall("expect_grammars"))

    def current_stats(self) -> EngineStats:
        """Counters as the host last sent them."""
        return self.stats

    def ask(self, name: str, *args: object) -> asyncio.Future[Any]:
        """Call the engine's method ``name`` between two of its steps; the future gets the returned value."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._num_questions += 1
        self._send(EngineCall(name, args, question=self._num_questions))
        self._questions[self._num_questions] = answer
        return answer

    def step(self, outputs: list[EngineOutput] | None = None) -> list[EngineOutput]:
        """Wait for outputs; return those of all steps since the last call, merged by request. Appends them to
        ``outputs`` (default: a new list) and returns that list. Raises EngineDeadError if the host has ended."""
        if outputs is None:
            outputs = []
        while not self._inbox:
            self.check()
            self.receive(wait=True)
        merged: dict[str, EngineOutput] = {}
        while self._inbox and _can_merge(self._inbox[0], merged):
            self._merge_step(self._inbox.popleft(), merged)
        outputs.extend(merged.values())
        return outputs

    def has_outputs(self) -> bool:
        """Return whether :meth:`step` would return outputs without waiting."""
        return bool(self._inbox)

    def receive(self, wait: bool = False) -> None:
        """Read the messages that have come, after waiting for one if ``wait`` is set."""
        flags = 0 if wait else socket.MSG_DONTWAIT
        try:
            while self._end is None:
                data = self._connection.recv(RECEIVED_BYTES, flags)
                if not data:
                    self._notice_end()
                self._received += data
                if len(data) < RECEIVED_BYTES:
                    break
                flags = socket.MSG_DONTWAIT
        except BlockingIOError:
            pass
        except ConnectionError:
            self._notice_end()
        self._unpack()

    def check(self) -> None:
        """Raise EngineDeadError if the host has ended."""
        if self._end is not None:
            raise self._end

    def close(self) -> None:
        """End the host."""
        self.leave_loop()
        self._unsent.clear()
        self._connection.close()
        if self._end is None:
            self._notice_end()

    def _notice_end(self, reason: EngineDeadError | None = None) -> None:
        """Record that the host has ended, with the ``reason`` that it gave, if any."""
        self.leave_loop()
        how = self.handle.wait_for_end()
        self._end = reason or EngineDeadError(how)
        for question in self._questions.values():
            if not question.done():
                question.set_exception(self._end)
        self._questions.clear()

    def _to_send(self, grammar: Grammar | None) -> bytes | None:
        """Return the compiled grammar, or None if the host has it, because it is one of the last :data:`MAX_KEPT` that
        were sent."""
        if not isinstance(grammar, Matcher):
            return None
        compiled = grammar.compiled
        known = compiled.key in self._sent
        self._sent[compiled.key] = None
        self._sent.move_to_end(compiled.key)
        if len(self._sent) > MAX_KEPT:
            self._sent.popitem(last=False)
        return None if known else compiled.packed

    def _send(self, command: EngineCall) -> None:
        self.check()
        if self._loop is not None and self._loop.is_closed():
            self.leave_loop()
        packed = pack(command)
        # Calls by tasks of one turn of the loop are sent together, for each send wakes the host. The flush is
        # scheduled first, so that an interrupt in between leaves nothing unsent for ever.
        if self._loop is not None and not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += packed
        if self._loop is None:
            self._flush()

    def _flush(self) -> None:
        """Send queued messages. With an event loop, send only as much as is possible without waiting; the loop sends
        the rest."""
        loop = self._loop
        try:
            while self._unsent:
                flags = 0 if loop is None else socket.MSG_DONTWAIT
                del self._unsent[: self._connection.send(self._unsent, flags)]
        except BlockingIOError:
            assert loop is not None
            loop.add_writer(self._connection, self._flush)
            return
        except ConnectionError:
            self._unsent.clear()  # the host has ended: receive finds out
        if loop is not None:
            loop.remove_writer(self._connection)

    def _unpack(self) -> None:
        """Split the received bytes into messages, and handle these."""
        start, received = 0, self._received
        while len(received) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, start)
            end = start + LENGTH.size + length
            if len(received) < end:
                break
            message = pickle.loads(memoryview(received)[start + LENGTH.size : end])
            start = end
            if isinstance(message, EngineDeadError):
                self._notice_end(message)
            elif isinstance(message, Answer):
                question = self._questions.pop(message.question)
                if question.done():
                    continue
                if message.error is not None:
                    question.set_exception(message.error)
                else:
                    question.set_result(message.value)
            else:
                failed = message.stats.num_failed_steps - self.stats.num_failed_steps
                self.failed_steps_in_a_row = self.failed_steps_in_a_row + failed if failed else 0
                self.stats = message.stats
                self._inbox.append(message)
        del received[:start]

    def _merge_step(self, message: StepOutputs, merged: dict[str, EngineOutput]) -> None:
        """Add a step's outputs to ``merged``, whose keys are names at the host."""
        for name, token_id in zip(message.request_ids, message.token_ids, strict=True):
            remote = self._named.get(name)
            if remote is None:
                continue  # ended by finish, before the host knows
            remote.metrics.count_tokens(message.time, 1)
            earlier = merged.get(name)
            if earlier is None:
                merged[name] = EngineOutput(
                    remote.request_id, [token_id], None, None, remote.num_cached_tokens, remote.metrics
                )
            else:
                earlier.new_token_ids.append(token_id)
        for output in message.outputs:
            name = output.request_id
            remote = self._named.get(name)
            if remote is None:
                continue
            output.request_id = remote.request_id
            remote.metrics, remote.num_cached_tokens = output.metrics, output.num_cached_tokens
            earlier = merged.get(name)
            if earlier is not None:
                output.new_token_ids[:0] = earlier.new_token_ids
            merged[name] = output
            if output.finish_reason is not None:
                del self._requests[remote.request_id], self._named[name]


def _can_merge(message: StepOutputs, merged: dict[str, EngineOutput]) -> bool:
    """Return whether a step's outputs can be added to ``merged``. An output can have the log-probabilities of only one
    step."""
    return not any(
        has_logprobs(output) or has_logprobs(merged[output.request_id])
        for output in message.outputs
        if output.request_id in merged
    )
