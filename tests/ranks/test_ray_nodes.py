"""Ranks on a Ray cluster: how many nodes they take, their text, and the loss of a node."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllmlite import LLM, EngineConfig, SamplingParams
from vllmlite.errors import BackendError, EngineDeadError, ParameterError
from vllmlite.models.plan import Plan
from vllmlite.ranks.ray_nodes import connect, fit, import_ray, start_on_ray

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_gpu_blocks_override": 64, "threads": 1}
ON_RAY: dict[str, Any] = {**OPTIONS, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
PROMPTS = ["Debian is", "The kernel"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def node(name: str, cpus: float, alive: bool = True) -> dict[str, Any]:
    """A node as Ray describes it."""
    return {"NodeID": name, "NodeManagerHostname": name, "Alive": alive, "Resources": {"CPU": cpus}}


def config(**options: Any) -> EngineConfig:
    return EngineConfig.from_kwargs(**{**ON_RAY, **options})


@pytest.mark.parametrize(
    ("sizes", "ranks", "threads", "count"),
    [
        ((4, 4), 4, None, 1),  # one node is enough
        ((2, 4), 4, None, 2),  # not that of the driver, which has ranks too
        ((2, 1, 2), 4, 1, 2),
        ((4, 4), 4, 2, 2),
        ((1, 1, 1, 1), 4, None, 4),
    ],
)
def test_ranks_take_as_few_nodes_as_have_the_cpus(
    sizes: tuple[int, ...], ranks: int, threads: int | None, count: int
) -> None:
    nodes = [node(f"node {index}", size) for index, size in enumerate(sizes)]
    assert fit(config(tensor_parallel_size=ranks, threads=threads), nodes, "node 0") == count


@pytest.mark.parametrize(
    ("nodes", "ranks"),
    [
        ([node("a", 1), node("b", 3)], 4),  # not as many on each
        ([node("a", 1), node("b", 2, alive=False)], 2),
        ([node("a", 0), node("b", 1), node("c", 1)], 2),  # the driver's node has no CPUs
        ([], 2),
    ],
    ids=range(4),
)
def test_ranks_that_do_not_fit_are_refused_with_what_the_cluster_has(
    nodes: list[dict[str, Any]], ranks: int
) -> None:
    with pytest.raises(BackendError, match=rf"{ranks} ranks .* it has \d nodes?"):
        fit(config(tensor_parallel_size=ranks), nodes, "a")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tensor_parallel_size": 1}, "distributed_executor_backend"),
        ({"nnodes": 2, "node_rank": 1}, "node_rank"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"nnodes": 3}, "nnodes"),
    ],
)
def test_options_that_ray_cannot_follow_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError, match=name):
        config(**options)


def test_a_secret_of_the_user_is_refused() -> None:
    with pytest.raises(ParameterError, match="ranks_secret_file"):
        start_on_ray(config(ranks_secret_file="/etc/secret"), cast(Plan, None))


def test_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ParameterError, match="pip install ray"):
        import_ray()


@pytest.mark.parametrize(
    ("address", "error"), [("127.0.0.1:1", BackendError), ("ray://head:10001", ParameterError)]
)
def test_an_address_without_a_cluster_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str, error: type[Exception]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(error, match=f"RAY_ADDRESS=.*{address}"):
        connect(SimpleNamespace(is_initialized=lambda: False))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes with a CPU each on this machine; this process is connected to the first."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    ray.init(address=made.address, runtime_env={"env_vars": variables}, logging_level="warning")
    yield made
    ray.shutdown()
    made.shutdown()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def runs(process: Any) -> bool:
    """Whether a process of psutil has not ended."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_two_nodes_give_the_text_of_one_rank_and_the_loss_of_one_ends_the_engine(cluster: Any) -> None:
    import psutil
    import ray

    def free_cpus() -> float:
        return float(ray.available_resources().get("CPU", 0))

    alone = LLM(**OPTIONS)
    expected = [output.outputs[0].text for output in alone.generate(PROMPTS, GREEDY)]
    with pytest.raises(BackendError, match=r"2 ranks do not fit.*it has 1 node "):
        LLM(**ON_RAY)
    other = cluster.add_node(num_cpus=1)
    llm = LLM(**ON_RAY)
    assert [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)] == expected
    assert free_cpus() == 0
    llm.llm_engine.close()
    wait_for(lambda: free_cpus() == 2)

    llm = LLM(**ON_RAY)
    (raylet,) = other.all_processes["raylet"]
    lost = psutil.Process(raylet.process.pid).children(recursive=True)
    assert any("vllmlite.ranks.worker" in " ".join(each.cmdline()) for each in lost)
    cluster.remove_node(other, allow_graceful=False)
    with pytest.raises(EngineDeadError, match=r"^rank 1 of 2 \(.*\) .*; its last message: ready$"):
        while True:
            llm.generate(PROMPTS, GREEDY)
    wait_for(lambda: not any(map(runs, lost)))
    wait_for(lambda: free_cpus() == 1)
