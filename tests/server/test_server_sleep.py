"""Sleep mode of the server: requests are refused with 503, finished, aborted or kept, and metrics show the state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import ENGINE, ask, client_of, post, posted, serving

from vllmlite.server.service import Service

COMPLETIONS = "/v1/completions"
SHORT: dict[str, Any] = {"prompt": "The Debian Project is", "temperature": 0, "max_tokens": 8}
LONG: dict[str, Any] = {**SHORT, "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, id="engine"), pytest.param(2, id="replicas", marks=pytest.mark.slow)],
)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    config = replace(ENGINE, enable_sleep_mode=True, data_parallel_size=request.param)
    with serving(config) as service:
        yield service


async def states(client: httpx.AsyncClient) -> dict[str, float]:
    """The value of the sleep state's metric for each state."""
    lines = (await client.get("/metrics")).text.splitlines()
    found = [line for line in lines if line.startswith("vllm:engine_sleep_state{")]
    return {line.split('sleep_state="')[1].split('"')[0]: float(line.split()[-1]) for line in found}


@pytest.mark.parametrize(("level", "state"), [(1, "weights_offloaded"), (2, "discard_all")])
def test_a_sleeping_server_refuses_requests_and_answers_the_same_later(
    service: Service, level: int, state: str
) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        rejections = service.metrics.rejections["sleeping"]
        names = "awake", "weights_offloaded", "discard_all"
        before = (await posted(client, COMPLETIONS, **SHORT))["choices"]
        assert await states(client) == {name: float(name == "awake") for name in names}
        assert (await client.post(f"/sleep?level={level}")).status_code == 200
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert await states(client) == {name: float(name == state) for name in names}
        assert (await client.get("/health")).json()["status"] == "sleeping"
        for path, body in ((COMPLETIONS, SHORT), ("/completion", SHORT), ("/v1/embeddings", {"input": "x"})):
            answer = await client.post(path, json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert "sleeps" in answer.json()["error"]["message"]
        assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 200
        assert (await client.post("/wake_up?tags=weights")).status_code == 200
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert (await client.post("/wake_up?tags=kv_cache")).status_code == 200
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}
        assert (await posted(client, COMPLETIONS, **SHORT))["choices"] == before
        assert (await client.get("/health")).json()["status"] == "ok"
        assert (await client.get("/load")).json() == {"server_load": 0}
        assert service.metrics.rejections["sleeping"] == rejections + 3

    ask(service, work)


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_unfinished_requests_end_as_asked(service: Service, mode: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        expected = await posted(client, COMPLETIONS, **LONG)
        running = asyncio.create_task(client.post(COMPLETIONS, json=LONG))
        while not service.admission.num_unfinished:
            await asyncio.sleep(0)
        assert (await client.post(f"/sleep?mode={mode}")).status_code == 200
        assert service.admission.num_unfinished == (1 if mode == "keep" else 0) or not running.done()
        assert (await client.post("/wake_up")).status_code == 200
        answer = await running
        if mode == "abort":
            assert answer.status_code == 503 and "aborted" in answer.json()["error"]["message"]
        else:
            assert answer.json()["choices"] == expected["choices"]
        assert (await posted(client, COMPLETIONS, **SHORT))["choices"]

    ask(service, work)


def test_requests_are_refused_while_the_engine_waits_for_others(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        running = asyncio.create_task(client.post(COMPLETIONS, json=LONG))
        while not service.admission.num_unfinished:
            await asyncio.sleep(0)
        sleeping = asyncio.create_task(client.post("/sleep?mode=wait"))
        while (await client.post(COMPLETIONS, json=SHORT)).status_code != 503:
            pass
        assert (await running).status_code == 200
        assert (await sleeping).status_code == 200
        assert (await client.post("/wake_up")).status_code == 200

    ask(service, work)


@pytest.mark.parametrize(
    "query", ["/sleep?level=3", "/sleep?level=x", "/sleep?mode=other", "/wake_up?tags=other"]
)
def test_wrong_values_are_refused(service: Service, query: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.post(query)
        assert answer.status_code == 400, answer.text
        assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}

    ask(service, work)


def test_a_server_without_sleep_mode_has_no_such_endpoints() -> None:
    with serving() as service:
        assert ask(service, lambda client: client.post("/sleep")).status_code == 404
        assert post(service, COMPLETIONS, **SHORT)


def test_the_endpoints_need_the_key() -> None:
    with serving(replace(ENGINE, enable_sleep_mode=True)) as service:

        async def work() -> None:
            async with client_of(service, keys=("secret",)) as client:
                for path in ("/sleep", "/wake_up"):
                    assert (await client.post(path)).status_code == 401
                assert (await client.get("/is_sleeping")).status_code == 401

        asyncio.run(work())
