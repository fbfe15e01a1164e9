"""Host of an engine in another thread or process: it steps the engine and serves a client over a socket pair.

The client (:class:`~vllmlite.engine_process.client.EngineClient`) has the text side, the host (:class:`Host`) has the
model. They trust each other as parts of one program do. The host ends when its client ends, however that happens.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.engine import Engine
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine_process.wire import Answer, EngineCall, StepOutputs, has_logprobs, pack, unpack
from vllmlite.errors import BackendError, EngineDeadError, VllmliteError
from vllmlite.guided.compiler import PARALLEL
from vllmlite.guided.grammars import Grammars
from vllmlite.outputs import EngineStats, RequestMetrics
from vllmlite.subprogram import ending, start_python

if TYPE_CHECKING:
    from vllmlite.runner.startup import Started

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 10.0
"""Maximum seconds for a host to end by itself after its client has closed the connection."""
GARBAGE_THRESHOLDS = (10_000, 20, 10)
"""Arguments of :func:`gc.set_threshold`. 10,000 new objects are created when about fifty more requests have begun than
ended."""
SWITCH_SECONDS = 0.0001
"""Interval of switches between the engine's thread and others in Python; the default of 5 ms is a whole step."""
CLIENT_POLL_MS = 500
"""Timeout of the poll that watches, while a model loads, whether the client has ended."""
PROGRAM = "from vllmlite.engine_process.host import main; main()"


ReadyMessage: TypeAlias = "tuple[RequestBounds, EngineStats, Started[None]]"
"""First message of a host's process, sent once its engine runs."""


class EngineProcess:
    """A process that hosts an engine, as its client sees it."""

    def __init__(self, config: EngineConfig, replica: int = 0) -> None:
        """Start a process that loads the model of ``config``, as replica number ``replica``. Call
        :meth:`wait_until_ready` before anything else."""
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = start_python(PROGRAM, [theirs.fileno()])
        with suppress(BrokenPipeError):  # it has ended: wait_until_ready says how
            self.connection.sendall(
                pack((config, replica, logging.getLogger("vllmlite").getEffectiveLevel()))
            )

    def wait_until_ready(self) -> ReadyMessage:
        """Wait until the engine runs. Raises the error with which its start failed, or BackendError if the process
        ended."""
        try:
            with self.connection.makefile("rb") as stream:
                message = unpack(stream)
        except (EOFError, ConnectionError):
            raise BackendError(self.wait_for_end()) from None
        if isinstance(message, VllmliteError):
            self.close()
            raise message
        ready: ReadyMessage = message
        return ready

    def close(self) -> None:
        """Close the connection, whereupon the process ends, and wait for that."""
        self.connection.close()
        self.wait_for_end()

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.close()

    def wait_for_end(self) -> str:
        """Wait for the host to end, which it does once the connection is closed. Returns a description of how it
        ended."""
        try:
            status = self.process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        return f"the engine's process {ending(status)}"


class EngineThread:
    """A thread of this process that hosts an engine."""

    def __init__(self, started: Started[Engine]) -> None:
        """Start the thread."""
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
        """Wait for the host to end, which it does once the connection is closed. Returns a description of how it
        ended."""
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
    """Make a host's thread end, if it has not ended, and wait for that."""
    connection.close()
    thread.join(CLOSING_SECONDS)


def main() -> None:
    """Run the process: load the model that the first message configures, then serve calls until the client ends."""
    # A service manager signals every process of a service to stop; this one stops when the client has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    with connection.makefile("rb") as stream:
        config, replica, log_level = unpack(stream)
    logging.basicConfig(format="%(levelname)s:     engine: %(message)s")
    logging.getLogger("vllmlite").setLevel(log_level)

    from vllmlite.runner.startup import start

    if config.enable_lora:  # adapters are read while the engine steps
        sys.setswitchinterval(SWITCH_SECONDS)
    loaded = threading.Event()
    threading.Thread(target=_exit_without_client, args=(connection, loaded), daemon=True).start()
    try:
        started = start(config, replica)
    except VllmliteError as error:
        connection.sendall(pack(error))
        return
    finally:
        loaded.set()
    settle_garbage()
    engine = started.engine
    ready: ReadyMessage = engine.bounds, engine.stats, started.with_engine(None, None)
    try:
        with suppress(BrokenPipeError):  # the client has ended
            connection.sendall(pack(ready))
            Host(connection, started).run()
    except EngineDeadError:
        sys.exit(1)  # the client has the message
    finally:
        if started.ranks is not None:
            started.ranks.close()


