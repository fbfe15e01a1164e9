"""The engine in a process of its own, so that its steps never wait for the interpreter of those who read its output.

Two ends of a socket pair carry pickled values: commands one way, and the other way what each step gave. The process
that asks (:class:`EngineProcess`) has text, the one that is asked (:func:`main`) has the model; both trust each other
as parts of one program do. The other end ends when its partner does, however that happens.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Unpack

from vllmlite.config import EngineConfig
from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.engine import EngineOutput, RequestOptions
from vllmlite.engine.request import Grammar
from vllmlite.engine.trace import TraceEvent
from vllmlite.errors import BackendError, EngineDeadError, ParameterError, VllmliteError
from vllmlite.guided.grammars import MAX_KEPT, Grammars, Matcher
from vllmlite.outputs import EngineStats, RequestMetrics
from vllmlite.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllmlite.engine.engine import Engine
    from vllmlite.runner.startup import Started

CLOSING_SECONDS = 10.0
"""What the process gets to end by itself once nobody asks it any more."""
PROGRAM = "from vllmlite.engine_process import main; main()"


@dataclass(frozen=True, slots=True)
class Ready:
    """The process' first message: its engine runs."""

    bounds: RequestBounds
    max_model_len: int
    hidden_size: int
    default_sampling_params: SamplingParams
    backend_choice: str
    stats: EngineStats


@dataclass(slots=True)
class Given:
    """What a step gave: a token each to ``request_ids``, of which there is no more to say, and ``outputs``."""

    time: float
    """Of the step's end, by :func:`time.monotonic`, which is one clock for all processes."""
    stats: EngineStats
    request_ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    outputs: list[EngineOutput] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Command:
    """A call of a method of the engine."""

    name: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    answered: bool = False
    """Whether to send back what it returns."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command returned that was to be answered."""

    value: Any


@dataclass(slots=True)
class _Asked:
    """A request that the process is at."""

    prompt_token_ids: list[int]
    metrics: RequestMetrics
    num_cached_tokens: int = 0


