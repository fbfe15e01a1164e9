"""The Ray Serve application on a local cluster: it streams, scales with its requests, and survives a killed replica."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
pytest.importorskip("ray", reason="Ray is not installed")

import httpx
import psutil
import ray
from ray import serve
from served import ROOT, free_port

from vllmlite.errors import ParameterError
from vllmlite.ray_serve import app

PATIENCE = 240
OPTIONS = {
    "device": "cpu", "dtype": "float32", "threads": "1", "served-model-name": "[demo]", "max_replicas": "2",
    "target_ongoing_requests": "2", "upscale_delay_s": "1", "downscale_delay_s": "5",
}  # fmt: skip
BODY = {"model": "demo", "prompt": "Debian is", "temperature": 0, "stream": True}


def test_options_that_do_not_exist_are_refused_before_anything_starts() -> None:
    for options, name in (
        ({"no_such": 1}, "no_such"),
        ({"port": 1}, "port"),
        ({"lora-root": "/srv"}, "lora_root"),
        ({"slot-save-path": "/srv"}, "slot_save_path"),
        ({"max-num-seqs": "x"}, "max_num_seqs"),
    ):
        with pytest.raises(ParameterError, match=name):
            app(options)


@pytest.fixture
def url() -> Iterator[str]:
    port = free_port()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(
        num_cpus=4, include_dashboard=False, runtime_env={"env_vars": variables}, logging_level="warning"
    )
    serve.start(http_options={"port": port})
    serve.run(app(OPTIONS))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def running() -> int:
    """The number of replicas that run, or 0 while others start or stop."""
    states = serve.status().applications["default"].deployments["vllmlite"].replica_states
    return states.get("RUNNING", 0) if len(states) == 1 else 0


@pytest.mark.slow
def test_replicas_follow_the_load_and_one_may_die(url: str) -> None:
    answers: list[bool] = []
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not stop.is_set():
                try:
                    body = {**BODY, "max_tokens": 200, "ignore_eos": True}
                    with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                        answers.append(answer.status_code == 200 and "data: [DONE]" in answer.iter_lines())
                except httpx.HTTPError:
                    answers.append(False)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: running() == 2)
        assert answers and all(answers)
        replicas = [
            each.pid
            for each in psutil.process_iter()
            if "ServeReplica:default:vllmlite" in " ".join(each.cmdline())
        ]
        os.kill(replicas[0], signal.SIGKILL)
        done = len(answers)
        wait_for(lambda: len(answers) >= done + 30)
        # the streams of the dead replica broke off, and no others
        assert answers[done:].count(False) <= 8
        wait_for(lambda: running() == 2)
        done = len(answers)
        wait_for(lambda: len(answers) >= done + 16)
        assert all(answers[-8:])
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    wait_for(lambda: running() == 1)
