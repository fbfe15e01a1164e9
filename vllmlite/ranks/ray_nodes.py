"""The nodes of an engine on a Ray cluster: actors in a placement group, which run the ranks of their hosts.

Node 0 is this process. Ray starts the others and says what has become of them; steps go through the same connections as
without Ray, and the secret with which they are authenticated is made here. Ray is optional: ``pip install ray``."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import BackendError, ParameterError, VllmliteError
from vllmlite.models.plan import Plan
from vllmlite.ranks.node import serve_node
from vllmlite.ranks.runner import ParallelRunner
from vllmlite.ranks.start import check_split, start_ranks
from vllmlite.runner.build import BuiltRunner, plan_for

logger = logging.getLogger(__name__)

NODE_LABEL = "ray.io/node-id"
"""Ray's own label of a node."""
NAMED_SECONDS = 5.0
"""Time after which the log says what is being waited for."""
CONNECT_SECONDS = 5.0
"""Time in which a cluster must accept a connection."""
RELEASE_SECONDS = 2.0
"""Time in which actors end by themselves once the engine has ended."""


def start_on_ray(config: EngineConfig, plan: Plan) -> BuiltRunner[ParallelRunner]:
    """Start the ranks on the nodes of a Ray cluster and return a runner that drives them. Raises what a rank's start
    raises, and BackendError if the ranks do not fit the cluster.

    Each rank counts as ``config.threads`` CPUs, or as one."""
    if config.ranks_secret_file is not None:
        raise ParameterError(
            "ranks_secret_file",
            config.ranks_secret_file,
            "is for nodes that you start: those on Ray get a new secret",
        )
    check_split(config, plan)
    nodes = RayNodes(config)
    try:
        nodes.serve()
        built = start_ranks(nodes.config, plan, nodes.secret)
    except BaseException:
        nodes.release()
        raise
    nodes.release_with(built.runner.group)
    return built


class NodeActor:
    """What an actor on a node above 0 does."""

    def check(self, config: EngineConfig) -> None:
        """Raise VllmliteError if the model cannot run on this host."""
        check_split(config, plan_for(config))

    def serve(self, config: EngineConfig, secret: bytes) -> None:
        """Run the node's ranks until the engine ends."""
        serve_node(config, secret)


class RayNodes:
    """A placement group with a bundle for each node of an engine, and the actors in it."""

    def __init__(self, config: EngineConfig) -> None:
        """Reserve the nodes, the first of which is this process's, and start the actors. Raises BackendError if the
        cluster has not enough of them, and what an actor raises about the model."""
        ray = self._ray = import_ray()
        connect(ray)
        here = ray.get_runtime_context().get_node_id()
        self._seconds = config.distributed_timeout_seconds
        self.secret = secrets.token_bytes(32)
        address = config.master_addr or ray.util.get_node_ip_address()
        nodes = config.nnodes if config.nnodes > 1 else fit(config, ray.nodes(), here)
        self.config = replace(
            config,
            distributed_executor_backend="mp",
            nnodes=nodes,
            master_addr=address,
            master_port=config.master_port or _free_port(address),
        )
        """The options of the nodes, which meet as they would without Ray."""
        cpus = _cpus(config, nodes)
        self._group = ray.util.placement_group(
            [{"CPU": cpus}] * nodes,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[{NODE_LABEL: here}] + [{}] * (nodes - 1),
        )
        self._served: list[Any] = []
        self._lock = threading.Lock()
        self._is_released = False
        try:
            self._wait_for_bundles(cpus)
            self._actors = [self._actor(index, cpus) for index in range(1, nodes)]
            self._check()
        except BaseException:
            self.release()
            raise

    def serve(self) -> None:
        """Have the actors run their ranks."""
        self._served = [
            actor.serve.remote(replace(self.config, node_rank=index), self.secret)
            for index, actor in enumerate(self._actors, 1)
        ]

    def release(self) -> None:
        """End the actors, and give their bundles back."""
        with self._lock:
            if self._is_released or not self._ray.is_initialized():
                return
            self._is_released = True
        if self._served:
            self._ray.wait(self._served, num_returns=len(self._served), timeout=RELEASE_SECONDS)
        self._ray.util.remove_placement_group(self._group)

    def release_soon(self) -> None:
        """Call :meth:`release` in another thread."""
        threading.Thread(target=self.release, name="vllmlite-ray", daemon=True).start()

    def release_with(self, group: Any) -> None:
        """Call :meth:`release_soon` once a group of ranks has ended or is forgotten."""
        group.on_end(self.release_soon)
        weakref.finalize(group, self.release_soon).atexit = False

    def _wait_for_bundles(self, cpus: float) -> None:
        ready = self._group.ready()
        nodes = self.config.nnodes
        what = f"{nodes} node{'s' * (nodes > 1)} of the Ray cluster, this one among them, with {cpus:g} free CPU each"
        named = min(NAMED_SECONDS, self._seconds)
        if self._ray.wait([ready], timeout=named)[0]:
            return
        logger.warning("waiting for %s", what)
        if not self._ray.wait([ready], timeout=self._seconds - named)[0]:
            raise BackendError(
                f"there were no {what} within {self._seconds} s: the cluster has {describe(self._ray.nodes())}"
            )

    def _actor(self, index: int, cpus: float) -> Any:
        strategies = self._ray.util.scheduling_strategies
        strategy = strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=index
        )
        return self._ray.remote(num_cpus=cpus)(NodeActor).options(scheduling_strategy=strategy).remote()

    def _check(self) -> None:
        """Raise what an actor says against the options, and BackendError if one does not start."""
        table = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        hosts = {each["NodeID"]: each["NodeManagerHostname"] for each in self._ray.nodes()}
        asked = [actor.check.remote(self.config) for actor in self._actors]
        for index, each in enumerate(asked, 1):
            name = f"node {index} ({hosts.get(table.get(index), 'an unknown host')})"
            try:
                self._ray.get(each, timeout=self._seconds)
            except self._ray.exceptions.GetTimeoutError:
                raise BackendError(f"{name} has not started within {self._seconds} s") from None
            except self._ray.exceptions.RayError as error:
                raise BackendError(f"{name}: {_reason(error)}") from None


