"""The ranks of an engine: starts the processes of this host's ranks, watches that all ranks run, and ends them."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from vllmlite.backends.native import load_extension
from vllmlite.engine_process.wire import pack, unpack
from vllmlite.errors import BackendError, EngineDeadError, ModelError, VllmliteError
from vllmlite.ranks.encoding import EncodingError
from vllmlite.ranks.ending import kill, leave
from vllmlite.ranks.handshake import Joined
from vllmlite.ranks.host_messages import ENCODING, End, Left, RankFailed, RankPhase, RankReady, RankRefused
from vllmlite.ranks.layout import Layout
from vllmlite.ranks.messages import LOAD_SECONDS, Failed, Phase, Ready, Setup
from vllmlite.ranks.progress import Progress
from vllmlite.ranks.roster import NOT_STARTED, Roster
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
SHUT_DOWN = "the engine has been shut down"


class RankGroup:
    """The processes of this host's ranks, the memory that they share, and the links to the nodes that run other ranks.

    Threads watch all ranks of the engine. Once one has ended or stopped on any host, all are killed, and :attr:`end`
    says why. The memory has no name, so nothing of it is left when the processes are gone; the ranks end when this
    process does."""

    def __init__(
        self,
        setups: Sequence[Setup],
        layout: Layout,
        joined: Sequence[Joined] = (),
        places: Sequence[int] = (),
    ) -> None:
        """Start a process for each of ``setups``; without any, this process is the node's only rank.
        ``joined`` are the connections to other nodes. ``places`` are descriptors of memory, one for each of ``setups``,
        which the rank shares with this process. Call :meth:`wait_until_ready` before anything else."""
        native = load_extension("_cpu")
        self.layout = layout
        self.end: EngineDeadError | None = None
        self.is_failure = False
        """Whether it ended because something went wrong."""
        self.is_computing = False
        """Whether this process, as a rank, is in the middle of a step."""
        self._roster = Roster(layout, {each.node: each.host for each in joined})
        self._changed = threading.Condition()
        """Guards the roster and the end; it is notified of ready ranks, failures and the end."""
        self._progress: dict[int, Progress] = {}
        """Rank → the progress of its process, which runs on this host."""
        self._listeners: list[Callable[[], object]] = []
        self._receiver: Callable[[Any], object] | None = None
        self._early: list[Any] = []
        """Messages for the receiver that have come before there was one."""
        self._error: VllmliteError | None = None
        """The error with which a rank failed to start, if any."""
        self._ending = False
        self.processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self.links: list[Any] = []
        first, world = layout.local.start, layout.world
        memory = os.memfd_create("vllmlite-ranks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, native.Ranks.memory_size(world))
            fcntl.fcntl(
                memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self.ranks: Any = native.Ranks(memory, -1, world, first, layout.per_node)
            self.own: Any = None
            """This process's handle as a rank: it is one, or writes what ranks elsewhere report."""
            for rank, setup in enumerate(setups, first):
                ours, theirs = socket.socketpair()
                with theirs:
                    descriptors = [theirs.fileno(), memory, *places[rank - first : rank - first + 1]]
                    self.processes.append(start_python(PROGRAM, descriptors, rank, world))
                self._roster.pids[rank] = self.processes[-1].pid
                self._progress[rank] = Progress(self.processes[-1].pid)
                self._sockets.append(ours)
                with suppress(OSError):  # it has ended: the watching thread says how
                    ours.sendall(pack(setup))
            if joined or not setups:
                self.own = native.Ranks(memory, first, world)
            if not setups:
                self.own.start_heartbeat(-1)
                self._roster.pids[first] = os.getpid()
            for each in joined:
                node = each.node if layout.is_hub else layout.node
                self.links.append(
                    native.Link(
                        self.ranks, each.connection.detach(), each.send_key, each.receive_key,
                        layout.ranks_of(node).start, layout.per_node, layout.stage, layout.is_hub,
                    )
                )  # fmt: skip
        except BaseException:
            self._kill()
            raise
        finally:
            os.close(memory)
        reference = weakref.ref(self)
        listeners = [
            threading.Thread(
                target=_listen_to, args=(reference, link, each.node), name="vllmlite-link", daemon=True
            )
            for link, each in zip(self.links, joined, strict=True)
        ]
        for thread in listeners:
            thread.start()
        self._thread = threading.Thread(target=_watch, args=(reference,), name="vllmlite-ranks", daemon=True)
        self._thread.start()
        self._farewell = ENCODING.encode(End(SHUT_DOWN, False) if setups else Left(first))
        self._finalizer = weakref.finalize(
            self, leave, self.processes, self._sockets, self.ranks, self.links, self._farewell, listeners
        )

    def wait_until_ready(self, ranks: Sequence[int] | None = None) -> list[Ready]:
        """Wait until ``ranks``, by default all, have built their runners. Raises the error with which a rank failed, or
        BackendError if one ended or its backend differs from the others'."""
        wanted = range(self.layout.world) if ranks is None else ranks
        roster = self._roster
        with self._changed:
            self._changed.wait_for(
                lambda: self.end is not None or all(roster.ready[rank] is not None for rank in wanted)
            )
            if self.end is None:
                found = [ready for rank in wanted if (ready := roster.ready[rank]) is not None]
                roster.check_equal(found)
                return found
        raise self._error or BackendError(str(self.end))

    def check(self) -> None:
        """Raise EngineDeadError if a rank has ended; in that case wait until all have."""
        if self._roster.left:
            raise EngineDeadError(f"the program of {self._roster.named(min(self._roster.left))} has ended")
        if self.ranks.aborted:
            self.wait_for_end()
        if self.end is not None:
            raise EngineDeadError(str(self.end))

    def wait_for_end(self) -> None:
        """Wait until all ranks have been ended."""
        with self._changed:
            self._changed.wait_for(lambda: self.end is not None)

    def on_end(self, listener: Callable[[], object]) -> None:
        """Call ``listener``, from another thread, once a rank has ended."""
        self._listeners.append(listener)

    def on_message(self, receiver: Callable[[Any], object]) -> None:
        """Call ``receiver``, from other threads, with each message of other nodes that is not about a rank's state."""
        with self._changed:
            self._receiver = receiver
            for message in self._early:
                receiver(message)

    def send(self, message: object) -> None:
        """Send a message of :mod:`vllmlite.ranks.host_messages` to all nodes to which this one has a link."""
        if self.links:
            content = ENCODING.encode(message)
            for link in self.links:
                link.send(content)

    def agree_on_failure(self, step: int) -> None:
        """Wait until ``step`` has failed on all ranks. Raises EngineDeadError if it does not fail on all of them."""
        with self._changed:
            self._changed.wait_for(lambda: self.end is not None or self._roster.has_failed_everywhere(step))
            self._roster.forget_failure(step)
        self.check()

    def close(self) -> None:
        """End all ranks; if this process is a rank that a launcher has started, end this rank only."""
        if not self.processes:
            for link in self.links:
                link.flush()
        self.stop(SHUT_DOWN, is_failure=False)
        self._thread.join()

    def stop(self, reason: str, error: VllmliteError | None = None, is_failure: bool = True) -> None:
        """Kill all ranks, tell the other nodes, and keep ``reason`` and ``error`` for later calls; does nothing if the
        ranks have been killed."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
        self._kill()
        with self._changed:
            self.end, self._error, self.is_failure = EngineDeadError(reason), error, is_failure
            self._changed.notify_all()
        for listener in self._listeners:
            listener()
        goodbye = ENCODING.encode(End(reason, True)) if is_failure else self._farewell
        for link in self.links:
            link.close(goodbye)

    def _kill(self) -> None:
        kill(self.processes, self._sockets, getattr(self, "ranks", None))

    def watch_once(self, begun: float) -> bool:
        """Wait a little, handle the messages of this host's ranks, and check that all run. Returns False once the group
        has ended."""
        poll = select.poll()
        by_descriptor = {}
        for index, connection in enumerate(self._sockets):
            descriptor = connection.fileno()  # read once: another thread may close the connection
            if descriptor >= 0:
                by_descriptor[descriptor] = index
                poll.register(descriptor, select.POLLIN)
        events = poll.poll(WATCH_SECONDS * 1000)
        for descriptor, _ in events:
            self._listen(by_descriptor[descriptor])
            if self.end is not None:
                return False
        self._check_signs_of_life(time.monotonic() - begun)
        return self.end is None

    def _listen(self, index: int) -> None:
        """Receive a message of a rank's process, or notice that its connection has ended."""
        rank = self.layout.local[index]
        try:
            with self._sockets[index].makefile("rb", buffering=0) as stream:
                message = unpack(stream)  # type: ignore[arg-type]
        except (EOFError, OSError):
            try:
                how = ending(self.processes[index].wait(1.0))
            except subprocess.TimeoutExpired:
                how = "has closed its connection"
            self.stop(f"{self._roster.named(rank)} {how}{self._roster.last_message(rank)}")
            return
        self.take(rank, message)

    def take(self, rank: int, message: Phase | Ready | Failed | VllmliteError) -> None:
        """Handle a message of a rank about its own state, and pass it on to node 0."""
        if not self.layout.is_hub and rank in self.layout.local:
            if isinstance(message, Phase):
                self.send(RankPhase(rank, message))
            elif isinstance(message, Ready):
                self.send(RankReady(rank, message))
            elif isinstance(message, Failed):
                self.send(RankFailed(rank, message))
            else:
                self.send(RankRefused(rank, type(message).__name__, str(message)))
        if isinstance(message, VllmliteError):
            self.stop(str(message), message)
            return
        with self._changed:
            self._roster.note(rank, message)
            self._changed.notify_all()

    def hear(self, node: int, content: bytes | None) -> bool:
        """Handle a message of another node, or the end of its link (None). Returns False once the group or the link has
        ended."""
        roster = self._roster
        ranks = self.layout.ranks_of(node)
        if content is None:
            link = self.links[node - 1 if self.layout.is_hub else 0]
            if not roster.left.issuperset(ranks):
                self.stop(f"{roster.named_node(node)} {link.end}{roster.last_message(ranks[0])}")
            link.close(b"")
            return False
        try:
            message = ENCODING.decode(content)
        except EncodingError as error:
            self.stop(f"{roster.named_node(node)}: {error}")
            return False
        if isinstance(message, End):
            self.stop(message.reason, is_failure=message.is_failure)
        elif not isinstance(message, RankPhase | RankReady | RankFailed | RankRefused | Left):
            with self._changed:
                receiver = self._receiver
                if receiver is None:
                    self._early.append(message)
            if receiver is not None:
                receiver(message)
        elif message.rank not in (ranks if self.layout.is_hub else range(self.layout.world)):
            self.stop(f"{roster.named_node(node)} has sent a message about rank {message.rank}")
        else:
            self._hear_of_rank(message)
        return self.end is None

    def _hear_of_rank(self, message: RankPhase | RankReady | RankFailed | RankRefused | Left) -> None:
        """Handle a message of another node about a rank's state."""
        if isinstance(message, RankPhase):
            self.take(message.rank, message.phase)
        elif isinstance(message, RankReady):
            self.take(message.rank, message.ready)
        elif isinstance(message, RankFailed):
            self.take(message.rank, message.failed)
        elif isinstance(message, RankRefused):
            kind = ModelError if message.error == "ModelError" else BackendError
            self.take(message.rank, kind(f"{self._roster.named(message.rank)}: {message.text}"))
        else:
            self._roster.left.add(message.rank)
            if self.layout.is_hub:
                self.send(message)

    def _check_signs_of_life(self, seconds: float) -> None:
        """Kill all ranks if one is silent, takes too long to start, or is the only one on which a step failed."""
        roster = self._roster
        for rank in range(self.layout.world):
            silence, last = self.ranks.silence(rank), roster.last_message(rank)
            if rank in roster.left:
                if self.is_computing and silence > SILENT_SECONDS:
                    self.stop(f"the program of {roster.named(rank)} has ended, in the middle of a step{last}")
                continue
            if silence > SILENT_SECONDS:
                self.stop(f"{roster.named(rank)} has not shown for {silence:.1f} s that it runs{last}")
        starting = [rank for rank in self._progress if roster.ready[rank] is None]
        if starting:
            self._check_progress(starting, seconds)
        late = self.ranks.late
        if late >= 0:
            self.stop(f"{roster.named(late)} runs, but the others have waited too long for it in a step")
        with self._changed:
            failure = roster.lone_failure()
        if failure:
            self.stop(failure)

    def _check_progress(self, starting: Sequence[int], seconds: float) -> None:
        """Kill all ranks if one of this host's that are ``starting`` shows nothing, if they all do nothing, or if they
        take too long. A rank may do nothing while it waits for another one that makes progress, maybe elsewhere."""
        roster = self._roster
        busy = {}
        for rank in starting:
            phase = roster.phases[rank]
            idle = self._progress[rank].idle_seconds(phase)
            if phase == NOT_STARTED and idle > START_SECONDS:
                self.stop(f"{roster.named(rank)} has not started: it has done nothing for {idle:.0f} s")
            if phase != WAITING:
                busy[rank] = idle
        rank = next(iter(busy), starting[0])
        what = f"{roster.named(rank)} has not loaded the model{roster.last_message(rank)}"
        if busy and min(busy.values()) > STALLED_SECONDS and self.layout.nodes == 1:
            self.stop(f"{what}; it has neither computed nor read for {busy[rank]:.0f} s")
        elif seconds > LOAD_SECONDS:
            self.stop(f"{what}; that has taken longer than {LOAD_SECONDS:.0f} s")


def _listen_to(reference: weakref.ref[RankGroup], link: Any, node: int) -> None:
    """Handle the messages of another node until its link has ended or the group no longer exists."""
    while True:
        content = link.receive()
        group = reference()
        if group is None or not group.hear(node, content):
            return
        del group


def _watch(reference: weakref.ref[RankGroup]) -> None:
    """Watch a group until it has ended or no longer exists."""
    begun = time.monotonic()
    while True:
        group = reference()
        if group is None or not group.watch_once(begun):
            return
        del group
