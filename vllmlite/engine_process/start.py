"""Start an engine in its own thread or process."""

from __future__ import annotations

import secrets
from dataclasses import replace

from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine_process.client import EngineClient
from vllmlite.engine_process.host import EngineProcess, EngineThread
from vllmlite.engine_process.replicas import ReplicaClient
from vllmlite.errors import ParameterError
from vllmlite.hub import find_model
from vllmlite.runner.startup import Started, load_tokenizer, start


def start_thread(config: EngineConfig) -> Started[EngineClient]:
    """Start an engine in its own thread. Raises the same errors as :func:`start`."""
    _refuse_launcher(config)
    started = start(config)
    bounds, stats = started.engine.bounds, replace(started.engine.stats)
    return started.with_engine(EngineClient(EngineThread(started), bounds, stats), started.tokenizer)


def start_process(config: EngineConfig) -> Started[EngineClient]:
    """Start an engine in its own process. Raises the same errors as :func:`start`."""
    started = _start_processes(config, 1)
    return started.with_engine(started.engine[0], started.tokenizer)


def start_replicas(config: EngineConfig) -> Started[ReplicaClient]:
    """Start ``config.data_parallel_size`` engines, each in its own process. Raises the same errors as :func:`start`."""
    if config.seed == -1:  # weights of load_format=dummy must be equal
        config = replace(config, seed=secrets.randbits(64))
    started = _start_processes(config, config.data_parallel_size)
    devices = [client.stats.device.partition(":")[0] for client in started.engine]
    if len(set(devices)) > 1:
        for client in started.engine:
            client.close()
        raise ParameterError(
            "data_parallel_size",
            config.data_parallel_size,
            f"needs as many GPUs: replicas would run on {', '.join(devices)}",
        )
    return started.with_engine(ReplicaClient(started.engine, config.enable_prefix_caching), started.tokenizer)


def _start_processes(config: EngineConfig, count: int) -> Started[list[EngineClient]]:
    """Start ``count`` equal engines, each in its own process."""
    _refuse_launcher(config)
    processes: list[EngineProcess] = []
    clients: list[EngineClient] = []
    try:
        for replica in range(count):
            processes.append(EngineProcess(config, replica))
        tokenizer = None  # while the other processes load the model
        if not config.skip_tokenizer_init:
            path = find_model(config.model, revision=config.revision, download_dir=config.download_dir)
            tokenizer = load_tokenizer(config, path)
        for process in processes:
            bounds, stats, started = process.wait_until_ready()
            clients.append(EngineClient(process, bounds, stats))
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return started.with_engine(clients, tokenizer)


def _refuse_launcher(config: EngineConfig) -> None:
    """Raise ParameterError if ranks run the caller's program, to which requests come at different times."""
    if config.distributed_executor_backend == "external_launcher":
        raise ParameterError(
            "distributed_executor_backend",
            "external_launcher",
            "is for LLM and `vllmlite generate`, where all ranks get the same requests: choose mp, with nnodes for "
            "several hosts",
        )