def _exit_without_client(connection: socket.socket, loaded: threading.Event) -> None:
    """Exit the process if the client closes the ``connection`` or ends before the model is ``loaded``."""
    poll = select.poll()
    poll.register(connection, 0)  # reports a connection that the client has closed, and no data
    while not loaded.is_set():
        if poll.poll(CLIENT_POLL_MS) and not loaded.is_set():
            os._exit(1)


def settle_garbage() -> None:
    """Exempt the objects made so far from garbage collection, and collect the others seldom.

    A collection with 256 streams takes tens of milliseconds, in which nothing else runs, and frees next to nothing:
    serving a request leaves no reference cycles but a few for each connection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)


class Host:
    """Serves one client. A thread receives calls, a thread sends outputs, and the caller's thread steps the engine
    without waiting for either."""

    def __init__(self, connection: socket.socket, started: Started[Engine]) -> None:
        """Serve ``started`` over ``connection``, which is closed at the end."""
        self._connection = connection
        self._engine = started.engine
        self._tokenizer = started.tokenizer
        self._calls: deque[EngineCall | EngineOutput] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._preparing: SimpleQueue[EngineCall | None] = SimpleQueue()
        """Calls whose grammars are still to be compiled, or whose adapters are still to be read."""
        self._held: dict[str, list[EngineCall]] = {}
        """Request that is being prepared → later calls about it, which wait until it is prepared. Guarded by
        ``_wake``."""
        self._messages: SimpleQueue[StepOutputs | Answer | EngineDeadError | None] = SimpleQueue()
        self._ranks = started.ranks
        self._introduced: set[str] = set()
        """Requests for which the client has received a complete output, including metrics."""

    def run(self) -> None:
        """Serve until the client ends."""
        sender = threading.Thread(target=self._send, name="vllmlite-outputs", daemon=True)
        try:
            sender.start()
            for _ in range(PARALLEL):
                threading.Thread(target=self._prepare, name="vllmlite-grammars", daemon=True).start()
            threading.Thread(target=self._receive, name="vllmlite-calls", daemon=True).start()
            if self._ranks is not None:
                self._ranks.on_end(self._notify)
            while self._serve_once():
                pass
        except EngineDeadError as error:
            self._messages.put(error)
            raise
        finally:
            if self._ranks is not None:
                self._ranks.close()
            for _ in range(PARALLEL):
                self._preparing.put(None)
            self._messages.put(None)
            if sender.ident is not None:  # it has been started
                sender.join(CLOSING_SECONDS)
            with suppress(OSError):  # the other end may be gone already
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()

    def _serve_once(self) -> bool:
        """Wait for work, execute received calls, and run a step. Returns False once the client has ended."""
        engine = self._engine
        ranks = self._ranks
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._calls
                    or self._closed
                    or engine.can_step()
                    or (ranks is not None and ranks.end is not None)
                )
            )
            if self._closed:
                return False
            calls, self._calls = self._calls, deque()
        if ranks is not None:
            ranks.check()
        outputs = [output for call in calls if (output := self._execute(call)) is not None]
        if engine.can_step():
            outputs += engine.step()
        self._send_outputs(outputs)
        return True

    def _notify(self) -> None:
        """Wake the engine's thread, to check again for calls and results that it waits for."""
        with self._wake:
            self._wake.notify()

    def _receive(self) -> None:
        try:
            with self._connection.makefile("rb") as stream, suppress(EOFError, OSError):
                while True:
                    self._queue(unpack(stream))
        finally:  # whether the client has ended or an error ended this thread
            with self._wake:
                self._closed = True
                self._wake.notify()

    def _send(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._connection.sendall(pack(message))
        except OSError:
            return  # the client has ended: the receiving thread finds out too

    def _queue(self, call: EngineCall) -> None:
        """Queue a call for the engine, after those about the same request."""
        if call.name == "expect_grammars":
            threading.Thread(target=_import_xgrammar, name="vllmlite-import").start()
            return
        with self._wake:
            held = self._held.get(call.args[0]) if call.args else None
            if held is not None:
                held.append(call)
            elif self._needs_preparation(call):
                if call.name == "add_request":
                    self._held[call.args[0]] = []
                self._preparing.put(call)
            else:
                self._calls.append(call)
                self._wake.notify()

    def _needs_preparation(self, call: EngineCall) -> bool:
        """Return whether a call has to wait for a grammar or for the files of an adapter."""
        if call.name == "add_adapter":
            return True
        if call.name != "add_request":
            return False
        adapter = call.options.get("adapter")
        return call.args[2].structured_outputs is not None or (
            adapter is not None and not self._engine.adapter_source().knows(adapter)
        )

    def _prepare(self) -> None:
        """Compile grammars and read adapters, while the engine steps and other calls come."""
        while (call := self._preparing.get()) is not None:
            if call.name == "add_adapter":
                self._answer(call)
                continue
            ready = self._prepared(call)
            with self._wake:
                self._calls += [ready, *self._held.pop(call.args[0])]
                self._wake.notify()

    def _prepared(self, call: EngineCall) -> EngineCall | EngineOutput:
        """Return the call ``add_request`` with its grammar compiled and its adapter read, or an output that ends the
        request with an error. Runs beside the engine's steps."""
        packed, structure = call.options["grammar"], call.args[2].structured_outputs
        try:
            if structure is not None:
                if packed is not None:
                    self._grammars.load(structure, packed)
                compiled = self._grammars.compile(structure)
                call.options["grammar"] = self._grammars.start(compiled, structure.after)
            if call.options.get("adapter") is not None:
                self._engine.adapter_source().identify(call.options["adapter"])
        except Exception as error:  # xgrammar's own, too
            if not isinstance(error, VllmliteError):
                logger.exception("a grammar or an adapter cannot be used; its request ends with an error")
            return _refusal(call, error)
        return call

    def _execute(self, call: EngineCall | EngineOutput) -> EngineOutput | None:
        if isinstance(call, EngineOutput):
            return call
        if call.name == "finish":
            self._introduced.discard(call.args[0])
        if call.question is not None:
            self._answer(call)
            return None
        try:
            getattr(self._engine, call.name)(*call.args, **call.options)
        except VllmliteError as error:
            if call.name != "add_request":
                raise
            return _refusal(call, error)  # its adapter has been removed, and can no longer be read
        return None

    def _answer(self, call: EngineCall) -> None:
        """Execute a call, and answer it with its value or its error if it has a question."""
        value, found = None, None
        try:
            value = getattr(self._engine, call.name)(*call.args, **call.options)
        except VllmliteError as error:
            found = error
        except Exception as error:
            logger.exception("a call of %s failed", call.name)
            found = VllmliteError(f"{type(error).__name__}: {error}")
        if call.question is not None:
            self._messages.put(Answer(call.question, value, found))

    @cached_property
    def _grammars(self) -> Grammars:
        assert self._tokenizer is not None
        bounds = self._engine.bounds
        return Grammars(self._tokenizer, bounds.vocab_size, sorted(bounds.eos_ids))

    def _send_outputs(self, outputs: list[EngineOutput]) -> None:
        message = StepOutputs(time.monotonic(), replace(self._engine.current_stats()))
        for output in outputs:
            request_id = output.request_id
            if request_id in self._introduced and _is_one_token(output):
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
    """Import xgrammar early, so that the first grammar does not wait for it; a failure is reported at its use."""
    with suppress(ImportError):
        import xgrammar  # noqa: F401


def _refusal(call: EngineCall, error: Exception) -> EngineOutput:
    """Return the only output of a request that ``error`` keeps from being added."""
    metrics = RequestMetrics(call.options["arrival_time"])
    return EngineOutput(call.args[0], [], "error", None, 0, metrics, error=str(error))


def _is_one_token(output: EngineOutput) -> bool:
    """Return whether an output is one token and nothing else."""
    return len(output.new_token_ids) == 1 and output.finish_reason is None and not has_logprobs(output)
