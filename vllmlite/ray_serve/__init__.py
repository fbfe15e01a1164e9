"""A Ray Serve application: replicas of the server on a Ray cluster, as many as their requests need.

    serve run vllmlite.ray_serve:app model=/models/m min_replicas=1 max_replicas=4 num_gpus=1

Arguments are the options of ``vllmlite serve`` (with underscores), and Ray Serve's ``min_replicas``, ``max_replicas``,
``target_ongoing_requests`` (in each replica), ``upscale_delay_s``, ``downscale_delay_s``, ``num_cpus`` and ``num_gpus``
(of each replica). A second deployment, ``ingress``, reads the requests and sends those whose prompts begin alike to the
same replica, while that has no more to do than others; ``num_ingresses`` sets how many processes do so.

Ray Serve's own HTTP proxy answers for all replicas; whoever reaches the ports of the Ray cluster can run code on it, so
keep them private. Ray is optional: ``pip install 'ray[serve]'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import yaml

from vllmlite.chat.sources import read_template
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.ray_serve.ingress import Ingress
from vllmlite.ray_serve.replica import Replica
from vllmlite.server.config import ServerConfig

RAY_OPTIONS: Mapping[str, float | None] = {
    "min_replicas": 1,
    "max_replicas": 1,
    "target_ongoing_requests": 32,
    "upscale_delay_s": 30,
    "downscale_delay_s": 600,
    "num_cpus": 1,
    "num_gpus": 0,
    "num_ingresses": 1,
}
"""Options of the deployments, and their defaults."""
AUTOSCALING = (
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "upscale_delay_s",
    "downscale_delay_s",
)
REPLICAS = "vllmlite"
"""Name of the replicas' deployment."""
MAX_REQUESTS_PER_INGRESS = 100_000
"""Requests beyond it would wait in Ray Serve's proxy; those in an ingress wait for a replica."""
REFUSED = {
    "data_parallel_size": "set min_replicas and max_replicas: Ray Serve starts the replicas",
    "host": "Ray Serve listens: see `serve start --http-host`",
    "port": "Ray Serve listens: see `serve start --http-port`",
    "uds": "Ray Serve listens: see `serve start`",
    "slot_save_path": "use `vllmlite serve`: each replica on Ray would have other prompts in its slots",
    "enable_sleep_mode": "use `vllmlite serve`: a request to sleep would reach one replica on Ray",
    **dict.fromkeys(
        ("enable_lora", "lora_modules", "lora_root", "lora_admin_key_file"),
        "replicas on Ray serve no adapters in this version: use `vllmlite serve`, with --data-parallel-size",
    ),
}


def app(args: Mapping[str, Any]) -> Any:
    """Return the application for ``serve.run``. Raises ParameterError for an option that does not exist."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import RequestRouterConfig

    options = {name.replace("-", "_"): _value(value) for name, value in args.items()}
    for name in options.keys() & REFUSED.keys():
        raise ParameterError(name, options[name], REFUSED[name])
    ray = {name: options.pop(name, default) for name, default in RAY_OPTIONS.items()}
    known = {field.name for field in fields(ServerConfig)}
    server = ServerConfig(**{name: options.pop(name) for name in options.keys() & known})
    server = replace(server, chat_template=read_template(server.chat_template))
    engine = EngineConfig.from_kwargs(**options)

    replicas = serve.deployment(
        Replica,
        name=REPLICAS,
        autoscaling_config={name: ray[name] for name in AUTOSCALING},
        max_ongoing_requests=engine.max_num_seqs,
        ray_actor_options={"num_cpus": ray["num_cpus"], "num_gpus": ray["num_gpus"]},
        request_router_config=RequestRouterConfig(
            request_router_class="vllmlite.ray_serve.router.PrefixRouter"
        ),
        graceful_shutdown_timeout_s=server.shutdown_timeout,
        health_check_period_s=5,
    )
    max_body_size = server.max_body_size

    def build() -> Ingress:
        """Return the application of an ingress, in its process."""
        handle = serve.get_deployment_handle(REPLICAS, serve.get_replica_context().app_name)
        return Ingress(handle.options(stream=True), RayActorError, max_body_size)

    ingress = serve.deployment(
        serve.ingress(build)(),
        name="ingress",
        num_replicas=ray["num_ingresses"],
        max_ongoing_requests=MAX_REQUESTS_PER_INGRESS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=server.shutdown_timeout,
    )
    return ingress.bind(replicas.bind(engine, server))


def _value(value: Any) -> Any:
    """Return the value of an argument, which the command line gives as text."""
    return yaml.safe_load(value) if isinstance(value, str) else value
