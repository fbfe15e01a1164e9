"""A Ray Serve application: replicas of the server on a Ray cluster, as many as their requests need.

    serve run vllmlite.ray_serve:app model=/models/m min_replicas=1 max_replicas=4 num_gpus=1

Arguments are the options of ``vllmlite serve`` (with underscores), and Ray Serve's ``min_replicas``, ``max_replicas``,
``target_ongoing_requests`` (in each replica), ``upscale_delay_s``, ``downscale_delay_s``, ``num_cpus`` and ``num_gpus``
(of each replica). Ray Serve's own HTTP proxy answers for all replicas; whoever reaches the ports of the Ray cluster can
run code on it, so keep them private. Ray is optional: ``pip install 'ray[serve]'``.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import yaml
from fastapi import FastAPI

from vllmlite.async_llm import AsyncLLM
from vllmlite.chat.sources import read_template
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.server.app import build_app
from vllmlite.server.config import ServerConfig
from vllmlite.server.service import start_service

RAY_OPTIONS: Mapping[str, float | None] = {
    "min_replicas": 1,
    "max_replicas": 1,
    "target_ongoing_requests": 32,
    "upscale_delay_s": 30,
    "downscale_delay_s": 600,
    "num_cpus": 1,
    "num_gpus": 0,
}
"""Options of the deployment, and their defaults."""
REFUSED = {
    "data_parallel_size": "set min_replicas and max_replicas: Ray Serve starts the replicas",
    "host": "Ray Serve listens: see `serve start --http-host`",
    "port": "Ray Serve listens: see `serve start --http-port`",
    "uds": "Ray Serve listens: see `serve start`",
    "slot_save_path": "use `vllmlite serve`: each replica on Ray would have other prompts in its slots",
    **dict.fromkeys(
        ("enable_lora", "lora_modules", "lora_root", "lora_admin_key_file"),
        "replicas on Ray serve no adapters in this version: use `vllmlite serve`, with --data-parallel-size",
    ),
}


def app(args: Mapping[str, Any]) -> Any:
    """Return the application for ``serve.run``. Raises ParameterError for an option that does not exist."""
    from ray import serve

    options = {name.replace("-", "_"): _value(value) for name, value in args.items()}
    for name in options.keys() & REFUSED.keys():
        raise ParameterError(name, options[name], REFUSED[name])
    ray = {name: options.pop(name, default) for name, default in RAY_OPTIONS.items()}
    known = {field.name for field in fields(ServerConfig)}
    server = ServerConfig(**{name: options.pop(name) for name in options.keys() & known})
    server = replace(server, chat_template=read_template(server.chat_template))
    engine = EngineConfig.from_kwargs(**options)

    def build() -> FastAPI:
        """Start the engine of a replica, which ends with its process, and return its application."""
        service = start_service(AsyncLLM(engine, engine_process=server.engine_process), server)
        built = build_app(service, server.api_keys())
        weakref.finalize(built, service.engine.shutdown)
        return built

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="vllmlite",
        autoscaling_config={name: value for name, value in ray.items() if not name.startswith("num_")},
        max_ongoing_requests=engine.max_num_seqs,
        ray_actor_options={"num_cpus": ray["num_cpus"], "num_gpus": ray["num_gpus"]},
        graceful_shutdown_timeout_s=server.shutdown_timeout,
        health_check_period_s=5,
    )
    return deployment.bind()


def _value(value: Any) -> Any:
    """Return the value of an argument, which the command line gives as text."""
    return yaml.safe_load(value) if isinstance(value, str) else value
