"""Finding a model: what is here is used without the network, and what is not here is explained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmlite import hub
from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub import find_model, is_complete

SHA = "0123456789abcdef0123456789abcdef01234567"


def write_model(directory: Path, *shards: str, weights: bool = True) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    if weights:
        for shard in shards or ("model.safetensors",):
            (directory / shard).write_bytes(b"")
    if shards:
        weight_map = {str(i): shard for i, shard in enumerate(shards)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hugging Face cache that holds a reference to owner/name, and no snapshot of it yet."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    return tmp_path


def snapshot(cache: Path) -> Path:
    return cache / "models--owner--name" / "snapshots" / SHA


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of snapshot_download, which does nothing but return the snapshot's directory."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(snapshot(Path(options["cache_dir"])))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_the_built_in_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "BUILT_IN", tmp_path)
    with pytest.raises(ModelError, match="no built-in model"):
        find_model()
    write_model(tmp_path)
    assert find_model(None) == tmp_path


def test_a_directory_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert find_model("~/models") == tmp_path / "models"
    with pytest.raises(ParameterError, match="is a directory"):
        find_model(str(tmp_path), revision="main")
    with pytest.raises(ModelError, match="install huggingface-hub"):
        find_model("owner/name")


def test_names_that_are_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(file))
    for name in ("/none/such", "./none", "a/b/c", "../x", "owner/na me", "-x", "https://host/owner/name"):
        with pytest.raises(ModelError, match="no such directory"):
            find_model(name)


def test_the_cache_is_used_without_a_download(cache: Path, downloads: list[dict[str, Any]]) -> None:
    write_model(snapshot(cache), "a.safetensors", "b.safetensors")
    assert find_model("owner/name", download_dir=str(cache)) == snapshot(cache)
    assert find_model("owner/name", download_dir=str(cache), revision=SHA) == snapshot(cache)
    assert not downloads


@pytest.mark.parametrize("what", ["nothing", "no weights", "a shard", "interrupted"])
def test_what_is_incomplete_is_downloaded(cache: Path, downloads: list[dict[str, Any]], what: str) -> None:
    if what != "nothing":
        write_model(snapshot(cache), "a.safetensors", "b.safetensors", weights=what == "interrupted")
    if what == "a shard":
        (snapshot(cache) / "a.safetensors").write_bytes(b"")
    if what == "interrupted":
        blobs = cache / "models--owner--name" / "blobs"
        blobs.mkdir()
        (blobs / "ab.incomplete").write_bytes(b"")
        assert find_model("owner/name", download_dir=str(cache)) == snapshot(cache)
    else:
        with pytest.raises(ModelError, match=r"safetensors|incomplete"):
            find_model("owner/name", download_dir=str(cache))
    (call,) = downloads
    assert call["name"] == "owner/name"
    assert "*.safetensors" in call["allow_patterns"]
    assert not {"*", "*.py", "*.bin", "*.pt", "*.pth"} & set(call["allow_patterns"])


def test_a_tokenizer_needs_no_weights(cache: Path, downloads: list[dict[str, Any]]) -> None:
    write_model(snapshot(cache), weights=False)
    assert find_model("owner/name", download_dir=str(cache), weights=False) == snapshot(cache)
    assert not downloads
    assert find_model("owner/name", download_dir=str(cache), revision="v2", weights=False) == snapshot(cache)
    assert "*.safetensors" not in downloads[0]["allow_patterns"]


def test_an_unreachable_hub_does_not_spoil_the_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    write_model(snapshot(cache))
    blobs = cache / "models--owner--name" / "blobs"
    blobs.mkdir()
    (blobs / "of-another-revision.incomplete").write_bytes(b"")
    fail_with(monkeypatch, ConnectionError("no route"))
    assert find_model("owner/name", download_dir=str(cache)) == snapshot(cache)


def http_error(class_name: str, status: int) -> Exception:
    """An error as the hub's library raises it, told by its class name and its response."""
    error: Exception = type(class_name, (Exception,), {})("a long story\nwith a URL")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error("RepositoryNotFoundError", 404), "no such model on the hub"),
        (http_error("RepositoryNotFoundError", 401), "set HF_TOKEN"),
        (http_error("GatedRepoError", 403), "access is restricted"),
        (http_error("RevisionNotFoundError", 404), "has no revision v9"),
        (http_error("HfHubHTTPError", 429), r"\(429\): wait"),
        (http_error("HfHubHTTPError", 503), "error 503: try again"),
        (ConnectionError("no route"), "cannot be reached"),
        (OSError("No space left on device"), "cannot be downloaded: No space left"),
        (ValueError("bad\nrepo id"), "cannot be downloaded: bad repo id"),
    ],
)
def test_download_errors_are_plain(
    monkeypatch: pytest.MonkeyPatch, cache: Path, error: Exception, says: str
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(ModelError, match=f"^owner/name: .*{says}") as raised:
        find_model("owner/name", revision="v9", download_dir=str(cache))
    assert "\n" not in str(raised.value)


def test_a_wrapped_error_is_told_by_its_cause(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    outer = type("LocalEntryNotFoundError", (Exception,), {})("not found in the cache")
    outer.__cause__ = http_error("HfHubHTTPError", 429)
    fail_with(monkeypatch, outer)
    with pytest.raises(ModelError, match="429"):
        find_model("owner/name", download_dir=str(cache))


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE forbids downloads$"):
        find_model("owner/name", download_dir=str(cache))
    write_model(snapshot(cache), "a.safetensors", weights=False)
    with pytest.raises(ModelError, match="the copy in the cache is incomplete"):
        find_model("owner/name", download_dir=str(cache))


def test_completeness_of_a_broken_index(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert is_complete(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert not is_complete(tmp_path)
