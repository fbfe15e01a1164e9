"""Start the ranks of an engine."""

from __future__ import annotations

import logging
import os
import pickle
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256

from vllmlite.backends.cores import rank_cpus, usable_cores
from vllmlite.backends.host_blocks import mapped
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.models.plan import Plan
from vllmlite.models.shard import part_of
from vllmlite.ranks.external import start_external
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.host_messages import StepReply
from vllmlite.ranks.layout import Layout
from vllmlite.ranks.meeting import meet
from vllmlite.ranks.messages import Setup
from vllmlite.ranks.runner import ParallelRunner
from vllmlite.runner.build import BuiltRunner


def start_ranks(config: EngineConfig, plan: Plan, secret: bytes | None = None) -> BuiltRunner[ParallelRunner]:
    """Start a process for each rank of this host, connect to the nodes that run the other ranks, and return a runner
    that drives all. Raises the error of a rank that cannot start. ``config.threads`` is the number of threads of each
    rank; by default the CPUs of this process are divided among the ranks of this host. ``secret`` replaces the secret
    that the options name."""
    world, stages = config.num_ranks, config.pipeline_parallel_size
    check_split(config, plan)
    if config.distributed_executor_backend == "external_launcher":
        return start_external(config, plan)
    layout = Layout.of(config)
    if not layout.is_hub:
        raise ParameterError(
            "node_rank",
            layout.node,
            "the engine runs on node 0; others run `vllmlite serve --headless` with their node_rank",
        )
    setups = local_setups(config, plan, layout)
    with ExitStack() as stack:
        files = [_anonymous_file(stack) for _ in setups] if config.keeps_block_files() else []
        group = RankGroup(setups, layout, meet(config, plan, layout, secret=secret), files)
        try:
            group.on_message(lambda message: _take_reply(group, message))
            ready = group.wait_until_ready()
        except BaseException as error:
            group.stop(str(error) or "the start of the engine was interrupted")
            group.close()
            raise
        hosts = [each.host for each in ready if each.host is not None]
        memory = [
            mapped(fd, (host.num_places, host.block_bytes)) for fd, host in zip(files, hosts, strict=False)
        ]
    last, threads = ready[config.reporting_rank], setups[0].config.threads
    choice = f"{last.backend_choice}; split over {world} processes of {threads} thread{'s' * (threads != 1)}"
    if layout.nodes > 1:
        choice += f" on {layout.nodes} nodes"
    choice += f": tensor parallelism {config.tensor_parallel_size}, pipeline parallelism {stages}"
    host = None
    if last.host is not None:
        marks = sha256(b"".join(each.fingerprint for each in hosts)).digest()
        host = replace(last.host, fingerprint=marks)
    return BuiltRunner(
        ParallelRunner(group, last, memory), last.num_blocks, last.max_model_len, choice, last.step_times,
        last.draft_times, host=host,
    )  # fmt: skip


def check_split(config: EngineConfig, plan: Plan) -> None:
    """Raise ParameterError if the model cannot be split over the ranks that the options ask for."""
    world, stages = config.num_ranks, config.pipeline_parallel_size
    if plan.spec is None:
        name = "tensor_parallel_size" if stages == 1 else "pipeline_parallel_size"
        raise ParameterError(name, getattr(config, name), "transformers' models run on 1 rank")
    part_of(plan.spec, 0, world, stages)


def local_setups(config: EngineConfig, plan: Plan, layout: Layout) -> list[Setup]:
    """Return the setups of this host's ranks, among which its CPUs are divided."""
    count = layout.per_node
    threads = config.threads or max(usable_cores() // (count * config.data_parallel_size), 1)
    level = logging.getLogger("vllmlite").getEffectiveLevel()
    own = replace(config, threads=threads)
    return [Setup(own, plan, cpus, level, count) for cpus in rank_cpus(count)]


def _take_reply(group: RankGroup, message: object) -> None:
    """Put a result from another host where those of this host's ranks come."""
    if isinstance(message, StepReply):
        result = RuntimeError(message.error) if message.result is None else message.result
        group.own.send(pickle.dumps((message.step, result)))


def _anonymous_file(stack: ExitStack) -> int:
    """Return the descriptor of a file without a name in memory, which ``stack`` closes."""
    fd = os.memfd_create("vllmlite-places", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
