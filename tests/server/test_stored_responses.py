"""Stored responses: continued, fetched, deleted, generated in the background; kept in memory, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import ask, check, client_of, posted, serving, streamed

from vllmlite.server.errors import ApiError
from vllmlite.server.responses.protocol import ResponseObject
from vllmlite.server.responses.store import ResponseStore, StoredResponse
from vllmlite.server.service import Service

PATH = "/v1/responses"
SHORT: dict[str, Any] = {"temperature": 0, "max_output_tokens": 6}
LONG: dict[str, Any] = {"temperature": 0, "max_output_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def keeping() -> Iterator[Service]:
    with serving(max_stored_responses=3) as service:
        yield service


async def got(client: httpx.AsyncClient, path: str, status: int = 200) -> Any:
    answer = await client.get(path)
    assert answer.status_code == status, answer.text
    return answer.json()


def text_of(response: Any) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def test_a_response_continues_another(keeping: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        first = await posted(client, PATH, input="Hi", **SHORT)
        check(ResponseObject, first)
        assert first["store"] and await got(client, f"{PATH}/{first['id']}") == first
        second = await posted(client, PATH, input="And dpkg?", previous_response_id=first["id"], **SHORT)
        assert second["previous_response_id"] == first["id"]
        spelled = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": text_of(first)},
            {"role": "user", "content": "And dpkg?"},
        ]
        whole = await posted(client, PATH, input=spelled, store=False, **SHORT)
        assert (
            text_of(second) == text_of(whole)
            and second["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
        )
        assert not whole["store"]
        await got(client, f"{PATH}/{whole['id']}", 404)
        third = await posted(client, PATH, input="Why?", previous_response_id=second["id"], **SHORT)
        page = await got(client, f"{PATH}/{third['id']}/input_items")
        assert [item["content"][0]["text"] for item in page["data"]] == ["Why?"] and not page["has_more"]
        events = [data for _, data in await streamed(client, PATH, input="Hi", **SHORT)]
        assert await got(client, f"{PATH}/{events[-1]['response']['id']}") == events[-1]["response"]
        await got(client, f"{PATH}/{first['id']}", 404)  # three are kept
        error = await posted(client, PATH, 404, input="x", previous_response_id=first["id"])
        assert error["error"]["param"] == "previous_response_id"
        assert (await client.delete(f"{PATH}/{third['id']}")).json()["deleted"]
        await got(client, f"{PATH}/{third['id']}", 404)
        assert (await client.delete(f"{PATH}/{third['id']}")).status_code == 404

    ask(keeping, work)


def test_input_items_are_paginated(keeping: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        items = [{"role": "user", "content": str(number)} for number in range(5)]
        path = f"{PATH}/{(await posted(client, PATH, input=items, **SHORT))['id']}/input_items"
        found, after = "", ""
        while True:
            page = await got(client, f"{path}?order=asc&limit=2{after}")
            found += "".join(item["content"] for item in page["data"])
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        assert found == "01234"
        assert [item["content"] for item in (await got(client, path))["data"]] == list("43210")
        await got(client, f"{path}?after=nothing", 400)
        await got(client, f"{path}?limit=0", 400)

    ask(keeping, work)


def test_a_response_can_be_generated_in_the_background(keeping: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        begun = await posted(client, PATH, input="Hi", background=True, **SHORT)
        check(ResponseObject, begun)
        assert begun["status"] == "in_progress" and begun["background"]
        while (found := await got(client, f"{PATH}/{begun['id']}"))["status"] == "in_progress":
            await asyncio.sleep(0.01)
        plain = await posted(client, PATH, input="Hi", store=False, **SHORT)
        assert found["status"] == plain["status"] and text_of(found) == text_of(plain)

        running = [await posted(client, PATH, input="Hi", background=True, **LONG) for _ in range(3)]
        error = await posted(client, PATH, 400, input="x", previous_response_id=running[0]["id"])
        assert "has not finished" in error["error"]["message"]
        for response in running:
            ended = await posted(client, f"{PATH}/{response['id']}/cancel")
            assert ended["status"] in ("cancelled", "incomplete")
            assert await got(client, f"{PATH}/{response['id']}") == ended
        assert (await posted(client, f"{PATH}/{running[0]['id']}/cancel"))["status"] != "in_progress"
        answered = await posted(client, PATH, input="Hi", **SHORT)
        await posted(client, f"{PATH}/{answered['id']}/cancel", 400)
        for body in ({"background": True, "stream": True}, {"background": True, "store": False}):
            await posted(client, PATH, 400, input="x", **body)

    ask(keeping, work)
    assert keeping.admission.num_unfinished == 0


def test_only_the_key_that_made_a_response_can_read_it(keeping: Service) -> None:
    async def work() -> None:
        async with client_of(keeping, ("a", "b")) as client:
            client.headers["authorization"] = "Bearer a"
            path = f"{PATH}/{(await posted(client, PATH, input='Hi', **SHORT))['id']}"
            client.headers["authorization"] = "Bearer b"
            for url in (path, f"{path}/input_items"):
                await got(client, url, 404)
            assert (await client.delete(path)).status_code == 404
            await posted(client, f"{path}/cancel", 404)
            for url in (PATH, f"{PATH}/input_tokens"):
                await posted(client, url, 404, input="x", previous_response_id=path.rpartition("/")[2])
            client.headers["authorization"] = "Bearer a"
            await got(client, path)

    asyncio.run(work())


def _stored(owner: bytes, number: int, size: int = 0) -> StoredResponse:
    response: Any = {"id": f"{owner.decode()}{number}", "output": []}
    return StoredResponse(response, owner, [{"text": "x" * size}], 1)


def _kept(store: ResponseStore, owner: bytes, count: int) -> list[int]:
    found = []
    for number in range(count):
        with suppress(ApiError):
            store.find(owner, f"{owner.decode()}{number}")
            found.append(number)
    return found


def test_a_key_that_stores_much_evicts_its_own_responses_alone() -> None:
    store = ResponseStore(3)
    for number in range(3):
        store.keep(_stored(b"a", number))
    for number in range(50):
        store.keep(_stored(b"b", number))
    assert _kept(store, b"a", 3) == [0, 1, 2] and _kept(store, b"b", 50) == [47, 48, 49]
    with pytest.raises(ApiError):
        store.find(b"a", "b49")


def test_the_key_that_stores_most_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllmlite.server.responses.store.MAX_BYTES_PER_KEY", 5000)
    monkeypatch.setattr("vllmlite.server.responses.store.MAX_BYTES", 9000)
    store = ResponseStore(100)
    store.keep(_stored(b"c", 0, 1000))
    for number in range(10):
        store.keep(_stored(b"a", number, 1000))
    assert _kept(store, b"a", 10) == [6, 7, 8, 9]
    for number in range(10):
        store.keep(_stored(b"b", number, 1000))
        assert sum(shelf.size for shelf in store._shelves.values()) <= 9000
    assert _kept(store, b"c", 1) == [0]
    kept = [len(_kept(store, owner, 10)) for owner in (b"a", b"b")]
    assert sum(kept) == 7 and min(kept) == 3
    store.keep(_stored(b"a", 10, 20_000))  # more than all may have: it is kept alone
    assert store.find(b"a", "a10") and _kept(store, b"a", 10) == []


def test_no_client_chooses_the_id_of_a_stored_response(keeping: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        client.headers["x-request-id"] = "7"
        first = await posted(client, PATH, input="Hi", **SHORT)
        second = await posted(client, PATH, input="Why?", request_id="7", **SHORT)
        assert first["id"] != second["id"] and await got(client, f"{PATH}/{first['id']}") == first
        running = [
            await posted(client, PATH, input="Hi", background=True, request_id="7", **LONG) for _ in range(3)
        ]
        error = await posted(client, PATH, 429, input="Hi", background=True, request_id="7", **LONG)
        assert error["error"]["code"] == "queue_full"
        for response in running:
            await posted(client, f"{PATH}/{response['id']}/cancel")
        assert (await posted(client, PATH, input="Hi", store=False, **SHORT))["id"] == "resp_7"

    ask(keeping, work)


def test_nothing_is_stored_unless_the_server_is_told_to() -> None:
    async def work(client: httpx.AsyncClient) -> None:
        response = await posted(client, PATH, input="Hi", store=True, **SHORT)
        assert response["store"] is False
        await got(client, f"{PATH}/{response['id']}", 404)
        for field, value in (("previous_response_id", response["id"]), ("background", True)):
            error = (await posted(client, PATH, 400, input="x", **{field: value}))["error"]
            assert error["param"] == field and "--max-stored-responses" in error["message"]

    with serving() as plain:
        ask(plain, work)
