"""Checks of the options that place an engine's ranks on several hosts."""

from __future__ import annotations

from vllmlite.errors import ParameterError


def check_nodes(
    ranks: int,
    nodes: int,
    node: int,
    executor: str | None,
    replicas: int,
    seed: int,
    on_one_host: dict[str, object],
) -> None:
    """Raise ParameterError for options of nodes that contradict each other or the number of ranks.

    ``on_one_host`` are options that need all ranks on one host, if their values are true."""
    external = executor == "external_launcher"
    if ranks % nodes:
        raise ParameterError(
            "nnodes", nodes, f"must divide tensor_parallel_size * pipeline_parallel_size = {ranks}"
        )
    if node >= nodes:
        raise ParameterError("node_rank", node, f"must be less than nnodes={nodes}")
    if nodes > 1 and executor not in (None, "mp", "ray"):
        raise ParameterError("nnodes", nodes, "needs distributed_executor_backend=mp or ray")
    if executor == "ray" and ranks == 1:
        raise ParameterError(
            "distributed_executor_backend",
            "ray",
            "places several ranks: set tensor_parallel_size or pipeline_parallel_size, or leave it out",
        )
    if executor == "ray" and node > 0:
        raise ParameterError("node_rank", node, "must be 0 with Ray, which starts the other nodes itself")
    if external and seed == -1:
        raise ParameterError("seed", -1, "must be the same on all ranks that external_launcher runs")
    if nodes == 1 and executor not in ("external_launcher", "ray"):
        return
    if replicas > 1:
        raise ParameterError(
            "data_parallel_size",
            replicas,
            "must be 1 with ranks on several hosts: start a server for each replica",
        )
    for name, value in on_one_host.items():
        if value:
            raise ParameterError(name, value, "needs processes that the engine starts on its own host")
