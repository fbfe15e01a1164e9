"""Adapters in the server: as models of their own names, loaded and unloaded while it runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from native import HAS_NATIVE_CPU
from peft_files import random_factors, write_peft
from served import ENGINE, ask, client_of, posted, program, serving, streamed

from vllmlite.cli import main
from vllmlite.errors import ParameterError
from vllmlite.server.adapters import read_module
from vllmlite.server.config import ServerConfig
from vllmlite.server.service import Service

if not HAS_NATIVE_CPU:
    pytest.importorskip("torch", reason="neither the native CPU backend nor torch is installed")
BACKEND = "cpu" if HAS_NATIVE_CPU else "torch"

ADMIN = {"authorization": "Bearer admin"}
GREEDY: dict[str, Any] = {"prompt": "Debian is", "temperature": 0, "max_tokens": 8}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with adapters ``one`` and ``two`` of the built-in model."""
    root = tmp_path_factory.mktemp("root")
    for number, name in enumerate(("one", "two")):
        shapes = {f"model.layers.{layer}.self_attn.v_proj": (128, 256) for layer in (0, 1)}
        write_peft(root / name, random_factors(shapes, 4, number), lora_alpha=1, layers_to_transform=[0, 1])
    return root


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[Service]:
    """A service that serves the adapter ``first``."""
    config = replace(ENGINE, backend=BACKEND, enable_lora=True, max_loras=1, max_num_seqs=8)
    with serving(config, lora_root=str(root)) as service:
        asyncio.run(service.adapters.load_modules([f"first={root / 'one'}"]))
        yield service


async def call(client: httpx.AsyncClient, path: str, status: int = 200, /, **body: Any) -> str:
    """Post as the administrator of adapters."""
    headers = {**ADMIN, "content-type": "application/json"}
    answer = await client.post(path, content=json.dumps(body), headers=headers)  # surrogates as escapes
    assert answer.status_code == status, answer.text
    return answer.text


def test_every_api_takes_an_adapters_name_as_its_model(service: Service) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    async def work(client: httpx.AsyncClient) -> None:
        chat = {"messages": messages, "max_tokens": 6, "temperature": 0}
        requests: dict[str, dict[str, Any]] = {
            "/v1/completions": GREEDY,
            "/v1/chat/completions": chat,
            "/v1/responses": {"input": "Hello", "max_output_tokens": 6, "temperature": 0},
            "/v1/messages": chat,
            "/completion": {"prompt": "Debian is", "n_predict": 6, "temperature": 0},
            "/v1/embeddings": {"input": "Debian"},
        }
        names = {"id", "created", "created_at", "model", "usage", "timings", "completed_at"}
        for path, body in requests.items():
            base = await posted(client, path, model="demo", **body)
            found = await posted(client, path, model="first", **body)
            assert (base["model"], found["model"]) == ("demo", "first")
            assert {k: v for k, v in base.items() if k not in names} != {
                k: v for k, v in found.items() if k not in names
            }, path
        events = await streamed(client, "/v1/completions", model="first", **GREEDY)
        assert {data["model"] for _, data in events if data != "[DONE]"} == {"first"}
        for path, body in requests.items():
            await posted(client, path, 404, model="third", **body)
        await posted(client, "/embedding", 404, model="third", content="x")
        for path in ("/chat/completions", "/apply-template"):
            await posted(client, path, 404, model="third", **chat)

    ask(service, work)