class EngineProcess:
    """An :class:`~vllmlite.engine.engine.EngineCore` whose engine is elsewhere. Not thread-safe, but for
    :meth:`current_stats`.

    A :meth:`step` takes in all that has come since the last one: who falls behind finds several tokens a request."""

    def __init__(self, config: EngineConfig) -> None:
        """Start a process that loads ``config``'s model. :meth:`wait` until it has."""
        ours, theirs = socket.socketpair()
        paths = [path or os.getcwd() for path in sys.path]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                process_group=0,  # what a terminal sends is for its user's side, which ends this one in order
            )
        self._connection = Connection(ours.detach())
        self._connection.send((config, logging.getLogger("vllmlite").getEffectiveLevel()))
        self._requests: dict[str, _Asked] = {}
        self._sent: OrderedDict[str, None] = OrderedDict()
        """Keys of grammars that the process has, the oldest first: it forgets them in the same order."""
        self._inbox: deque[Given | Answer] = deque()
        self._arrival = threading.Condition()
        self._latest = self.stats = EngineStats()
        self._ended = False
        self.on_end: Callable[[], object] | None = None
        """Called, in a thread of its own, when the process ends unasked."""

    def wait(self) -> Ready:
        """Until the engine runs. Raises what its start raised, BackendError if the process ended."""
        try:
            message = self._connection.recv()
        except EOFError:
            raise BackendError(self._end()) from None
        if isinstance(message, VllmliteError):
            self.close()
            raise message
        assert isinstance(message, Ready)
        self.bounds = message.bounds
        self._latest = self.stats = message.stats
        threading.Thread(target=self._receive, name="vllmlite-engine-output", daemon=True).start()
        return message

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> _Asked:
        """Queue a request. Raises :class:`ParameterError`, and takes nothing in, if it can never be served.

        Of a ``grammar`` the process gets what was compiled, where it does not have that from earlier."""
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
        self._send(_Command("add_request", (request_id, prompt, params), sent))
        asked = _Asked(prompt, RequestMetrics(arrival, num_prompt_tokens=len(prompt)))
        self._requests[request_id] = asked
        return asked

    def finish(self, request_id: str, reason: str = "abort", stop_reason: int | str | None = None) -> bool:
        """End a request from outside; its blocks are free before the engine's next step."""
        if self._requests.pop(request_id, None) is None:
            return False
        self._send(_Command("finish", (request_id, reason, stop_reason)))
        return True

    def has_unfinished_requests(self) -> bool:
        """Whether anything more will come."""
        return bool(self._requests)

    def step(self) -> list[EngineOutput]:
        """Wait for a step; what it and those after it gave, until now. Raises EngineDeadError if the process ended."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._inbox or self._ended)
            if not self._inbox:
                raise EngineDeadError(self._end())
            given: dict[str, EngineOutput] = {}
            while self._inbox and isinstance(message := self._inbox[0], Given) and _joins(message, given):
                self._inbox.popleft()
                self._take_in(message, given)
        return list(given.values())

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self._send(_Command("reset_prefix_cache"))

    def current_stats(self) -> EngineStats:
        """Counters as the process last told them; from any thread."""
        return self._latest

    def start_trace(self) -> None:
        """See :meth:`~vllmlite.engine.engine.Engine.start_trace`."""
        self._send(_Command("start_trace"))

    def stop_trace(self) -> list[TraceEvent]:
        """See :meth:`~vllmlite.engine.engine.Engine.stop_trace`."""
        self._send(_Command("stop_trace", answered=True))
        found: list[Answer] = []

        def answered() -> bool:
            found[:] = [message for message in self._inbox if isinstance(message, Answer)]
            return bool(found) or self._ended

        with self._arrival:
            self._arrival.wait_for(answered)
            if not found:
                raise EngineDeadError(self._end())
            self._inbox.remove(found[0])
        events: list[TraceEvent] = found[0].value
        return events

    def check(self) -> None:
        """Raise EngineDeadError if the process has ended."""
        if self._ended:
            raise EngineDeadError(self._end())

    def close(self) -> None:
        """End the process."""
        self.on_end = None
        if not self._connection.closed:
            # Not close() alone: a thread that is reading keeps the connection open.
            ours = socket.socket(fileno=os.dup(self._connection.fileno()))
            with ours, suppress(OSError):  # the other end may be gone already
                ours.shutdown(socket.SHUT_RDWR)
        self._end()

    def _end(self) -> str:
        """Wait for the process to end, which it does by itself; says how it did."""
        try:
            status = self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the engine's process {how}"

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

    def _send(self, command: _Command) -> None:
        try:
            self._connection.send(command)
        except OSError:
            raise EngineDeadError(self._end()) from None

    def _receive(self) -> None:
        """The thread that takes in messages, so that the engine never waits to tell them."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._arrival:
                if isinstance(message, Given):
                    self._latest = message.stats
                self._inbox.append(message)
                self._arrival.notify()
        with self._arrival:
            self._ended = True
            self._arrival.notify()
        on_end = self.on_end
        if on_end is not None:
            on_end()

    def _take_in(self, message: Given, given: dict[str, EngineOutput]) -> None:
        """Add a step to what is ``given``, by request."""
        self.stats = message.stats
        for request_id, token_id in zip(message.request_ids, message.token_ids, strict=True):
            asked = self._requests.get(request_id)
            if asked is None:
                continue  # ended from here; the process does not know yet
            asked.metrics.count_token(message.time)
            earlier = given.get(request_id)
            if earlier is None:
                given[request_id] = EngineOutput(
                    request_id, [token_id], None, None, asked.num_cached_tokens, asked.metrics
                )
            else:
                earlier.new_token_ids.append(token_id)
        for output in message.outputs:
            asked = self._requests.get(output.request_id)
            if asked is None:
                continue
            asked.metrics, asked.num_cached_tokens = output.metrics, output.num_cached_tokens
            earlier = given.get(output.request_id)
            if earlier is not None:
                output.new_token_ids[:0] = earlier.new_token_ids
            given[output.request_id] = output
            if output.finish_reason is not None:
                del self._requests[output.request_id]


def _joins(message: Given, given: dict[str, EngineOutput]) -> bool:
    """Whether a message can be taken in together with what is ``given``: log-probabilities are of one token."""
    return not any(
        _says_more(output) or _says_more(given[output.request_id])
        for output in message.outputs
        if output.request_id in given
    )


def _says_more(output: EngineOutput) -> bool:
    return output.logprobs is not None or output.prompt_logprobs is not None


