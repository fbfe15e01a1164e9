"""The example of a balancer: a server is restarted under load, and no request fails."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import PATIENCE, ROOT, Program, free_port

HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")


class Balancer:
    """haproxy with the example's configuration, in front of servers at two ports."""

    def __init__(self, folder: Path, ports: tuple[int, int]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        for old, new in (("8080", port), ("8001", ports[0]), ("8002", ports[1])):
            assert text.count(f"127.0.0.1:{old}") == 1
            text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
        (folder / "haproxy.cfg").write_text(text)
        assert HAPROXY is not None
        self._process = subprocess.Popen([HAPROXY, "-db", "-f", str(folder / "haproxy.cfg")])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)


@pytest.fixture
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture
def balancer(tmp_path: Path, ports: tuple[int, int]) -> Iterator[Balancer]:
    balancer = Balancer(tmp_path, ports)
    yield balancer
    balancer.close()


@pytest.mark.slow
def test_a_server_is_restarted_under_load_and_no_request_fails(
    balancer: Balancer, ports: tuple[int, int]
) -> None:
    programs = [Program("--port", str(port), "--device", "cpu") for port in ports]
    body = {"prompt": "Debian is", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def load(stream: bool) -> None:
        with httpx.Client(base_url=balancer.url, timeout=PATIENCE) as client:
            while not stop.is_set():
                try:
                    answer = client.post("/v1/completions", json={**body, "stream": stream})
                except httpx.HTTPError as error:
                    answers.append((0, f"{type(error).__name__}: {error}"))
                    return
                text = answer.text
                if answer.status_code == 200:
                    text = "[DONE]" if stream and "[DONE]" in text else answer.json()["choices"][0]["text"]
                answers.append((answer.status_code, text))

    def wait_for(count: int) -> None:
        want, deadline = len(answers) + count, time.monotonic() + PATIENCE
        while len(answers) < want:
            assert {status for status, _ in answers} <= {200}, answers[-8:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    threads = [threading.Thread(target=load, args=(index % 2 == 0,)) for index in range(4)]
    try:
        deadline = time.monotonic() + PATIENCE
        while httpx.get(f"{balancer.url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for thread in threads:
            thread.start()
        for index, port in enumerate(ports):
            wait_for(12)
            assert programs[index].stop() == 0
            programs[index].close()
            wait_for(12)
            programs[index] = Program("--port", str(port), "--device", "cpu")
            while not programs[index].has_answered():  # until then, haproxy may not know that it runs
                wait_for(1)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join(PATIENCE)
        for program in programs:
            program.close()
    texts = {text for _, text in answers}
    assert {status for status, _ in answers} == {200} and len(texts) == 2 and "[DONE]" in texts