def test_adapters_are_listed_with_their_parent(service: Service, root: Path) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        cards = (await client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [("demo", None), ("first", "demo")]
        assert (await client.get("/v1/models/first")).json()["root"] == str(root / "one")
        adapters = (await client.get("/lora-adapters")).json()
        assert [entry["path"] for entry in adapters] == [str(root / "one")]

    ask(service, work)


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(service: Service, root: Path) -> None:
    async def work() -> None:
        async with client_of(service, lora_keys=("admin",)) as client:
            assert "added" in await call(client, LOAD, lora_name="new", lora_path="two")
            with_path = await posted(client, "/v1/completions", model="new", **GREEDY)
            assert "'new'" in await call(client, LOAD, 400, lora_name="new", lora_path="two")
            await call(client, LOAD, lora_name="new", lora_path=str(root / "one"), load_inplace=True)
            other = await posted(client, "/v1/completions", model="new", **GREEDY)
            first = await posted(client, "/v1/completions", model="first", **GREEDY)
            assert other["choices"] == first["choices"] != with_path["choices"]
            await call(client, UNLOAD, 400, lora_name="new", lora_int_id=99)
            assert "removed" in await call(client, UNLOAD, lora_name="new")
            await posted(client, "/v1/completions", 404, model="new", **GREEDY)
            message = (await posted(client, "/completion", 404, model="new", prompt="x"))["error"]["message"]
            assert message == "model='new': is not served; served: demo, first"
            assert "did you mean first" in await call(client, UNLOAD, 404, lora_name="firs")

    asyncio.run(work())


def test_unloading_does_not_end_requests(service: Service) -> None:
    """Requests that stream go on; one that waits for the slot on the device is answered, too."""

    async def work() -> None:
        async with client_of(service, lora_keys=("admin",)) as client:
            await call(client, LOAD, lora_name="brief", lora_path="two")
            body = {**GREEDY, "max_tokens": 60, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json={**body, "model": "brief"}) as answer:
                lines = answer.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                other = asyncio.create_task(posted(client, "/v1/completions", model="first", **GREEDY))
                waits = asyncio.create_task(posted(client, "/v1/completions", model="brief", **GREEDY))
                await asyncio.sleep(0.05)
                await call(client, UNLOAD, lora_name="brief")
                rest = [line async for line in lines]
            assert rest[-2:] == ["data: [DONE]", ""]
            assert (await other)["choices"][0]["text"]
            assert (await waits)["model"] == "brief"

    asyncio.run(work())


def test_of_requests_that_load_one_name_at_once_one_succeeds(service: Service) -> None:
    async def work() -> None:
        async with client_of(service, lora_keys=("admin",)) as client:
            body = {"lora_name": "same", "lora_path": "two"}
            answers = await asyncio.gather(
                *(client.post(LOAD, json=body, headers=ADMIN) for _ in range(5)),
                *(client.post(UNLOAD, json={"lora_name": "same"}, headers=ADMIN) for _ in range(2)),
            )
            statuses = [answer.status_code for answer in answers]
            assert statuses[:5].count(200) >= 1
            assert set(statuses[:5]) <= {200, 400} and set(statuses[5:]) <= {200, 404}
            await client.post(UNLOAD, json={"lora_name": "same"}, headers=ADMIN)
            cards = (await client.get("/v1/models")).json()["data"]
            assert "same" not in [card["id"] for card in cards]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"lora_name": "demo", "lora_path": "two"}, "is a name of the model"),
        ({"lora_name": "", "lora_path": "two"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "two"}, "lora_name"),
        ({"lora_name": "x" * 1000, "lora_path": "two"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x", "lora_path": ""}, "lora_path"),
        ({"lora_name": "x", "lora_path": "../outside"}, "must be inside"),
        ({"lora_name": "x", "lora_path": "/etc/passwd"}, "must be inside"),
        ({"lora_name": "x", "lora_path": "link"}, "must be inside"),
        ({"lora_name": "x", "lora_path": "owner/name"}, "cannot be read"),
        ({"lora_name": "x", "lora_path": "two\0"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "\ud800"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "a" * 5000}, "cannot be read"),
        ({"lora_name": "\ud800", "lora_path": "two"}, "lora_name"),
    ],
)
def test_bad_requests_to_load_are_refused(
    service: Service, root: Path, body: dict[str, str], says: str
) -> None:
    if not (root / "link").exists():
        factors = random_factors({"model.layers.0.self_attn.v_proj": (128, 256)}, 4)
        (root / "link").symlink_to(write_peft(root.parent / "outside", factors, layers_to_transform=0))

    async def work() -> None:
        async with client_of(service, lora_keys=("admin",)) as client:
            assert says in await call(client, LOAD, 400, **body)
            assert list(service.adapters.all()) == ["first"]

    asyncio.run(work())


