"""Finding a model: local files are used without the network; others are downloaded and verified, or the error says why
not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import SHA, Hub, running

from vllmlite import hub as hub_module
from vllmlite.cli import main
from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub import find_model
from vllmlite.hub.snapshot import model_in, wanted_files


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


WEIGHTS = bytes(range(256)) * 40_000
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "README.md": b"words",
    "onnx/model.onnx": b"another",
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hugging Face cache with a reference to owner/name but no snapshot of it yet."""
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, used in place of the real one by this process and its children."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "")
    with running() as server:
        server.repositories["owner/name"] = dict(FILES)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def snapshot(cache: Path) -> Path:
    return cache / "models--owner--name" / "snapshots" / SHA


def find(cache: Path, **options: Any) -> Path:
    return find_model("owner/name", download_dir=str(cache), **options)


def test_the_built_in_model_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_module, "BUILT_IN", tmp_path)
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


def test_names_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(file))
    for name in ("/none/such", "./none", "a/b/c", "../x", "owner/na me", "-x", "https://host/owner/name"):
        with pytest.raises(ModelError, match="no such directory"):
            find_model(name)


# The cache


def test_the_cache_is_used_without_a_download(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    write_model(snapshot(cache), "a.safetensors", "b.safetensors")
    assert find(cache) == find(cache, revision=SHA) == find(cache, revision="main") == snapshot(cache)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert find_model("owner/name") == snapshot(cache)
    with pytest.raises(ParameterError, match="revision"):
        find(cache, revision="../main")


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllmlite.hub.snapshot import cache_root

    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_root(None)) == "/home/someone/.cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(cache_root(None)) == "/caches/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/hf")
    assert str(cache_root(None)) == "/hf/hub"
    assert str(cache_root("~/here")) == "/home/someone/here"


@pytest.mark.parametrize("what", ["nothing", "no weights", "a shard", "interrupted", "begun"])
def test_an_incomplete_snapshot_is_downloaded(cache: Path, hub: Hub, what: str) -> None:
    shards = {"a.safetensors": b"a", "b.safetensors": b"b"}
    index = json.dumps({"weight_map": {file: file for file in shards}}).encode()
    hub.repositories["owner/name"] = {"config.json": b"{}", "model.safetensors.index.json": index, **shards}
    if what != "nothing":
        write_model(snapshot(cache), "a.safetensors", "b.safetensors", weights=what == "interrupted")
        for file, content in hub.repositories["owner/name"].items():
            if (snapshot(cache) / file).exists():
                (snapshot(cache) / file).write_bytes(content)
    if what == "a shard":
        (snapshot(cache) / "a.safetensors").write_bytes(b"a")
    if what == "interrupted":
        blobs = cache / "models--owner--name" / "blobs"
        blobs.mkdir()
        (blobs / "ab.incomplete").write_bytes(b"")
    if what == "begun":
        (cache / "models--owner--name" / ".vllmlite").mkdir()
        (cache / "models--owner--name" / ".vllmlite" / SHA).write_text("begun")
    assert find(cache) == snapshot(cache)
    assert model_in(snapshot(cache)) == snapshot(cache)
    assert len(hub.downloads("b.safetensors")) == (what != "interrupted")
    asked = len(hub.requests)
    assert find(cache) == snapshot(cache)
    assert len(hub.requests) == asked, "what has been verified needs no second look"


def test_a_tokenizer_is_downloaded_without_weights(cache: Path, hub: Hub) -> None:
    write_model(snapshot(cache), weights=False)
    assert find(cache, weights=False) == snapshot(cache)
    assert not hub.requests
    assert find_model("owner/name", download_dir=str(cache / "other"), weights=False)
    assert hub.downloads("tokenizer.json") and not hub.downloads("model.safetensors")


