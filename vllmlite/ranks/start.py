"""Starting the ranks of an engine on this host."""

from __future__ import annotations

import logging
from dataclasses import replace

from vllmlite.backends.cores import rank_cpus, usable_cores
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.models.plan import Plan
from vllmlite.models.shard import part_of
from vllmlite.ranks.group import RankGroup
from vllmlite.ranks.messages import Setup
from vllmlite.ranks.runner import ParallelRunner
from vllmlite.runner.build import BuiltRunner


def start_ranks(config: EngineConfig, plan: Plan) -> BuiltRunner[ParallelRunner]:
    """Start a process for each rank and return a runner that drives them. Raises what a rank's start raises.

    ``config.threads`` are those of each rank; by default the CPUs of this process are divided among the ranks."""
    world, stages = config.num_ranks, config.pipeline_parallel_size
    if plan.spec is None:
        name = "tensor_parallel_size" if stages == 1 else "pipeline_parallel_size"
        raise ParameterError(name, getattr(config, name), "transformers' models run on 1 rank")
    part_of(plan.spec, 0, world, stages)
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
    last = ready[config.reporting_rank]
    choice = (
        f"{last.backend_choice}; split over {world} processes of {threads} thread{'s' * (threads != 1)}: "
    )
    choice += f"tensor parallelism {config.tensor_parallel_size}, pipeline parallelism {stages}"
    return BuiltRunner(
        ParallelRunner(group, last), last.num_blocks, last.max_model_len, choice, last.step_times,
        last.draft_times,
    )  # fmt: skip