def test_a_slash_in_a_name_is_part_of_it(service: Service) -> None:
    async def work() -> None:
        async with client_of(service, lora_keys=("admin",)) as client:
            await call(client, LOAD, lora_name="team/../x", lora_path="two")
            assert (await client.get("/v1/models/team/..%2Fx")).json()["id"] == "team/../x"
            await call(client, UNLOAD, lora_name="team/../x")

    asyncio.run(work())


def test_loading_has_a_key_of_its_own(service: Service) -> None:
    body = {"lora_name": "new", "lora_path": "two"}

    async def work() -> None:
        async with client_of(service, ("user",)) as client:
            for headers in (ADMIN, {"authorization": "Bearer user"}):
                answer = await client.post(LOAD, json=body, headers=headers)
                assert answer.status_code in (401, 404)
        async with client_of(service, ("user",), lora_keys=("admin",)) as client:
            for headers, status in (({}, 401), ({"authorization": "Bearer user"}, 401), (ADMIN, 200)):
                assert (await client.post(LOAD, json=body, headers=headers)).status_code == status
            assert (await client.get("/v1/models", headers=ADMIN)).status_code == 401
            assert (await client.post(UNLOAD, json=body)).status_code == 401
            await call(client, UNLOAD, lora_name="new")

    asyncio.run(work())


def test_metrics_count_requests_by_adapter(service: Service) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        await posted(client, "/v1/completions", model="first", **GREEDY)
        text = (await client.get("/metrics")).text
        assert 'vllm:lora_requests_info{max_lora="1",running_lora_adapters="' in text
        assert 'vllmlite:lora_requests_total{engine="0",lora_name="first",model_name="demo"}' in text

    ask(service, work)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name", "NAME=PATH"),
        ("=path", "NAME=PATH"),
        ("{", "is not JSON"),
        ('{"name": "a"}', "must have name and path"),
        ('{"name": "a", "path": "b", "more": 1}', "must have name and path"),
        ('{"name": "a", "path": 1}', "must have name and path"),
    ],
)
def test_bad_modules_are_refused(text: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        read_module(text)


def test_modules_are_given_as_vllm_takes_them() -> None:
    assert read_module("a=b=c") == {"name": "a", "path": "b=c"}
    entry = {"name": "a", "path": "b", "base_model_name": "c"}
    assert read_module('{"name": "a", "path": "b", "base_model_name": "c"}') == entry
    assert read_module('{"name": "a", "path": "b", "base_model_name": null}') == {"name": "a", "path": "b"}


def test_a_root_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert ServerConfig().lora_admin_keys() == ()
    with pytest.raises(ParameterError, match="needs a key"):
        ServerConfig(lora_root=str(tmp_path)).lora_admin_keys()
    with pytest.raises(ParameterError, match="must be a directory"):
        ServerConfig(lora_root=str(tmp_path / "absent")).lora_admin_keys()
    file = tmp_path / "keys"
    file.write_text("secret\n")
    assert ServerConfig(lora_root=str(tmp_path), lora_admin_key_file=str(file)).lora_admin_keys() == (
        "secret",
    )
    monkeypatch.setenv("VLLMLITE_LORA_ADMIN_KEY", "other")
    assert ServerConfig(lora_root=str(tmp_path)).lora_admin_keys() == ("other",)


@pytest.mark.slow
def test_serve_takes_the_options(root: Path) -> None:
    arguments = ["--backend", BACKEND, "--enable-lora", "--lora-modules", f"one={root / 'one'}"]
    with program(*arguments, "--lora-root", str(root), VLLMLITE_LORA_ADMIN_KEY="admin") as running:
        body = {"lora_name": "two", "lora_path": "two"}
        assert httpx.post(running.url + LOAD, json=body, headers=ADMIN, timeout=60).status_code == 200
        for name in ("one", "two"):
            answer = httpx.post(running.url + "/v1/completions", json={**GREEDY, "model": name}, timeout=60)
            assert answer.json()["model"] == name


def test_serving_adapters_needs_an_option(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--lora-modules", f"one={root / 'one'}"]) != 0
    assert "--enable-lora" in capsys.readouterr().err