def main() -> None:
    """The process: load the model that the first message configures, then serve commands until nobody asks."""
    # A service manager tells every process of a service to stop: this one stops when its user's side has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    config, log_level = connection.recv()
    logging.basicConfig(format="%(levelname)s:     engine: %(message)s")
    logging.getLogger("vllmlite").setLevel(log_level)

    from vllmlite.runner.startup import start

    try:
        started = start(config)
    except VllmliteError as error:
        connection.send(error)
        return
    settle_garbage()
    connection.send(
        Ready(
            started.engine.bounds,
            started.max_model_len,
            started.hidden_size,
            started.default_sampling_params,
            started.backend_choice,
            started.engine.stats,
        )
    )
    _Host(connection, started).run()


def settle_garbage() -> None:
    """Take what a program's start has made out of the garbage collector's sight: to go over all of it takes tens of
    milliseconds, and in the midst of service nothing else moves in that time."""
    gc.collect()
    gc.freeze()


class _Host:
    """The engine's side: a thread takes in commands, the main one steps."""

    def __init__(self, connection: Connection, started: Started[Engine]) -> None:
        self._connection = connection
        self._engine = started.engine
        self._tokenizer = started.tokenizer
        self._commands: deque[_Command | EngineOutput] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._introduced: set[str] = set()
        """Requests of which the other side has seen an output whole."""

    def run(self) -> None:
        """Until the other side is gone."""
        threading.Thread(target=self._receive, name="vllmlite-commands", daemon=True).start()
        engine = self._engine
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(
                        lambda: self._commands or self._closed or engine.has_unfinished_requests()
                    )
                    if self._closed:
                        return
                    commands, self._commands = self._commands, deque()
                outputs = [output for command in commands if (output := self._do(command)) is not None]
                if engine.has_unfinished_requests():
                    outputs += engine.step()
                self._tell(outputs)
        except BrokenPipeError:
            return  # nobody is left to tell

    def _receive(self) -> None:
        while True:
            try:
                command = self._with_grammar(self._connection.recv())
            except (EOFError, OSError):
                command = None
            with self._wake:
                if command is None:
                    self._closed = True
                else:
                    self._commands.append(command)
                self._wake.notify()
            if command is None:
                return

    def _with_grammar(self, command: _Command) -> _Command | EngineOutput:
        """A request with its grammar, made while the engine steps; or its end, if there is none."""
        if command.name != "add_request":
            return command
        request_id, _, params = command.args
        packed, structure = command.options["grammar"], params.structured_outputs
        if structure is None:
            return command
        try:
            if packed is not None:
                self._grammars.load(structure, packed)
            compiled = self._grammars.compile(structure)
            command.options["grammar"] = self._grammars.start(compiled, structure.after)
        except ParameterError as error:
            metrics = RequestMetrics(command.options["arrival_time"])
            return EngineOutput(request_id, [], "error", None, 0, metrics, error=str(error))
        return command

    def _do(self, command: _Command | EngineOutput) -> EngineOutput | None:
        if isinstance(command, EngineOutput):
            return command
        if command.name == "finish":
            self._introduced.discard(command.args[0])
        value = getattr(self._engine, command.name)(*command.args, **command.options)
        if command.answered:
            self._connection.send(Answer(value))
        return None

    @cached_property
    def _grammars(self) -> Grammars:
        assert self._tokenizer is not None
        bounds = self._engine.bounds
        return Grammars(self._tokenizer, bounds.vocab_size, sorted(bounds.eos_ids))

    def _tell(self, outputs: list[EngineOutput]) -> None:
        message = Given(time.monotonic(), replace(self._engine.current_stats()))
        for output in outputs:
            request_id = output.request_id
            if request_id in self._introduced and _is_a_token(output):
                message.request_ids.append(request_id)
                message.token_ids.append(output.new_token_ids[0])
                continue
            message.outputs.append(output)
            if output.finish_reason is None:
                self._introduced.add(request_id)
            else:
                self._introduced.discard(request_id)
        self._connection.send(message)


def _is_a_token(output: EngineOutput) -> bool:
    """Whether a token is all there is to tell."""
    return len(output.new_token_ids) == 1 and output.finish_reason is None and not _says_more(output)