def import_ray() -> Any:
    """Return the module of Ray. Raises ParameterError if it is not installed."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ParameterError(
            "distributed_executor_backend", "ray", "needs Ray, which is not installed: pip install ray"
        ) from None
    return ray


def connect(ray: Any) -> None:
    """Connect this process to the cluster of RAY_ADDRESS or of this host; without one, start one on this host.

    Raises ParameterError or BackendError if there is none at RAY_ADDRESS."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "auto")
    if "://" in address:
        raise ParameterError(
            "RAY_ADDRESS",
            address,
            "is for Ray's client: run this program on a node of the cluster, without it",
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise BackendError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except ConnectionError:
        logger.warning("no Ray cluster runs on this host: starting one, which ends with this process")
        ray.init(address="local", logging_level=logging.WARNING, include_dashboard=False)


def fit(config: EngineConfig, nodes: Sequence[dict[str, Any]], here: str) -> int:
    """Return the least number of ``nodes`` that have the CPUs for all ranks, as many on each; ``here`` is one of them.

    Raises BackendError if there is none."""
    sizes = {each["NodeID"]: each["Resources"].get("CPU", 0.0) for each in nodes if each["Alive"]}
    world = config.num_ranks
    for count in range(1, world + 1):
        if world % count == 0:
            cpus = _cpus(config, count)
            able = [node for node, size in sizes.items() if size >= cpus]
            if here in able and len(able) >= count:
                return count
    raise BackendError(
        f"{world} ranks do not fit the Ray cluster, with as many on each node, this one among them, and "
        f"{_cpus(config, world):g} CPU for each: it has {describe(nodes)}; nnodes has the engine wait for more"
    )


def describe(nodes: Sequence[dict[str, Any]]) -> str:
    """Describe the nodes of a cluster."""
    alive = [each for each in nodes if each["Alive"]]
    found = [f"{each['NodeManagerHostname']}: {each['Resources'].get('CPU', 0):g} CPU" for each in alive]
    return f"{len(alive)} node{'s' * (len(alive) != 1)} ({', '.join(found)})"


def _cpus(config: EngineConfig, nodes: int) -> float:
    """Return the CPUs that Ray is to reserve on each node: one for each thread of its ranks."""
    return float(config.num_ranks // nodes * (config.threads or 1))


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _reason(error: BaseException) -> str:
    """Return what an actor raised, in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, VllmliteError):
        return str(cause)
    return str(cause or error).strip().splitlines()[-1]
