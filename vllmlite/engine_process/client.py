"""Who asks an engine elsewhere: an :class:`~vllmlite.engine.engine.EngineCore` at the near end of a socket pair."""

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
from vllmlite.engine.engine import Engine, EngineOutput, RequestOptions
from vllmlite.engine.request import Grammar
from vllmlite.engine_process.host import LENGTH, Answer, Command, EngineThread, Given, Place, pack, says_more
from vllmlite.errors import EngineDeadError, ParameterError, VllmliteError
from vllmlite.guided.grammars import MAX_KEPT, Matcher
from vllmlite.outputs import EngineStats, RequestMetrics
from vllmlite.sampling_params import SamplingParams

RECEIVED_BYTES = 1 << 16
"""Most that is read from the socket at once."""


@dataclass(slots=True)
class _Asked:
    """A request that the host is at."""

    request_id: str
    name: str
    """What the host calls it: of an id that is used again, it may still tell about the request that had it before."""
    prompt_token_ids: list[int]
    metrics: RequestMetrics
    num_cached_tokens: int = 0


class EngineClient:
    """Client of an engine that a :class:`~vllmlite.engine_process.host.Host` runs and steps. Not thread-safe.

    What has come by a :meth:`step` is taken in together: who falls behind finds several tokens a request. By itself
    it waits for the socket; an event loop that attends to it (:meth:`attend`) never has to."""

    def __init__(self, place: Place, bounds: RequestBounds, stats: EngineStats) -> None:
        """Ask the host at ``place``, which is ready."""
        self.place = place
        self.bounds = bounds
        self.stats = stats
        """Counters as the host last told them."""
        self._connection = place.connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._received, self._unsent = bytearray(), bytearray()
        self._requests: dict[str, _Asked] = {}
        """By their ids."""
        self._named: dict[str, _Asked] = {}
        """The same, by their names."""
        self._num_added = 0
        self._questions: deque[asyncio.Future[Any]] = deque()
        self._sent: OrderedDict[str, None] = OrderedDict()
        """Keys of grammars that the host has, the oldest first: it forgets them in the same order."""
        self._inbox: deque[Given] = deque()
        self._end: EngineDeadError | None = None

    @property
    def engine(self) -> Engine:
        """The engine itself, which belongs to its thread. AttributeError if it is in another process."""
        if not isinstance(self.place, EngineThread):
            raise AttributeError("the engine is in a process of its own")
        return self.place.engine

    def attend(self, loop: asyncio.AbstractEventLoop, on_arrival: Callable[[], object]) -> None:
        """Have ``loop`` send what cannot be sent at once, and call ``on_arrival``, who is to :meth:`receive`, whenever
        something has come. Raises VllmliteError if another one that is not closed attends."""
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise VllmliteError("the engine belongs to another event loop")
        self._loop = loop
        loop.add_reader(self._connection, on_arrival)
        if self._unsent:
            loop.call_soon(self._flush)

    def leave(self) -> None:
        """End what :meth:`attend` began."""
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
        """Queue a request. Raises :class:`ParameterError`, and takes nothing in, if it can never be served.

        Of a ``grammar`` the host gets what was compiled, where it does not have that from earlier."""
        if request_id in self._requests:
            raise ParameterError("request_id", request_id, "is in use by a request that has not finished")
        prompt = self.bounds.check(
            prompt_token_ids,
            params,
            options.get("bad_words", ()),
            generates=options.get("pooling_type") is None,
        )
        given = options.get("arrival_time")
        arrival = time.monotonic() if given is None else given
        sent = {**options, "arrival_time": arrival, "grammar": self._to_send(options.get("grammar"))}
        self._num_added += 1  # first: a name is never used again, even if this call is interrupted
        name = str(self._num_added)
        asked = _Asked(request_id, name, prompt, RequestMetrics(arrival, num_prompt_tokens=len(prompt)))
        self._named[name] = self._requests[request_id] = asked
        self._send(Command("add_request", (name, prompt, params), sent))

    def finish(self, request_id: str, reason: str = "abort", stop_reason: int | str | None = None) -> bool:
        """End a request from outside; its blocks are free before the engine's next step."""
        asked = self._requests.pop(request_id, None)
        if asked is None:
            return False
        del self._named[asked.name]
        self._send(Command("finish", (asked.name, reason, stop_reason)))
        return True

    def has_unfinished_requests(self) -> bool:
        """Whether anything more will come."""
        return bool(self._requests)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self._send(Command("reset_prefix_cache"))

    def expect_grammars(self) -> None:
        """Have the host import what it needs for them."""
        self._send(Command("expect_grammars"))

    def current_stats(self) -> EngineStats:
        """Counters as the host last told them."""
        return self.stats

    def ask(self, name: str, *args: object) -> asyncio.Future[Any]:
        """Have the engine's method ``name`` called between two of its steps; what it returns, later."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._send(Command(name, args, answered=True))
        self._questions.append(answer)
        return answer

    def step(self, outputs: list[EngineOutput] | None = None) -> list[EngineOutput]:
        """What the host's steps have given since the last call, after waiting for something; see :meth:`Engine.step`.

        Raises EngineDeadError if the host has ended."""
        if outputs is None:
            outputs = []
        while not self._inbox:
            self.check()
            self.receive(wait=True)
        given: dict[str, EngineOutput] = {}
        while self._inbox and _joins(self._inbox[0], given):
            self._take_in(self._inbox.popleft(), given)
        outputs.extend(given.values())
        return outputs

    def has_outputs(self) -> bool:
        """Whether :meth:`step` would give something without waiting."""
        return bool(self._inbox)

    def receive(self, wait: bool = False) -> None:
        """Take in what has come, after waiting for something if told to."""
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
        self.leave()
        self._unsent.clear()
        self._connection.close()
        if self._end is None:
            self._notice_end()

    def _notice_end(self) -> None:
        self.leave()
        self._end = EngineDeadError(self.place.wait_for_end())
        for question in self._questions:
            if not question.done():
                question.set_exception(self._end)
        self._questions.clear()

    def _to_send(self, grammar: Grammar | None) -> bytes | None:
        """The compiled grammar, unless it has been sent, as the last of :data:`MAX_KEPT` or one among them."""
        if not isinstance(grammar, Matcher):
            return None
        compiled = grammar.compiled
        known = compiled.key in self._sent
        self._sent[compiled.key] = None
        self._sent.move_to_end(compiled.key)
        if len(self._sent) > MAX_KEPT:
            self._sent.popitem(last=False)
        return None if known else compiled.packed

    def _send(self, command: Command) -> None:
        self.check()
        if self._loop is not None and self._loop.is_closed():
            self.leave()
        packed = pack(command)
        # Once for all that the loop's tasks ask now, for each send wakes the host; and before there is anything to
        # send, so that an interrupt in between leaves nothing unsent for ever.
        if self._loop is not None and not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += packed
        if self._loop is None:
            self._flush()

    def _flush(self) -> None:
        """Send what has not been sent: without waiting where an event loop attends, which sends the rest later."""
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
            self._unsent.clear()  # nobody takes it; who receives finds out
        if loop is not None:
            loop.remove_writer(self._connection)

    def _unpack(self) -> None:
        """Sort the whole messages out of what has come."""
        start, received = 0, self._received
        while len(received) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, start)
            end = start + LENGTH.size + length
            if len(received) < end:
                break
            message = pickle.loads(memoryview(received)[start + LENGTH.size : end])
            start = end
            if isinstance(message, Answer):
                question = self._questions.popleft()
                if not question.done():
                    question.set_result(message.value)
            else:
                self.stats = message.stats
                self._inbox.append(message)
        del received[:start]

    def _take_in(self, message: Given, given: dict[str, EngineOutput]) -> None:
        """Add a step to what is ``given``, by the host's names."""
        for name, token_id in zip(message.request_ids, message.token_ids, strict=True):
            asked = self._named.get(name)
            if asked is None:
                continue  # ended from here; the host does not know yet
            asked.metrics.count_token(message.time)
            earlier = given.get(name)
            if earlier is None:
                given[name] = EngineOutput(
                    asked.request_id, [token_id], None, None, asked.num_cached_tokens, asked.metrics
                )
            else:
                earlier.new_token_ids.append(token_id)
        for output in message.outputs:
            name = output.request_id
            asked = self._named.get(name)
            if asked is None:
                continue
            output.request_id = asked.request_id
            asked.metrics, asked.num_cached_tokens = output.metrics, output.num_cached_tokens
            earlier = given.get(name)
            if earlier is not None:
                output.new_token_ids[:0] = earlier.new_token_ids
            given[name] = output
            if output.finish_reason is not None:
                del self._requests[asked.request_id], self._named[name]


def _joins(message: Given, given: dict[str, EngineOutput]) -> bool:
    """Whether a message can be taken in together with what is ``given``: log-probabilities are of one token."""
    return not any(
        says_more(output) or says_more(given[output.request_id])
        for output in message.outputs
        if output.request_id in given
    )
