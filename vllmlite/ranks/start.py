"""Starting the ranks of an engine on this host."""

from __future__ import annotations

import logging
from dataclasses import replace

from vllmlite.backends.cores import rank_cpus, usable_cores
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.models.plan import Plan
from vllmlite.models.shard import sharded
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.messages import Setup
from vllmlite.ranks.runner import ParallelRunner
from vllmlite.runner.build import BuiltRunner


def start_ranks(config: EngineConfig, plan: Plan) -> BuiltRunner[ParallelRunner]:
    """Start a process for each rank and return a runner that drives them. Raises what a rank's start raises.

    ``config.threads`` are those of each rank; by default the CPUs of this process are divided among the ranks."""
    world = config.tensor_parallel_size
    if plan.spec is None:
        raise ParameterError("tensor_parallel_size", world, "transformers' models run on 1 rank")
    sharded(plan.spec, 0, world)
    cpus = rank_cpus(world)
    threads = config.threads or max(usable_cores() // (world * config.data_parallel_size), 1)
    level = logging.getLogger("vllmlite").getEffectiveLevel()
    setups = [Setup(replace(config, threads=threads), plan, own, level) for own in cpus]
    group = RankGroup(setups)
    try:
        ready = group.wait_until_ready()
    except BaseException:
        group.close()
        raise
    first = ready[0]
    choice = f"{first.backend_choice}; split over {world} processes (tensor parallelism), {threads} thread"
    choice += f"{'s' * (threads != 1)} each"
    return BuiltRunner(
        ParallelRunner(group, ready), first.num_blocks, first.max_model_len, choice, first.step_times,
        first.draft_times,
    )  # fmt: skip
