"""Where this process stands among those that torchrun, mpirun or srun has started, by its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vllmlite.errors import ParameterError

LAUNCHERS: Mapping[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    "mpirun of Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "mpirun of MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
}
"""Variables with the rank, the number of ranks and the number of those on this host."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A process among those that a launcher has started."""

    launcher: str
    rank: int
    world: int
    local_world: int
    """Number of processes on this host."""
    host: str | None
    """Host of rank 0, if the launcher says so."""
    port: int | None
    """A port there that is free, if the launcher says so."""


def placement(environment: Mapping[str, str]) -> Placement:
    """Return the place of this process. Raises ParameterError if no launcher has started it."""
    for launcher, (rank, world, local) in LAUNCHERS.items():
        if rank in environment and world in environment:
            size = _number(environment, world)
            local_size = size if local not in environment else _number(environment, local)
            found = Placement(
                launcher, _number(environment, rank), size, local_size, _host(environment), _port(environment)
            )
            if not 0 <= found.rank < found.world:
                raise ParameterError(rank, environment[rank], f"must be less than {world}={size}")
            return found
    wanted = "; ".join(f"{name} ({', '.join(variables[:2])})" for name, variables in LAUNCHERS.items())
    raise ParameterError(
        "distributed_executor_backend",
        "external_launcher",
        f"each rank must be started by a launcher that sets its variables: {wanted}",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return a variable's number. Slurm writes tasks per node as ``2(x3),1``: the first counts."""
    found = re.match(r"\d+", environment[name])
    if found is None:
        raise ParameterError(name, environment[name], "must be a number, as the launcher sets it")
    return int(found[0])


def _host(environment: Mapping[str, str]) -> str | None:
    """Return the host of rank 0: torchrun's, or the first of Slurm's list, such as ``gpu[07-12,20],login``."""
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?", environment.get("SLURM_STEP_NODELIST", ""))
    return None if found is None else found[1] + (found[2] or "")


def _port(environment: Mapping[str, str]) -> int | None:
    """Return the launcher's port; or the next, if torchrun itself listens there."""
    if "MASTER_PORT" not in environment:
        return None
    taken = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = _number(environment, "MASTER_PORT") + taken
    if not 0 < port < 65536:
        raise ParameterError("MASTER_PORT", environment["MASTER_PORT"], "must be from 1 to 65534")
    return port
