"""The Ray Serve application on a local cluster: it streams, scales with its requests, survives a killed replica, and
sends prompts that begin alike to one replica."""

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
        ({"enable-sleep-mode": True}, "enable_sleep_mode"),
        ({"max-num-seqs": "x"}, "max_num_seqs"),
    ):
        with pytest.raises(ParameterError, match=name):
            app(options)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of an empty cluster's HTTP proxy."""
    port = free_port()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(
        num_cpus=4, include_dashboard=False, runtime_env={"env_vars": variables}, logging_level="warning"
    )
    serve.start(http_options={"port": port})
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
    serve.run(app(OPTIONS))
    answers: list[bool] = []
    whole: list[int] = []
    """The statuses of answers that are not streams."""
    stop = threading.Event()

    def load(stream: bool) -> None:
        with httpx.Client(timeout=PATIENCE) as client:
            while not stop.is_set():
                try:
                    body = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": stream}
                    if not stream:
                        whole.append(client.post(f"{url}/v1/completions", json=body).status_code)
                        continue
                    with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                        answers.append(answer.status_code == 200 and "data: [DONE]" in answer.iter_lines())
                except httpx.HTTPError:
                    answers.append(False)

    threads = [threading.Thread(target=load, args=(index % 2 == 0,)) for index in range(8)]
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
        assert answers[done:].count(False) <= 4
        wait_for(lambda: running() == 2)
        done = len(answers)
        wait_for(lambda: len(answers) >= done + 16)
        assert all(answers[-8:])
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    # a request whose answer had not begun was sent to the other replica
    assert whole and set(whole) == {200}
    wait_for(lambda: running() == 1)


@pytest.mark.slow
def test_prompts_that_begin_alike_go_to_the_replica_that_has_computed_them(url: str) -> None:
    serve.run(app({**OPTIONS, "min_replicas": "2", "enable_prompt_tokens_details": "true"}))
    wait_for(lambda: running() == 2)

    def cached(text: str, **more: object) -> int:
        """The number of prompt tokens that a replica had in its cache."""
        messages = [{"role": "user", "content": text}]
        body = {"model": "demo", "messages": messages, "max_tokens": 1, **more}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    topics = [f"{index} is the number of this text, which is long enough. " * 20 for index in range(8)]
    # by turns or by chance, half of them would go to the other replica
    firsts = [cached(topic) for topic in topics]
    for topic, first in zip(topics, firsts, strict=True):
        assert cached(f"{topic} And then?") >= first + 100
    assert cached(topics[0], cache_salt="another") == 0
    refused = httpx.post(f"{url}/v1/completions", content=b"x" * (33 << 20), timeout=PATIENCE)
    assert refused.status_code == 413 and "max-body-size" in refused.text

    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**BODY, "max_tokens": 1500, "ignore_eos": True}
    ) as answer:
        next(answer.iter_lines())
    wait_for(lambda: [httpx.get(f"{url}/load").json()["server_load"] for _ in range(4)] == [0] * 4)