def test_a_broken_index_makes_a_snapshot_incomplete(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert model_in(tmp_path) == tmp_path
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert model_in(tmp_path) is None


# Which files


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("config.json model.safetensors pytorch_model.bin x.py", "config.json model.safetensors"),
        ("config.json pytorch_model.bin.index.json pytorch_model-1.bin training_args.bin",
         "config.json pytorch_model-1.bin pytorch_model.bin.index.json"),
        ("config.json consolidated.safetensors sub/model.safetensors", "config.json"),
        ("README.md a.Q4_0.gguf", "a.Q4_0.gguf"),
        ("config.json medusa_lm_head.pt other.pt", "config.json medusa_lm_head.pt"),
        ("config.json a.gguf model.safetensors tokenizer.model", "config.json tokenizer.model model.safetensors"),
    ],
)  # fmt: skip
def test_the_best_format_is_chosen(files: str, expected: str) -> None:
    assert wanted_files(files.split()) == expected.split()


def test_files_are_chosen_by_patterns() -> None:
    files = [*FILES, "a[1].gguf"]
    assert wanted_files(files, include=["*.bin", "onnx/*"]) == ["onnx/model.onnx", "pytorch_model.bin"]
    assert wanted_files(files, exclude=["tok*"]) == ["config.json", "model.safetensors"]
    assert wanted_files(files, include=["*"], exclude=["*.*"]) == []


# Downloads


