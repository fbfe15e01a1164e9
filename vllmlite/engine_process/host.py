"""The engine at the far end of a socket pair: in a process of its own, or in a thread.

Pickled values go both ways, each after its length: commands, and what each step gave. The client
(:class:`~vllmlite.engine_process.client.EngineClient`) has the text side, the host (:class:`Host`) has the model. Both
trust each other as parts of one program do. The host ends when its client does, however that happens.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.engine import Engine, EngineOutput
from vllmlite.errors import BackendError, ParameterError, VllmliteError
from vllmlite.guided.grammars import Grammars
from vllmlite.outputs import EngineStats, RequestMetrics
from vllmlite.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllmlite.runner.startup import Started

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 10.0
"""What a host gets to end by itself once nobody asks it any more."""
GARBAGE_THRESHOLDS = (10_000, 20, 10)
"""Of :func:`gc.set_threshold`: some fifty requests more than ended make it look at them."""
LENGTH = struct.Struct("!Q")
"""What stands before each message: its bytes."""
PROGRAM = "from vllmlite.engine_process.host import main; main()"


@dataclass(frozen=True, slots=True)
class Ready:
    """A process' first message: its engine runs."""

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
class Command:
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


def pack(message: object) -> bytes:
    """``message`` as it goes over the socket."""
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(content)) + content


def unpack(stream: BinaryIO) -> Any:
    """The next message, once it is there. Raises EOFError after the last."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError  # who wrote it was killed
    return pickle.loads(content)


class Place(Protocol):
    """Where a host runs."""

    connection: socket.socket
    """The client's end."""

    def wait_for_end(self) -> str:
        """Wait for the host to end, which it does by itself once the connection is closed; says how it did."""
        ...


class EngineProcess:
    """A process with an engine."""

    def __init__(self, config: EngineConfig) -> None:
        """Start a process that loads ``config``'s model. :meth:`wait_until_ready` before anything is asked."""
        self.connection, theirs = socket.socketpair()
        paths = [path or os.getcwd() for path in sys.path]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                process_group=0,  # what a terminal sends is for its user's side, which ends this one in order
            )
        with suppress(BrokenPipeError):  # it has ended: who waits is told how
            self.connection.sendall(pack((config, logging.getLogger("vllmlite").getEffectiveLevel())))

    def wait_until_ready(self) -> Ready:
        """Until the engine runs. Raises what its start raised, BackendError if the process ended."""
        try:
            with self.connection.makefile("rb") as stream:
                message = unpack(stream)
        except (EOFError, ConnectionError):
            raise BackendError(self.wait_for_end()) from None
        if isinstance(message, VllmliteError):
            self.close()
            raise message
        assert isinstance(message, Ready)
        return message

    def close(self) -> None:
        """End it."""
        self.connection.close()
        self.wait_for_end()

    def wait_for_end(self) -> str:
        """See :class:`Place`."""
        try:
            status = self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the engine's process {how}"


class EngineThread:
    """A thread that runs an engine of this process."""

    def __init__(self, started: Started[Engine]) -> None:
        """Start it."""
        self.engine = started.engine
        self.connection, theirs = socket.socketpair()
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(theirs, started), name="vllmlite-engine", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:
            self.connection.close()
            theirs.close()
            raise BackendError(f"the engine's thread: {error}: raise the limit of processes") from error
        # Python would end the thread amid a step when the program ends, which native code answers with an abort.
        weakref.finalize(self, _end, self.connection, self._thread)

    def wait_for_end(self) -> str:
        """See :class:`Place`."""
        self._thread.join(CLOSING_SECONDS)
        error = self._error
        return "the engine's thread has ended" + (f": {type(error).__name__}: {error}" if error else "")

    def _run(self, connection: socket.socket, started: Started[Engine]) -> None:
        try:
            Host(connection, started).run()
        except BaseException as error:
            logger.exception("the engine's thread ends")
            self._error = error


def _end(connection: socket.socket, thread: threading.Thread) -> None:
    """Have a host's thread end, if it has not, and wait for that."""
    connection.close()
    thread.join(CLOSING_SECONDS)


def main() -> None:
    """The process: load the model that the first message configures, then serve commands until nobody asks."""
    # A service manager tells every process of a service to stop: this one stops when its user's side has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    with connection.makefile("rb") as stream:
        config, log_level = unpack(stream)
    logging.basicConfig(format="%(levelname)s:     engine: %(message)s")
    logging.getLogger("vllmlite").setLevel(log_level)

    from vllmlite.runner.startup import start

    try:
        started = start(config)
    except VllmliteError as error:
        connection.sendall(pack(error))
        return
    settle_garbage()
    ready = Ready(
        started.engine.bounds,
        started.max_model_len,
        started.hidden_size,
        started.default_sampling_params,
        started.backend_choice,
        started.engine.stats,
    )
    with suppress(BrokenPipeError):  # nobody waits any more
        connection.sendall(pack(ready))
        Host(connection, started).run()


