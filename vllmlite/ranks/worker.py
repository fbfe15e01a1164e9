"""The process of one rank: builds its part of the model, then runs the steps that the driver sends."""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from vllmlite.backends.native import load_extension
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.engine_process.wire import pack, unpack
from vllmlite.errors import BackendError, VllmliteError
from vllmlite.models.adapters import place_parts
from vllmlite.models.decoder import Decoder
from vllmlite.ranks.comm import connect
from vllmlite.ranks.messages import (
    LOAD_SECONDS,
    AdapterPart,
    BackendFacts,
    Command,
    Failed,
    ModelFacts,
    Phase,
    Ready,
    Reply,
    Setup,
)
from vllmlite.runner.build import BuiltRunner, build_runner
from vllmlite.runner.runner import ModelRunner
from vllmlite.weights.adapter import Adapter, LowRank

COLLECTIVE_SECONDS, COLLECTIVE_SECONDS_PER_TOKEN = 30.0, 0.05
"""Maximum seconds of a collective operation, which waits for the slowest rank: a constant, and an addition for each
token of the step."""


def main() -> None:
    """Run the process. Its arguments are the descriptors of the control socket, of the memory that all ranks share and,
    if the driver keeps blocks in files, of the memory of this rank's places; then the rank and the number of ranks."""
    with suppress(BrokenPipeError, ConnectionResetError, EOFError):  # the driver has ended
        _run()


def _run() -> None:
    # The driver, which gets a terminal's and a service manager's signals, ends the ranks in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control_fd, memory_fd, *places_fd, rank, world = map(int, sys.argv[1:])
    control = socket.socket(fileno=control_fd)
    ranks = load_extension("_cpu").Ranks(memory_fd, rank, world)
    ranks.start_heartbeat(control_fd)
    control.sendall(pack(Phase("reading the configuration")))
    with control.makefile("rb") as stream:
        setup: Setup = unpack(stream)
    if setup.cpus:
        with suppress(OSError):  # the container forbids it
            os.sched_setaffinity(0, setup.cpus)
    logging.basicConfig(format=f"%(levelname)s:     rank {rank}: %(message)s")
    logging.getLogger("vllmlite").setLevel(setup.log_level if rank == 0 else logging.ERROR)
    if rank and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _NoTerminal(sys.stderr.detach(), line_buffering=True)
    ranks.limit(LOAD_SECONDS)  # ranks that have loaded their weights wait for the others
    try:
        built = build_runner(
            setup.config,
            setup.plan,
            rank,
            world,
            lambda backend: connect(backend, ranks, setup.config.pipeline_parallel_size, setup.num_local),
            enter=lambda phase: control.sendall(pack(Phase(phase))),
        )
    except VllmliteError as error:
        control.sendall(pack(error))
        return
    if built.runner.host_blocks is not None and places_fd:
        built.runner.host_blocks.share(places_fd[0])
    control.sendall(pack(ready_with(built)))
    Steps(built.runner, ranks, control, rank == setup.config.reporting_rank).run()


def ready_with(built: BuiltRunner[ModelRunner]) -> Ready:
    """Return the message that a runner is built."""
    backend, model = built.runner.backend, built.runner.model
    return Ready(
        BackendFacts(
            backend.name,
            backend.device,
            backend.dtype,
            backend.asynchronous,
            backend.adapter_abilities,
            getattr(backend, "isa", ""),
        ),
        ModelFacts(model.vocab_size, model.kv_spec),
        built.num_blocks,
        built.max_model_len,
        built.backend_choice,
        built.step_times,
        built.draft_times,
        built.host,
    )


def seconds_for(schedule: Schedule) -> float:
    """Return the time in which a collective operation of a step must be done."""
    return COLLECTIVE_SECONDS + COLLECTIVE_SECONDS_PER_TOKEN * sum(schedule.counts)


class _NoTerminal(io.TextIOWrapper):
    """Standard error of a rank, which is not a terminal, so that only rank 0 shows progress."""

    def isatty(self) -> bool:
        return False


