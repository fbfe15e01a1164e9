"""The processes of the ranks on this host: starts them, watches that all of them run, and ends them."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from vllmlite.backends.native import load_extension
from vllmlite.engine_process.wire import pack, unpack
from vllmlite.errors import BackendError, EngineDeadError, VllmliteError
from vllmlite.ranks.messages import LOAD_SECONDS, Failed, Phase, Ready, Setup
from vllmlite.ranks.progress import Progress
from vllmlite.runner.build import WAITING
from vllmlite.subprogram import ending, start_python

PROGRAM = "from vllmlite.ranks.worker import main; main()"
START_SECONDS = 8.0
"""Maximum seconds without progress of a rank's process before it has shown that it runs."""
STALLED_SECONDS = 60.0
"""Maximum seconds without progress of a rank that is loading its part of the model."""
SILENT_SECONDS = 3.5
"""Seconds without a sign of life after which a rank counts as stopped. A thread of each rank gives one every half
second."""
WATCH_SECONDS = 0.25
"""Interval in seconds at which signs of life are checked. The end of a process is noticed at once."""
AGREE_SECONDS = 2.0
"""Maximum seconds between the failures of one step on two ranks."""
NOT_STARTED = "starting"


class RankGroup:
    """The processes of ``world`` ranks, a thread that watches them, and the shared memory to which all have access.

    Once a rank has ended or stopped, all are killed, and :attr:`end` says why. The memory has no name, so nothing of it
    is left when the processes are gone; the ranks end when this process does."""

    def __init__(self, setups: Sequence[Setup], places: Sequence[int] = ()) -> None:
        """Start a process for each of ``setups``. ``places`` are descriptors of memory, one for each rank, which it
        shares with this process. Call :meth:`wait_until_ready` before anything else."""
        native = load_extension("_cpu")
        world = len(setups)
        self.host = socket.gethostname()
        self.end: EngineDeadError | None = None
        self._changed = threading.Condition()
        """Guards the attributes below; it is notified of ready ranks, failures and the end."""
        self._phases = [NOT_STARTED] * world
        self._progress: list[Progress] = []
        self._ready: list[Ready | None] = [None] * world
        self._failures: defaultdict[int, dict[int, str]] = defaultdict(dict)
        """Step → the ranks on which it failed, each with the error's text."""
        self._first_failure = 0.0
        """Time at which the last failed step first failed on a rank."""
        self._listeners: list[Callable[[], object]] = []
        self._error: VllmliteError | None = None
        """The error with which a rank failed to start, if any."""
        self._ending = False
        self.processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        memory = os.memfd_create("vllmlite-ranks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, native.Ranks.memory_size(world))
            fcntl.fcntl(
                memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self.ranks: Any = native.Ranks(memory, -1, world)
            for rank, setup in enumerate(setups):
                ours, theirs = socket.socketpair()
                with theirs:
                    descriptors = [theirs.fileno(), memory, *places[rank : rank + 1]]
                    self.processes.append(start_python(PROGRAM, descriptors, rank, world))
                self._progress.append(Progress(self.processes[-1].pid))
                self._sockets.append(ours)
                with suppress(OSError):  # it has ended: the watching thread says how
                    ours.sendall(pack(setup))
        except BaseException:
            self._kill()
            raise
        finally:
            os.close(memory)
        self._thread = threading.Thread(
            target=_watch, args=(weakref.ref(self),), name="vllmlite-ranks", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _kill, self.processes, self._sockets, self.ranks)

    def wait_until_ready(self) -> list[Ready]:
        """Wait until all ranks have built their runners. Raises the error with which a rank failed, or BackendError if
        one ended."""
        with self._changed:
            self._changed.wait_for(lambda: self.end is not None or None not in self._ready)
            if self.end is None:
                return [ready for ready in self._ready if ready is not None]
        raise self._error or BackendError(str(self.end))

    def check(self) -> None:
        """Raise EngineDeadError if a rank has ended; in that case wait until all have."""
        if self.ranks.aborted:
            with self._changed:
                self._changed.wait_for(lambda: self.end is not None)
        if self.end is not None:
            raise EngineDeadError(str(self.end))

    def on_end(self, listener: Callable[[], object]) -> None:
        """Have the watching thread call ``listener`` once a rank has ended."""
        self._listeners.append(listener)

    def agree_on_failure(self, step: int) -> None:
        """Wait until ``step`` has failed on all ranks. Raises EngineDeadError if it does not fail on all of them."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.end is not None or len(self._failures[step]) == len(self.processes)
            )
            self._failures.pop(step, None)
        self.check()

    def close(self) -> None:
        """End all processes."""
        self._stop("the engine has been shut down")
        self._thread.join()

    def _stop(self, reason: str, error: VllmliteError | None = None) -> None:
        """Kill all ranks, and keep ``reason`` and ``error`` for later calls; does nothing if they have been killed."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
        self._kill()
        with self._changed:
            self.end, self._error = EngineDeadError(reason), error
            self._changed.notify_all()
        for listener in self._listeners:
            listener()

    def _kill(self) -> None:
        _kill(self.processes, self._sockets, getattr(self, "ranks", None))

    def watch_once(self, begun: float) -> bool:
        """Wait a little, handle the messages of the ranks, and check that they run. Returns False once the group has
        ended."""
        poll = select.poll()
        by_descriptor = {}
        for rank, connection in enumerate(self._sockets):
            descriptor = connection.fileno()  # read once: another thread may close the connection
            if descriptor >= 0:
                by_descriptor[descriptor] = rank
                poll.register(descriptor, select.POLLIN)
        events = poll.poll(WATCH_SECONDS * 1000)
        for descriptor, _ in events:
            self._listen(by_descriptor[descriptor])
            if self.end is not None:
                return False
        self._check_signs_of_life(time.monotonic() - begun)
        return self.end is None

    def _listen(self, rank: int) -> None:
        """Receive a message of a rank, or notice that its connection has ended."""
        try:
            with self._sockets[rank].makefile("rb", buffering=0) as stream:
                message = unpack(stream)  # type: ignore[arg-type]
        except (EOFError, OSError):
            self._stop(self._how_it_ended(rank))
            return
        with self._changed:
            if isinstance(message, Phase):
                self._phases[rank] = message.name
            elif isinstance(message, Ready):
                self._phases[rank], self._ready[rank] = "ready", message
            elif isinstance(message, Failed):
                if not self._failures:
                    self._first_failure = time.monotonic()
                self._failures[message.step][rank] = message.error
            self._changed.notify_all()
        if isinstance(message, VllmliteError):
            self._stop(f"{self._named(rank)}: {message}", message)

    def _how_it_ended(self, rank: int) -> str:
        process = self.processes[rank]
        try:
            how = ending(process.wait(1.0))
        except subprocess.TimeoutExpired:
            how = "has closed its connection"
        return f"{self._named(rank)} {how}; its last message: {self._phases[rank]}"

    def _named(self, rank: int) -> str:
        return f"rank {rank} of {len(self.processes)} (process {self.processes[rank].pid} on {self.host})"

    def _check_signs_of_life(self, seconds: float) -> None:
        """Kill all ranks if one is silent, takes too long to start, or is the only one on which a step failed."""
        for rank in range(len(self.processes)):
            silence, last = self.ranks.silence(rank), f"; its last message: {self._phases[rank]}"
            if silence > SILENT_SECONDS:
                self._stop(f"{self._named(rank)} has not shown for {silence:.1f} s that it runs{last}")
        starting = [rank for rank, ready in enumerate(self._ready) if ready is None]
        if starting:
            self._check_progress(starting, seconds)
        late = self.ranks.late
        if late >= 0:
            self._stop(f"{self._named(late)} runs, but the others have waited too long for it in a step")
        if self._failures and time.monotonic() - self._first_failure > AGREE_SECONDS:
            (step, failed), *_ = self._failures.items()
            if len(failed) < len(self.processes):
                rank, error = next(iter(failed.items()))
                self._stop(f"{self._named(rank)} failed at step {step}, and others did not: {error}")

    def _check_progress(self, starting: Sequence[int], seconds: float) -> None:
        """Stop all ranks if one of those that are ``starting`` shows nothing, if they all do nothing, or if they take
        too long. A rank may do nothing while it waits for another one that makes progress."""
        busy = {}
        for rank in starting:
            idle, phase = self._progress[rank].idle_seconds(self._phases[rank]), self._phases[rank]
            if phase == NOT_STARTED and idle > START_SECONDS:
                self._stop(f"{self._named(rank)} has not started: it has done nothing for {idle:.0f} s")
            if phase != WAITING:
                busy[rank] = idle
        rank = next(iter(busy), starting[0])
        what = f"{self._named(rank)} has not loaded the model; its last message: {self._phases[rank]}"
        if busy and min(busy.values()) > STALLED_SECONDS:
            self._stop(f"{what}; it has neither computed nor read for {busy[rank]:.0f} s")
        elif seconds > LOAD_SECONDS:
            self._stop(f"{what}; that has taken longer than {LOAD_SECONDS:.0f} s")


def _watch(reference: weakref.ref[RankGroup]) -> None:
    """Watch a group until it has ended or no longer exists."""
    begun = time.monotonic()
    while True:
        group = reference()
        if group is None or not group.watch_once(begun):
            return
        del group


def _kill(processes: Sequence[subprocess.Popen[bytes]], sockets: Sequence[socket.socket], ranks: Any) -> None:
    """Kill the ranks' processes, and abort everything that waits for them."""
    for process in processes:
        process.kill()
    if ranks is not None:
        ranks.abort()
    for process in processes:
        process.wait()
    for connection in sockets:
        connection.close()