def settle_garbage() -> None:
    """Take what a program's start has made out of the garbage collector's sight, and have it look at the rest seldom:
    to go over the objects of 256 streams takes tens of milliseconds, in which nothing else moves, and finds next to
    nothing, since what serves a request leaves no cycles but a few a connection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


class Host:
    """The engine's side. One thread takes in commands, one sends, and the caller's steps, waiting for neither."""

    def __init__(self, connection: socket.socket, started: Started[Engine]) -> None:
        """Serve ``started`` over ``connection``, which is closed at the end."""
        self._connection = connection
        self._engine = started.engine
        self._tokenizer = started.tokenizer
        self._commands: deque[Command | EngineOutput] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._preparing: SimpleQueue[Command | None] = SimpleQueue()
        """Requests whose grammars are still to be compiled."""
        self._behind: dict[str, list[Command]] = {}
        """Of each of them, the commands about it that have come meanwhile. Guarded by ``_wake``."""
        self._messages: SimpleQueue[Given | Answer | None] = SimpleQueue()
        self._introduced: set[str] = set()
        """Requests of which the other side has seen an output whole."""

    def run(self) -> None:
        """Until the other side is gone."""
        sender = threading.Thread(target=self._send, name="vllmlite-outputs", daemon=True)
        try:
            sender.start()
            threading.Thread(target=self._prepare, name="vllmlite-grammars", daemon=True).start()
            threading.Thread(target=self._receive, name="vllmlite-commands", daemon=True).start()
            while self._turn():
                pass
        finally:
            self._preparing.put(None)
            self._messages.put(None)
            if sender.ident is not None:  # it has been started
                sender.join(CLOSING_SECONDS)
            with suppress(OSError):  # the other end may be gone already
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()

    def _turn(self) -> bool:
        """Wait for work, do the commands, run a step; False once the other side is gone."""
        engine = self._engine
        with self._wake:
            self._wake.wait_for(lambda: self._commands or self._closed or engine.has_unfinished_requests())
            if self._closed:
                return False
            commands, self._commands = self._commands, deque()
        outputs = [output for command in commands if (output := self._do(command)) is not None]
        if engine.has_unfinished_requests():
            outputs += engine.step()
        self._tell(outputs)
        return True

    def _receive(self) -> None:
        try:
            with self._connection.makefile("rb") as stream, suppress(EOFError, OSError):
                while True:
                    self._take(unpack(stream))
        finally:  # nobody listens any more, be it for an error here
            with self._wake:
                self._closed = True
                self._wake.notify()

    def _send(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._connection.sendall(pack(message))
        except OSError:
            return  # nobody is left to tell: the thread that receives finds out too

    def _take(self, command: Command) -> None:
        """Queue a command for the engine, after those about the same request."""
        if command.name == "expect_grammars":
            threading.Thread(target=_import_xgrammar, name="vllmlite-import").start()
        waits = command.name == "add_request" and command.args[2].structured_outputs is not None
        with self._wake:
            behind = self._behind.get(command.args[0]) if command.args else None
            if behind is not None:
                behind.append(command)
            elif waits:
                self._behind[command.args[0]] = []
                self._preparing.put(command)
            else:
                self._commands.append(command)
                self._wake.notify()

    def _prepare(self) -> None:
        """Make the grammars of requests, in their order, while the engine steps and other commands come."""
        while (command := self._preparing.get()) is not None:
            ready = self._with_grammar(command)
            with self._wake:
                self._commands += [ready, *self._behind.pop(command.args[0])]
                self._wake.notify()

    def _with_grammar(self, command: Command) -> Command | EngineOutput:
        """Return a request with its grammar; or its end, if there is none."""
        request_id, _, params = command.args
        packed, structure = command.options["grammar"], params.structured_outputs
        try:
            if packed is not None:
                self._grammars.load(structure, packed)
            compiled = self._grammars.compile(structure)
            command.options["grammar"] = self._grammars.start(compiled, structure.after)
        except Exception as error:  # of xgrammar too, which is another's
            if not isinstance(error, ParameterError):
                logger.exception("a grammar cannot be used; its request ends with an error")
            metrics = RequestMetrics(command.options["arrival_time"])
            return EngineOutput(request_id, [], "error", None, 0, metrics, error=str(error))
        return command

    def _do(self, command: Command | EngineOutput) -> EngineOutput | None:
        if isinstance(command, EngineOutput):
            return command
        if command.name == "finish":
            self._introduced.discard(command.args[0])
        value = getattr(self._engine, command.name)(*command.args, **command.options)
        if command.answered:
            self._messages.put(Answer(value))
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
            message.outputs.append(replace(output, metrics=replace(output.metrics)))
            if output.finish_reason is None:
                self._introduced.add(request_id)
            else:
                self._introduced.discard(request_id)
        self._messages.put(message)


def _import_xgrammar() -> None:
    """So that the first grammar does not wait for it; who needs it finds out if that is in vain."""
    with suppress(ImportError):
        import xgrammar  # noqa: F401


def says_more(output: EngineOutput) -> bool:
    """Whether there is more to an output than tokens and perhaps an end."""
    return output.logprobs is not None or output.prompt_logprobs is not None


def _is_a_token(output: EngineOutput) -> bool:
    """Whether a token is all there is to tell."""
    return len(output.new_token_ids) == 1 and output.finish_reason is None and not says_more(output)
