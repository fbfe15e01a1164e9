"""Ranks that run the user's program, each started by torchrun, mpirun or srun.

Every rank has an engine of its own, which makes the same schedules from the same requests, and computes its part of
each step. Rank 0 sends the digest of each schedule; a rank whose program has asked for something else stops all, before
it has computed anything."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

from vllmlite.backends.cores import usable_cores
from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.errors import BackendError, ParameterError, VllmliteError
from vllmlite.models.plan import Plan
from vllmlite.ranks.address import Address
from vllmlite.ranks.comm import connect
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.host_messages import ENCODING, RankReady, StepCommand, StepDigest, StepReply
from vllmlite.ranks.launcher import Placement, placement
from vllmlite.ranks.layout import Layout
from vllmlite.ranks.meeting import DEFAULT_PORT, meet
from vllmlite.ranks.messages import Failed, Ready
from vllmlite.ranks.runner import ParallelRunner
from vllmlite.ranks.worker import COLLECTIVE_SECONDS, ready_with, seconds_for
from vllmlite.runner.build import BuiltRunner, build_runner
from vllmlite.runner.runner import ModelRunner


def start_external(config: EngineConfig, plan: Plan) -> BuiltRunner[ParallelRunner]:
    """Meet the other ranks, build this one's part of the model, and return a runner that computes it. Raises what a
    rank's start raises, on all ranks."""
    placed = placement(os.environ)
    world, stages = config.num_ranks, config.pipeline_parallel_size
    if placed.world != world:
        raise ParameterError(
            "tensor_parallel_size" if stages == 1 else "pipeline_parallel_size",
            config.tensor_parallel_size if stages == 1 else stages,
            f"{placed.launcher} has started {placed.world} processes for {world} ranks: there must be as many",
        )
    layout = Layout(world, config.tensor_parallel_size, world, placed.rank)
    threads = config.threads or max(usable_cores() // placed.local_world, 1)
    group = RankGroup([], layout, meet(config, plan, layout, _address(config, placed)))
    try:
        built = _built(replace(config, threads=threads), plan, layout, group, placed.local_world)
        (ready,) = group.wait_until_ready([config.reporting_rank])
    except BaseException as error:
        group.stop(str(error) or "the start of the engine was interrupted")
        group.close()
        raise
    choice = (
        f"{ready.backend_choice}; one of {world} processes that {placed.launcher} has started, of {threads} thread"
        f"{'s' * (threads != 1)}: tensor parallelism {config.tensor_parallel_size}, pipeline parallelism {stages}"
    )
    runner = ExternalRunner(group, ready, built.runner, config)
    return BuiltRunner(
        runner,
        ready.num_blocks,
        ready.max_model_len,
        choice,
        ready.step_times,
        ready.draft_times,
        host=ready.host,
    )


def _address(config: EngineConfig, placed: Placement) -> Address:
    """Return where the ranks meet. Raises ParameterError if that is not known."""
    host = config.master_addr or ("127.0.0.1" if placed.local_world == placed.world else placed.host)
    if host is None:
        raise ParameterError(
            "master_addr", None, f"must be the host of rank 0: {placed.launcher} has started ranks on several"
        )
    return Address.resolve(host, config.master_port or placed.port or DEFAULT_PORT)


def _built(
    config: EngineConfig, plan: Plan, layout: Layout, group: RankGroup, sharing: int
) -> BuiltRunner[ModelRunner]:
    """Build this rank's runner at the same time as the others, and exchange its properties with them."""
    rank, world = layout.node, layout.world
    try:
        built = build_runner(
            config,
            plan,
            rank,
            world,
            lambda backend: connect(backend, group.own, config.pipeline_parallel_size, sharing),
        )
    except Exception as error:
        if group.end is not None:  # what the others have not sent cannot be used
            raise BackendError(str(group.end)) from None
        if isinstance(error, VllmliteError):
            group.take(rank, error)
        raise
    group.take(rank, ready_with(built))
    if layout.is_hub:
        ready = group.wait_until_ready()[config.reporting_rank]
        group.send(RankReady(config.reporting_rank, ready))
    return built


class ExternalRunner(ParallelRunner):
    """Runs this rank's part of each step in this process, as the other ranks do in theirs."""

    def __init__(self, group: RankGroup, ready: Ready, runner: ModelRunner, config: EngineConfig) -> None:
        """``runner`` computes this rank's part; ``ready`` are the properties on which the ranks have agreed."""
        super().__init__(group, ready, [])
        self._runner = runner
        self._rank = group.layout.node
        self._reports = self._rank == config.reporting_rank
        self._has_results = config.pipeline_parallel_size == 1
        self._digests: queue.SimpleQueue[StepDigest] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepReply] = queue.SimpleQueue()
        group.on_message(self._take)

    def launch(self, schedule: Schedule) -> Any:
        """Launch this rank's part of a step, which must be the same on all ranks."""
        self.group.check()
        self._step += 1
        self._agree(self._step, schedule)
        self.group.own.limit(seconds_for(schedule))
        self.group.is_computing = True
        try:
            return self._step, self._runner.launch(schedule)
        except Exception as error:
            self._fail(self._step, error)
            raise

    def collect(self, handle: Any) -> StepResult:
        """Wait for a step's results, which are the same on all ranks."""
        step, launched = handle
        try:
            result = self._runner.collect(launched)
        except Exception as error:
            self._fail(step, error)
            raise
        if not self._has_results:
            result = self._shared(step, result)
        if self.group.ranks.aborted:
            self.group.check()
        self.group.is_computing = False
        return result

    def load_adapter_parts(self, index: int, adapter: Any) -> Iterator[int]:
        """Raise BackendError: adapters need ranks of one host, as the configuration has been told."""
        raise BackendError("adapters need ranks of one host in this version")

    def _agree(self, step: int, schedule: Schedule) -> None:
        """Check that rank 0 launches the same step. Raises EngineDeadError otherwise, here and there."""
        digest = StepDigest(step, sha256(ENCODING.encode(StepCommand(step, schedule))).digest())
        if self.group.layout.is_hub:
            self.group.send(digest)
            return
        found = self._wait(
            self._digests, f"rank 0 has not begun step {step} within {COLLECTIVE_SECONDS:.0f} s"
        )
        if found != digest:
            self.group.stop(
                f"the program of rank {self._rank} asks for something else than that of rank 0 in step {step}: all "
                "ranks must make the same calls"
            )
            self.group.check()

    def _shared(self, step: int, result: StepResult) -> StepResult:
        """Return the result of the last stage of the pipeline, which sends it to all ranks."""
        if self._reports:
            self.group.send(StepReply(step, result))
            return result
        while True:
            reply: StepReply = self._wait(self._results, f"no result of step {step} has come")
            if reply.step == step and reply.result is not None:
                return reply.result

    def _wait(self, messages: queue.SimpleQueue[Any], late: str) -> Any:
        """Return the next message. Raises EngineDeadError if the ranks have ended; ends them if it does not come."""
        for _ in range(int(COLLECTIVE_SECONDS)):
            try:
                return messages.get(timeout=1.0)
            except queue.Empty:
                if self.group.ranks.aborted:
                    self.group.check()
        self.group.stop(late)
        return self.group.check()

    def _fail(self, step: int, error: Exception) -> None:
        """Tell the other ranks that a step has failed here, as it should have there."""
        if self.group.ranks.aborted:
            self.group.check()
        self.group.is_computing = False
        self.group.take(self._rank, Failed(step, f"{type(error).__name__}: {error}"))
        if self.group.layout.is_hub:
            self.group.agree_on_failure(step)

    def _take(self, message: object) -> None:
        """Queue a message of another rank for the step that waits for it; rank 0 also sends results to all ranks."""
        if isinstance(message, StepDigest):
            self._digests.put(message)
        elif isinstance(message, StepReply):
            if self.group.layout.is_hub:
                self.group.send(message)
            if not self._reports:
                self._results.put(message)
