"""Meeting the other nodes of an engine: what must be equal on all of them, and where they meet."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import fields

from vllmlite.backends.base import API
from vllmlite.config.engine_config import EngineConfig
from vllmlite.disk_tier.fingerprint import fingerprint
from vllmlite.models.plan import Plan
from vllmlite.ranks.address import Address, shared_secret
from vllmlite.ranks.handshake import PROTOCOL, Introduction, Joined, Listener, join
from vllmlite.ranks.layout import Layout

DEFAULT_PORT = 29501
"""vLLM's."""
LOCAL_OPTIONS = frozenset(
    {
        "model", "tokenizer", "skip_tokenizer_init", "download_dir", "revision", "tokenizer_revision",
        "generation_config", "override_generation_config", "reasoning_config", "served_model_name", "threads",
        "seed", "gpu_memory_utilization", "node_rank", "master_addr", "master_port", "ranks_secret_file",
        "distributed_timeout_seconds",
    }
)  # fmt: skip
"""Options that may differ between nodes: what files are called there, and what only node 0 uses."""


def meet(
    config: EngineConfig,
    plan: Plan,
    layout: Layout,
    address: Address | None = None,
    secret: bytes | None = None,
) -> list[Joined]:
    """Return connections to the other nodes: from node 0 to all, from another one to node 0. Raises BackendError or
    ParameterError, naming who is missing or what differs. ``address`` and ``secret`` replace those of the options."""
    if layout.nodes == 1:
        return []
    if address is None:
        address = Address.resolve(config.master_addr or "127.0.0.1", config.master_port or DEFAULT_PORT)
    if secret is None:
        secret = shared_secret(config.ranks_secret_file, address)
    own = introduction(config, plan, layout)
    seconds = config.distributed_timeout_seconds
    if layout.is_hub:
        return Listener(address, own, secret, layout.nodes, config.seed).gather(seconds)
    return [join(address, own, secret, seconds)]


def introduction(config: EngineConfig, plan: Plan, layout: Layout) -> Introduction:
    """Return what this process says of itself."""
    options = {
        each.name: repr(getattr(config, each.name))
        for each in fields(config)
        if each.name not in LOCAL_OPTIONS
    }
    package = sys.modules["vllmlite"]  # which imports this module, so that it cannot be imported here
    version = f"{package.__version__} (interface {API})"
    model = fingerprint(plan.path, times=False)
    return Introduction(PROTOCOL, version, layout.node, socket.gethostname(), os.getpid(), model, options)
