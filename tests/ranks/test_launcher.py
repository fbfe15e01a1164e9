"""The place of a process among those that a launcher has started, by the variables that launchers set."""

from __future__ import annotations

import pytest

from vllmlite.errors import ParameterError
from vllmlite.ranks.launcher import Placement, placement

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "5"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, Placement("torchrun", 1, 4, 2, "a", 29500)),
        (
            {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"},  # torchrun itself listens at the port
            Placement("torchrun", 1, 4, 2, "a", 29501),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Placement("mpirun of Open MPI", 0, 2, 2, None, None),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"},
            Placement("mpirun of MPICH", 1, 2, 2, None, None),
        ),
        (SLURM, Placement("srun", 3, 5, 5, None, None)),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[07-12,20],login"},
            Placement("srun", 3, 5, 2, "gpu07", None),
        ),
        ({**SLURM, "SLURM_STEP_NODELIST": "one,two"}, Placement("srun", 3, 5, 5, "one", None)),
        ({**SLURM, "SLURM_STEP_NODELIST": "one"}, Placement("srun", 3, 5, 5, "one", None)),
    ],
)
def test_launchers_say_where_a_process_stands(environment: dict[str, str], expected: Placement) -> None:
    assert placement(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "each rank must be started by a launcher that sets its variables: torchrun"),
        ({**TORCHRUN, "RANK": "4"}, "RANK='4': must be less than WORLD_SIZE=4"),
        ({**TORCHRUN, "WORLD_SIZE": "x"}, "WORLD_SIZE='x': must be a number"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT='65536': must be from 1 to 65534"),
    ],
)
def test_wrong_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        placement(environment)
