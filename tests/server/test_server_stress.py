"""What must hold when clients disconnect, queues fill, steps raise and readers are slow."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import ENGINE, client_of, serving

from vllmlite import EngineConfig, SamplingParams
from vllmlite.async_llm import MAX_FAILED_STEPS, NewRequest
from vllmlite.outputs import EngineStats
from vllmlite.server.metrics import StatsLog
from vllmlite.server.service import Service

T = TypeVar("T")
LONG = {"prompt": "The Debian Project is", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 8}
COMPLETIONS = "/v1/completions"


def run(service: Service, work: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    async def with_client() -> T:
        async with client_of(service) as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(with_client(), 300))


async def is_empty(service: Service) -> None:
    """Wait until nothing runs; raise unless every block, slot and reference count is returned."""
    engine = service.engine.llm_engine.engine
    for _ in range(1000):
        if not engine.has_unfinished_requests() and service.num_answering == 0:
            break
        await asyncio.sleep(0.02)
    stats = await service.engine.stats()
    engine.scheduler.check_integrity()  # in another thread than its own, which has nothing to do
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert service.admission.num_unfinished == 0
    assert not service.engine._streams


def test_a_closed_stream_is_gone_before_the_next_step() -> None:
    async def leave(service: Service) -> None:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        stream = await service.engine.submit([NewRequest(str(i), "Debian", params) for i in range(3)])
        while not await stream.take():
            pass
        stream.close()
        assert (await service.engine.stats()).num_used_blocks == 0

    with serving() as service:
        asyncio.run(leave(service))


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_its_blocks(streams: bool) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {**LONG, "stream": streams, "n": 3, "temperature": 1}
        if streams:
            async with client.stream("POST", COMPLETIONS, json=body) as answer:
                async for _ in answer.aiter_lines():
                    break
        else:
            waiting = asyncio.create_task(client.post(COMPLETIONS, json=body))
            while (await service.engine.stats()).num_running < 3:
                await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await is_empty(service)
        assert service.metrics.finished["abort"] == 3
        tokens = (await service.engine.stats()).num_generation_tokens
        assert tokens < 3 * 200

    with serving() as service:
        run(service, work)


def test_a_full_queue_answers_with_retry_after() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=LONG) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429, 429]
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
                assert answer.json()["error"]["type"] == "rate_limit_error"
        assert (await client.post(COMPLETIONS, json=SHORT)).status_code == 200
        too_many = await client.post(COMPLETIONS, json={**SHORT, "n": 4, "temperature": 1})
        assert too_many.status_code == 400
        await is_empty(service)

    config = EngineConfig(dtype="float32", max_model_len=256, device="cpu", max_num_seqs=2)
    with serving(config, max_queue=1) as service:
        run(service, work)


def break_steps(service: Service, count: int) -> None:
    """Make the next ``count`` launches raise."""
    runner: Any = service.engine.llm_engine.engine.runner
    launch = runner.launch
    left = [count]

    def fail(schedule: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            runner.launch = launch
        raise RuntimeError("the device is on fire")

    runner.launch = fail


def test_a_step_that_throws_fails_its_requests_alone() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        good = (await client.post(COMPLETIONS, json=SHORT)).json()["choices"]
        async with client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            break_steps(service, 1)
            rest = [line async for line in lines if line]
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert (
            "on fire" in error["message"] and error["type"] == "server_error" and rest[-1] == "data: [DONE]"
        )
        health = (await client.get("/health")).json()
        assert health == {
            "status": "degraded",
            "failed_steps": 1,
            "last_error": "RuntimeError: the device is on fire",
        }
        assert (await client.post(COMPLETIONS, json=SHORT)).json()["choices"] == good
        assert (await client.get("/health")).json()["status"] == "ok"
        break_steps(service, 1)
        failed = await client.post(COMPLETIONS, json=SHORT)
        assert failed.status_code == 500 and "on fire" in failed.json()["error"]["message"]
        await is_empty(service)

    with serving() as service:
        run(service, work)


def test_an_engine_that_keeps_failing_is_declared_dead() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        died = asyncio.Event()
        service.engine.on_death(died.set)
        break_steps(service, 100)
        for _ in range(MAX_FAILED_STEPS):
            assert (await client.post(COMPLETIONS, json=SHORT)).status_code in (500, 503)
        await asyncio.wait_for(died.wait(), 60)
        for answer in (await client.get("/health"), await client.post(COMPLETIONS, json=SHORT)):
            assert answer.status_code == 503 and "on fire" in answer.json()["error"]["message"]
        assert service.admission.num_unfinished == 0

    with serving() as service:
        run(service, work)


def test_a_bug_outside_a_step_fails_all_open_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(outputs: object) -> None:
        raise RuntimeError("a bug")

    async def work(client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(service.engine.llm_engine._processor, "process", fail)
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=LONG) for _ in range(4)))
        assert {answer.status_code for answer in answers} == {503}
        assert (await client.get("/health")).status_code == 503

    with serving() as service:
        run(service, work)


def test_a_slow_reader_does_not_delay_others_and_loses_nothing() -> None:
    body = {**LONG, "stream": True, "logprobs": 20, "n": 4, "temperature": 1, "seed": 1, "max_tokens": 40}

    async def work(client: httpx.AsyncClient) -> None:
        slow = socket.create_connection((client.base_url.host, client.base_url.port or 80))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(_request(body))
        while not service.engine.llm_engine.has_unfinished_requests():
            await asyncio.sleep(0.01)
        assert (await client.post(COMPLETIONS, json=SHORT)).status_code == 200
        while service.engine.llm_engine.has_unfinished_requests():  # the slow one's, which has read nothing
            await asyncio.sleep(0.05)
        assert service.num_answering == 1
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # or TCP waits at each small buffer
        received = await asyncio.to_thread(_read_all, slow)
        assert received.count(b'finish_reason":"length"') == 4 and b"data: [DONE]" in received
        await is_empty(service)

    async def with_small_buffers() -> None:
        async with client_of(service, send_buffer=4096) as client:
            await work(client)

    with serving() as service:
        asyncio.run(asyncio.wait_for(with_small_buffers(), 300))


def test_statistics_are_logged_only_if_something_ran() -> None:
    now = EngineStats(num_blocks=10)
    log = StatsLog(lambda: now, 10.0)
    assert log.line() is None
    now = EngineStats(
        num_blocks=10, num_used_blocks=5, num_running=2, num_waiting=1, num_prompt_tokens=50,
        num_generation_tokens=100, prefix_cache_queries=50, prefix_cache_hits=10,
    )  # fmt: skip
    assert log.line() == (
        "Avg prompt throughput: 5.0 tokens/s, Avg generation throughput: 10.0 tokens/s, Running: 2 reqs, "
        "Waiting: 1 reqs, KV cache usage: 50.0%, Prefix cache hit rate: 20.0%"
    )
    now = EngineStats(
        num_blocks=10, num_prompt_tokens=50, num_generation_tokens=110, prefix_cache_queries=50, prefix_cache_hits=10,
        num_drafts=4, num_draft_tokens=16, num_accepted_tokens=6, draft_seconds=2.0, plain_seconds=3.0,
    )  # fmt: skip
    assert log.line() == (
        "Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 1.0 tokens/s, Running: 0 reqs, "
        "Waiting: 0 reqs, KV cache usage: 0.0%, Prefix cache hit rate: 0.0%, Mean acceptance length: 2.50, "
        "Drafted: 16 tokens, Accepted: 6 tokens, Avg draft acceptance rate: 37.5%, "
        "Speed-up over plain steps: 1.50x"
    )
    assert log.line() is None


def _request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    )
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def _read_all(connection: socket.socket) -> bytes:
    received = bytearray()
    with connection:
        while piece := connection.recv(1 << 16):
            received += piece
    return bytes(received)


@pytest.mark.parametrize(
    ("connections", "requests"), [(40, 200), pytest.param(1000, 10_000, marks=pytest.mark.slow)]
)
def test_many_clients_of_which_a_third_disconnects(connections: int, requests: int) -> None:
    """Every request is answered or cancelled, no block is leaked, and memory does not grow."""
    draw = random.Random(0)
    memory: list[int] = []

    async def one(client: httpx.AsyncClient, number: int) -> str:
        streams, leaves = draw.random() < 0.5, draw.random() < 1 / 3
        count = draw.randint(1, 24)
        body = {**SHORT, "prompt": f"Package {number % 97}", "max_tokens": count, "stream": streams}
        patience = draw.random() * 0.5 if leaves else 300
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        try:
            writer.write(_request(body))
            async with asyncio.timeout(patience):
                answer = await reader.read(-1)
        except TimeoutError:
            return "cancelled"
        finally:
            writer.transport.abort()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
        assert b"data: [DONE]" in answer if streams else b'"usage"' in answer, answer
        return "answered"

    async def work(client: httpx.AsyncClient) -> None:
        numbers = iter(range(requests))
        ends: list[str] = []

        async def worker() -> None:
            for number in numbers:
                ends.append(await one(client, number))
                if len(ends) % max(requests // 20, 1) == 0:
                    memory.append(_resident())

        await asyncio.gather(*(worker() for _ in range(connections)))
        assert len(ends) == requests and {"answered", "cancelled"} == set(ends)
        await is_empty(service)

    config = replace(ENGINE, num_gpu_blocks_override=512)
    with serving(config, max_queue=2000) as service:
        begin = time.monotonic()
        run(service, work)
        if requests >= 10_000:
            half = memory[len(memory) // 2 :]
            print(f"{time.monotonic() - begin:.0f} s; resident {[size >> 20 for size in memory]} MiB")
            assert max(half) < 1.05 * min(half)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