class Steps:
    """Runs the steps that the driver sends."""

    def __init__(self, runner: ModelRunner, ranks: Any, control: socket.socket, reports: bool) -> None:
        """Run steps on ``runner``. ``ranks`` is the shared memory, an object of the class ``Ranks`` of
        ``vllmlite._cpu``. ``reports``: this rank sends the results to the driver."""
        self._runner, self._ranks, self._control, self._reports = runner, ranks, control, reports
        self._launched: dict[int, Any] = {}
        """Step → its handle, or the error with which its launch failed."""
        model = runner.model
        self._places = place_parts(model.spec) if runner.adapter_limits and isinstance(model, Decoder) else {}
        self._adapters: dict[int, dict[str, LowRank]] = {}
        """Index of an adapter that is being received → its parts so far."""

    def run(self) -> None:
        """Run steps until the ranks are aborted; the heartbeat's thread ends the process when the driver has ended."""
        while not self._ranks.aborted:
            message = self._ranks.receive(-1)
            if message is None:
                continue  # a signal, or the end
            command: Command = pickle.loads(message)
            step, work = command
            if isinstance(work, AdapterPart):
                self._take(work)
                if work.is_last:
                    self._reply(step, self._load_adapter(step, work))
                continue
            if work is not None:
                self._ranks.limit(seconds_for(work))
                try:
                    self._launched[step] = self._runner.launch(work)
                except Exception as error:
                    self._launched[step] = error
                if self._runner.backend.asynchronous:
                    continue  # until the driver has the step collected
            result = self._collect(step)
            if work is not None and work.copies is not None and not work.slots:
                self._runner.backend.comm.least(0)  # the driver may use the places once all ranks have copied
            self._reply(step, result)

    def _reply(self, step: int, result: StepResult | Exception) -> None:
        """Send a result to the driver, if this is the rank that reports results."""
        if self._reports:
            self._ranks.send(_packed((step, result)))

    def _collect(self, step: int) -> Any:
        """Return the result of a step, or the error with which it failed."""
        handle = self._launched.pop(step)
        for earlier in [other for other in self._launched if other < step]:
            del self._launched[earlier]  # the driver was interrupted before it collected that step
        error: Exception
        if isinstance(handle, Exception):
            error = handle
        else:
            try:
                return self._runner.collect(handle)
            except Exception as raised:
                error = raised
        return self._failed(step, error)

    def _take(self, part: AdapterPart) -> None:
        """Keep this rank's part of the received changes."""
        if part.is_first:
            self._adapters[part.index] = {}
        for name, change in part.weights.items():
            if (own := self._places.get(name)) is not None:
                self._adapters[part.index][own.name] = own.of(change)

    def _load_adapter(self, step: int, adapter: AdapterPart) -> StepResult | Exception:
        """Load this rank's part of a completely received adapter. If one rank cannot load it, no rank keeps it."""
        error: Exception | None = None
        try:
            weights = self._adapters.pop(adapter.index)
            self._runner.load_adapter(adapter.index, Adapter(adapter.digest, weights))
        except VllmliteError as raised:
            error = raised
        self._ranks.limit(COLLECTIVE_SECONDS)
        if self._runner.backend.comm.least(error is None):
            return StepResult([])
        if error is None:
            self._runner.unload_adapter(adapter.index)
            error = BackendError("another rank cannot load the adapter: its log says why")
        return self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> Exception:
        """Tell the driver that this rank failed, and return the error."""
        if not self._ranks.aborted:
            logging.getLogger(__name__).error("a step failed", exc_info=error)
            self._control.sendall(pack(Failed(step, f"{type(error).__name__}: {error}")))
        return error


def _packed(reply: Reply) -> bytes:
    """Pickle a reply; an error that cannot be pickled becomes a RuntimeError of the same text."""
    try:
        packed = pickle.dumps(reply, pickle.HIGHEST_PROTOCOL)
        if isinstance(reply[1], Exception):
            pickle.loads(packed)
        return packed
    except Exception:
        error = reply[1]
        return pickle.dumps((reply[0], RuntimeError(f"{type(error).__name__}: {error}")))
