"""The examples of balancers: a server is restarted under load, and no request fails; streams are not held back."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import PATIENCE, ROOT, Program, free_port

PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin"


class Balancer:
    """A balancer with its example's configuration, in front of servers at two ports."""

    def __init__(self, name: str, folder: Path, ports: tuple[int, int]) -> None:
        program = shutil.which(name, path=PATH)
        if program is None:
            pytest.skip(f"{name} is not installed")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        example = "haproxy.cfg" if name == "haproxy" else "nginx.conf"
        text = (ROOT / "deploy" / example).read_text()
        for old, new in (("8080", port), ("8001", ports[0]), ("8002", ports[1])):
            assert text.count(f"127.0.0.1:{old}") == 1
            text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
        (folder / example).write_text(text)
        if name == "haproxy":
            command = [program, "-db", "-f", str(folder / example)]
        else:
            (folder / "main.conf").write_text(
                f"daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
                f"http {{ access_log off; include {folder / example}; }}\n"
            )
            command = [program, "-e", "stderr", "-p", str(folder), "-c", str(folder / "main.conf")]
        self._process = subprocess.Popen(command)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)


@pytest.fixture
def ports() -> tuple[int, int]:
    return free_port(), free_port()


@pytest.fixture(params=["haproxy", "nginx"])
def balancer(request: pytest.FixtureRequest, tmp_path: Path, ports: tuple[int, int]) -> Iterator[Balancer]:
    balancer = Balancer(request.param, tmp_path, ports)
    yield balancer
    balancer.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status(url: str) -> int:
    """The status of an answer to GET, or 0 without one."""
    try:
        return httpx.get(url).status_code
    except httpx.HTTPError:
        return 0


def test_an_event_passes_before_the_next_one_exists(balancer: Balancer, ports: tuple[int, int]) -> None:
    """The server sends its second event only when the client has the first."""
    received = threading.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # the test is over
                return
            with connection:
                request = connection.recv(65536)
                connection.sendall(head)
                if b"/v1/completions" in request:
                    connection.sendall(b"data: 1\n\n")
                    assert received.wait(PATIENCE)
                    connection.sendall(b"data: 2\n\n")

    with socket.create_server(("127.0.0.1", ports[0])) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        try:
            wait_until(lambda: status(f"{balancer.url}/health") == 200)
            with httpx.stream("GET", f"{balancer.url}/v1/completions", timeout=PATIENCE) as answer:
                lines = (line for line in answer.iter_lines() if line)
                assert next(lines) == "data: 1"
                received.set()
                assert [*lines] == ["data: 2"]
        finally:
            received.set()
            listener.shutdown(socket.SHUT_RDWR)
            server.join(PATIENCE)


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
        want = len(answers) + count

        def answered() -> bool:
            assert {status for status, _ in answers} <= {200}, answers[-8:]
            return len(answers) >= want

        wait_until(answered)

    threads = [threading.Thread(target=load, args=(index % 2 == 0,)) for index in range(4)]
    try:
        wait_until(lambda: status(f"{balancer.url}/health") == 200)
        for thread in threads:
            thread.start()
        for index, port in enumerate(ports):
            wait_for(12)
            assert programs[index].stop() == 0
            programs[index].close()
            wait_for(12)
            programs[index] = Program("--port", str(port), "--device", "cpu")
            while not programs[index].has_answered():  # until then, the balancer may not know that it runs
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
