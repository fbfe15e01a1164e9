"""llama.cpp's ``/slots``: saving prompts to files, restoring them in another server, and erasing them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from served import ENGINE, ask, post, serving

from vllmlite.errors import ParameterError
from vllmlite.server.config import ServerConfig
from vllmlite.server.run import serve
from vllmlite.server.service import Service

PROMPT = (
    "The Debian Project is an association of individuals who have made common cause to create a free system. "
    * 3
)
LIMIT = 8 << 20
BODY = {"prompt": PROMPT, "temperature": 0, "n_predict": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slots") / "saved"


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[Service]:
    with serving(replace(ENGINE, slot_save_path=str(directory), slot_save_size=LIMIT)) as service:
        yield service


def slot(service: Service, action: str, number: int = 0, **body: Any) -> httpx.Response:
    return ask(service, lambda client: client.post(f"/slots/{number}?action={action}", json=body))


def complete(service: Service, **body: Any) -> Any:
    return post(service, "/completion", **BODY, **body)


def test_a_prompt_comes_back_from_its_file(service: Service, directory: Path) -> None:
    first = complete(service, id_slot=3)
    assert first["id_slot"] == 3
    saved = slot(service, "save", 3, filename="debian.bin").json()
    whole = (first["tokens_evaluated"] + 4) // 16 * 16
    assert (saved["id_slot"], saved["filename"], saved["n_saved"]) == (3, "debian.bin", whole)
    assert saved["timings"]["save_ms"] > 0
    assert [path.name for path in directory.iterdir()] == ["debian.bin"]
    assert (directory / "debian.bin").stat().st_mode & 0o777 == 0o600
    assert slot(service, "erase", 3).json()["n_erased"] == whole
    assert complete(service, id_slot=3)["tokens_cached"] == 0
    slot(service, "erase", 3)
    restored = slot(service, "restore", filename="debian.bin").json()
    assert restored["n_restored"] == whole
    again = complete(service)
    assert again["tokens_cached"] == (first["tokens_evaluated"] - 1) // 16 * 16
    assert again["content"] == first["content"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "-x", "a" * 129, "x\n"])
def test_only_plain_names_are_taken(service: Service, directory: Path, name: str) -> None:
    complete(service)
    for action in ("save", "restore"):
        answer = slot(service, action, filename=name)
        assert answer.status_code == 400
        assert "filename" in answer.json()["error"]["message"]
    assert not (directory.parent / "x").exists()


def test_what_cannot_be_done_is_refused(service: Service, directory: Path) -> None:
    assert slot(service, "restore", filename="missing").status_code == 400
    assert slot(service, "save", 7, filename="x").status_code == 400
    assert slot(service, "erase", 7).status_code == 400
    assert slot(service, "other").status_code in (400, 422)
    (directory / "foreign").write_bytes(b"x" * 9000)
    (directory / "foreign").chmod(0o600)
    assert "another model" in slot(service, "restore", filename="foreign").json()["error"]["message"]
    assert (directory / "foreign").read_bytes() == b"x" * 9000


def test_a_damaged_file_is_restored_up_to_the_damage(service: Service, directory: Path) -> None:
    complete(service)
    whole = slot(service, "save", filename="damaged").json()["n_saved"]
    slot(service, "erase")
    data = bytearray((directory / "damaged").read_bytes())
    data[-5000] ^= 1
    (directory / "damaged").write_bytes(data)
    assert slot(service, "restore", filename="damaged").json()["n_restored"] < whole


def test_files_are_refused_that_would_exceed_the_directory_s_size(service: Service, directory: Path) -> None:
    complete(service)
    for number in range(100):
        answer = slot(service, "save", filename=f"copy{number}")
        if answer.status_code != 200:
            break
    assert number > 0 and answer.status_code == 400
    assert "slot_save_size" in answer.json()["error"]["message"]
    names = {path.name for path in directory.iterdir()}
    assert f"copy{number}" not in names and not any(name.startswith(".") for name in names)
    total = sum(path.stat().st_size for path in directory.iterdir())
    assert total <= LIMIT < total + (directory / "copy0").stat().st_size
    assert slot(service, "save", filename="copy0").status_code == 200
    (directory / "copy0").unlink()
    assert slot(service, "save", filename=f"copy{number}").status_code == 200


def test_a_server_without_the_directory_says_so() -> None:
    with serving() as service:
        answer = slot(service, "save", filename="x")
        assert answer.status_code == 501
        complete(service)
        assert not service.slots


def test_the_directory_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="api_key"):
        serve(replace(ENGINE, slot_save_path=str(tmp_path)), ServerConfig())


def test_slots_have_another_directory_than_the_disk_tier(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ParameterError, match="slot_save_path"):
        replace(ENGINE, slot_save_path=str(tmp_path / "link"), kv_disk_path=str(tmp_path))