def test_a_download_shows_progress_and_is_verified(
    cache: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "owner/name", "--download-dir", str(cache)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(snapshot(cache))
    assert "downloading owner/name: 3 files, 10.2 MB" in err
    assert {file.name for file in snapshot(cache).iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert (snapshot(cache) / "model.safetensors").read_bytes() == WEIGHTS
    assert find(cache) == snapshot(cache)
    include = ["--include", "*.bin", "--include", "README*", "--exclude", "README.md"]
    assert main(["download", "owner/name", "--download-dir", str(cache), *include]) == 0
    assert (snapshot(cache) / "pytorch_model.bin").exists() and not (snapshot(cache) / "README.md").exists()


def test_an_interrupted_download_resumes(cache: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 20)
    hub.cut["model.safetensors"] = 3_000_000
    assert find(cache) == snapshot(cache)
    first, *rest = hub.downloads("model.safetensors")
    assert first is None and rest == ["bytes=2097152-"]
    assert (snapshot(cache) / "model.safetensors").read_bytes() == WEIGHTS


def another(cache: Path, hub: Hub) -> subprocess.Popen[str]:
    """Start the same download in another process."""
    argv = [sys.executable, "-m", "vllmlite", "download", "owner/name", "--download-dir", str(cache)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, env=os.environ | {"HF_ENDPOINT": hub.url}, stdout=pipe, stderr=pipe, text=True
    )


def test_a_killed_download_resumes(cache: Path, hub: Hub) -> None:
    """Complete files are kept and the others downloaded; until then the snapshot counts as incomplete."""
    hub.gate = threading.Event()
    process = another(cache, hub)
    deadline = time.monotonic() + 30
    while not (hub.downloads("model.safetensors") and (snapshot(cache) / "tokenizer.json").exists()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    hub.gate.set()
    (snapshot(cache) / "model.safetensors").write_bytes(b"as if it had been complete, and not yet verified")
    with pytest.raises(ModelError, match=r"model\.safetensors .*wrong checksum"):
        find(cache)
    assert find(cache) == snapshot(cache)
    assert (snapshot(cache) / "model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.downloads("tokenizer.json")) == 1


def test_two_processes_share_one_download(cache: Path, hub: Hub) -> None:
    hub.gate = threading.Event()
    processes = [another(cache, hub), another(cache, hub)]
    found = threading.Thread(target=find, args=(cache,))
    found.start()
    time.sleep(1)
    hub.gate.set()
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.strip() == str(snapshot(cache))
    found.join()
    assert len(hub.downloads("model.safetensors")) == len(hub.downloads("config.json")) == 1


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_download_is_caught(cache: Path, hub: Hub, file: str) -> None:
    hub.sent_instead[file] = bytes(len(FILES[file]))
    with pytest.raises(ModelError, match=rf"^owner/name: damaged .*{file} .*try again"):
        find(cache)
    assert not (snapshot(cache) / file).exists()
    hub.sent_instead.clear()
    assert find(cache) == snapshot(cache)
    assert (snapshot(cache) / file).read_bytes() == FILES[file]


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "set HF_TOKEN"),
        (403, "access is restricted"),
        (404, "no such model on the hub"),
        (429, r"\(429\): wait"),
        (503, "error 503: try again"),
    ],
)
def test_refusals_of_the_hub_are_explained(
    cache: Path,
    hub: Hub,
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library tries again, ever later
    hub.status = status
    argv = ["generate", "--model", "owner/name", "--download-dir", str(cache), "x"]
    assert main(argv) == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("vllmlite: error: ")]
    assert line.startswith("vllmlite: error: owner/name: ")
    assert re.search(says, line)


def test_an_unknown_revision_and_an_unknown_model(cache: Path, hub: Hub) -> None:
    with pytest.raises(ModelError, match=r"^owner/name: has no revision v9$"):
        find(cache, revision="v9")
    with pytest.raises(ModelError, match=r"^owner/other: .*no such model"):
        find_model("owner/other", download_dir=str(cache))


def test_a_repository_of_gguf_files(cache: Path, hub: Hub) -> None:
    hub.repositories["owner/name"] = {"a.Q4_0.gguf": b"4", "a.Q8_0.gguf": b"8", "README.md": b""}
    with pytest.raises(
        ModelError, match=r"several GGUF files \(a\.Q4_0\.gguf, a\.Q8_0\.gguf\).*--include FILE"
    ):
        find(cache)
    assert main(["download", "owner/name", "--download-dir", str(cache), "--include", "*Q8_0*"]) == 0
    assert find(cache) == snapshot(cache) / "a.Q8_0.gguf"
    hub.repositories["owner/name"] = {"README.md": b"", "config.json": b"{}"}
    with pytest.raises(ModelError, match=r"no config.json with a complete set of weights"):
        find_model("owner/name", download_dir=str(cache / "other"))


def test_an_unreachable_hub_falls_back_to_the_cache(
    monkeypatch: pytest.MonkeyPatch, cache: Path, hub: Hub
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"hub cannot be reached$"):
        find(cache)
    write_model(snapshot(cache))
    blobs = cache / "models--owner--name" / "blobs"
    blobs.mkdir()
    (blobs / "of-another-revision.incomplete").write_bytes(b"")
    assert find(cache) == snapshot(cache)


def test_offline_mode_is_named_in_the_error(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE forbids downloads$"):
        find(cache)
    write_model(snapshot(cache), "a.safetensors", weights=False)
    with pytest.raises(ModelError, match="the copy in the cache is incomplete"):
        find(cache)
    write_model(snapshot(cache), "a.safetensors")
    assert main(["download", "owner/name", "--download-dir", str(cache)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(snapshot(cache)) and "the copy in the cache" in err


def http_error(class_name: str, status: int) -> Exception:
    """An HTTP error like those of huggingface_hub, which are recognised by their class name and response."""
    error: Exception = type(class_name, (Exception,), {})("a long story\nwith a URL")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error("GatedRepoError", 403), "access is restricted"),
        (OSError("No space left on device"), "cannot be downloaded: No space left"),
        (ValueError("bad\nrepo id"), "cannot be downloaded: bad repo id"),
    ],
)
def test_other_download_errors_are_explained(
    monkeypatch: pytest.MonkeyPatch, cache: Path, hub: Hub, error: Exception, says: str
) -> None:
    def download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelError, match=f"^owner/name: .*{says}") as raised:
        find(cache)
    assert "\n" not in str(raised.value)


def test_wrong_usage_of_download_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "there.tar").write_bytes(b"")
    for argv, says in (
        ([], "required: REPO"),
        (["a/b/c"], "not the id"),
        (["a/b", "--tarball", "x.zip"], "must end in one of .tar"),
        (["a/b", "--tarball", str(tmp_path / "there.tar")], "exists already"),
    ):
        assert main(["download", *argv]) == 2
        assert says in capsys.readouterr().err
