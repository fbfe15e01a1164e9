"""Start the ranks of an engine on this host."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256

from vllmlite.backends.cores import rank_cpus, usable_cores
from vllmlite.backends.host_blocks import mapped
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.models.plan import Plan
from vllmlite.models.shard import part_of
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.messages import Setup
from vllmlite.ranks.runner import ParallelRunner
from vllmlite.runner.build import BuiltRunner


def start_ranks(config: EngineConfig, plan: Plan) -> BuiltRunner[ParallelRunner]:
    """Start a process for each rank, and return a runner that drives them. Raises the error of a rank that cannot
    start. ``config.threads`` is the number of threads of each rank; by default the CPUs of this process are divided
    among the ranks."""
    world, stages = config.num_ranks, config.pipeline_parallel_size
    if plan.spec is None:
        name = "tensor_parallel_size" if stages == 1 else "pipeline_parallel_size"
        raise ParameterError(name, getattr(config, name), "transformers' models run on 1 rank")
    part_of(plan.spec, 0, world, stages)
    cpus = rank_cpus(world)
    threads = config.threads or max(usable_cores() // (world * config.data_parallel_size), 1)
    level = logging.getLogger("vllmlite").getEffectiveLevel()
    setups = [Setup(replace(config, threads=threads), plan, own, level) for own in cpus]
    with ExitStack() as stack:
        files = [_anonymous_file(stack) for _ in setups] if config.keeps_block_files() else []
        group = RankGroup(setups, files)
        try:
            ready = group.wait_until_ready()
        except BaseException:
            group.close()
            raise
        hosts = [each.host for each in ready if each.host is not None]
        memory = [
            mapped(fd, (host.num_places, host.block_bytes)) for fd, host in zip(files, hosts, strict=False)
        ]
    last = ready[config.reporting_rank]
    choice = (
        f"{last.backend_choice}; split over {world} processes of {threads} thread{'s' * (threads != 1)}: "
    )
    choice += f"tensor parallelism {config.tensor_parallel_size}, pipeline parallelism {stages}"
    host = None
    if last.host is not None:
        marks = sha256(b"".join(each.fingerprint for each in hosts)).digest()
        host = replace(last.host, fingerprint=marks)
    return BuiltRunner(
        ParallelRunner(group, last, memory), last.num_blocks, last.max_model_len, choice, last.step_times,
        last.draft_times, host=host,
    )  # fmt: skip


def _anonymous_file(stack: ExitStack) -> int:
    """Return the descriptor of a file without a name in memory, which ``stack`` closes."""
    fd = os.memfd_create("vllmlite-places", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
