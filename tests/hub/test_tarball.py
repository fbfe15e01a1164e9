"""Models as tarballs: reproducible, usable as models, and unable to write outside the directory that they are unpacked
in."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmlite import LLM, SamplingParams
from vllmlite.errors import ModelError, ParameterError
from vllmlite.hub import BUILT_IN, find_model, tarball
from vllmlite.hub.tarball import extract, unpack, write_tarball

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "models--owner--name"
SUFFIXES = [".tar", ".tar.gz", ".tar.zst"]


def zstd_or_skip(suffix: str) -> None:
    if suffix.endswith("zst"):
        pytest.importorskip("compression.zstd", reason="Python has zstd from 3.14 on")


def cached(root: Path, source: Path = BUILT_IN, links: bool = True) -> Path:
    """A Hugging Face cache that holds ``source`` as owner/name; returns the snapshot."""
    snapshot = root / MODEL / "snapshots" / COMMIT
    (root / MODEL / "refs").mkdir(parents=True)
    (root / MODEL / "refs" / "main").write_text(COMMIT)
    (root / MODEL / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        if links:
            shutil.copyfile(file, root / MODEL / "blobs" / f"of-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/of-{file.name}")
        else:
            shutil.copyfile(file, snapshot / file.name)
    return snapshot


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A snapshot of two small files."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "source" / "model.safetensors").write_bytes(bytes(1000))
    return cached(tmp_path / "cache", tmp_path / "source")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_is_served_from_its_tarball(suffix: str, tmp_path: Path) -> None:
    zstd_or_skip(suffix)
    packed = tmp_path / f"model{suffix}"
    write_tarball(cached(tmp_path / "cache"), packed)
    params = SamplingParams(temperature=0, max_tokens=8)
    found = []
    for model in (None, str(packed)):
        llm = LLM(model, download_dir=str(tmp_path / "unpacked"), max_model_len=64)
        found.append(llm.generate(["Debian is"], params, use_tqdm=False)[0].outputs[0].text)
    assert found[0] == found[1]
    assert "/.cache/" not in str(find_model(str(packed), download_dir=str(tmp_path / "unpacked")))


def test_the_tarball_has_the_documented_layout(small: Path, tmp_path: Path) -> None:
    write_tarball(small, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as archive:
        members = archive.getmembers()
        version = archive.extractfile("version.txt")
        assert version is not None and version.read() == b"1\n"
        ref = archive.extractfile(f"{MODEL}/refs/main")
        assert ref is not None and ref.read() == COMMIT.encode()
    assert [member.name for member in members] == [
        MODEL,
        f"{MODEL}/blobs",
        f"{MODEL}/refs",
        f"{MODEL}/snapshots",
        f"{MODEL}/snapshots/{COMMIT}",
        f"{MODEL}/blobs/of-config.json",
        f"{MODEL}/blobs/of-model.safetensors",
        f"{MODEL}/refs/main",
        f"{MODEL}/snapshots/{COMMIT}/config.json",
        f"{MODEL}/snapshots/{COMMIT}/model.safetensors",
        "version.txt",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert {(m.type, m.mode) for m in members} == {
        (tarfile.DIRTYPE, 0o755),
        (tarfile.REGTYPE, 0o644),
        (tarfile.SYMTYPE, 0o777),
    }
    assert members[-2].linkname == "../../blobs/of-model.safetensors"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_files_give_the_same_bytes(suffix: str, small: Path, tmp_path: Path) -> None:
    zstd_or_skip(suffix)
    write_tarball(small, tmp_path / f"one{suffix}")
    os.utime(small / "config.json", (1, 1))
    (small / "config.json").chmod(0o600)
    write_tarball(small, tmp_path / f"other{suffix}", "main")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"source", "cache", f"one{suffix}", f"other{suffix}"}


def test_a_cache_without_links_gives_blobs_by_checksum(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    write_tarball(cached(tmp_path / "cache", tmp_path / "source", links=False), tmp_path / "x.tar", "v1")
    path = unpack(tmp_path / "x.tar", tmp_path)
    found = find_model(str(path), revision="v1") / "config.json"
    assert found.resolve().name == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert found.read_text() == "{}"


def test_unusable_targets_are_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "there.tar").write_bytes(b"")
    with pytest.raises(ParameterError, match="exists already"):
        write_tarball(small, tmp_path / "there.tar")
    with pytest.raises(ParameterError, match=r"must end in one of \.tar"):
        write_tarball(small, tmp_path / "x.zip")
    with pytest.raises(ModelError, match="cannot be written"):
        write_tarball(small, tmp_path / "nowhere" / "x.tar")
    if sys.version_info < (3, 14):
        with pytest.raises(ModelError, match=r"zstd needs Python 3\.14"):
            write_tarball(small, tmp_path / "x.tar.zst")
    assert not list(tmp_path.glob(".x*"))


def test_unpacking_once_and_again_after_a_change(small: Path, tmp_path: Path) -> None:
    packed = tmp_path / "x.tar.gz"
    write_tarball(small, packed)
    found = unpack(packed, tmp_path)
    before = found.stat().st_ino
    assert unpack(packed, tmp_path) == found and found.stat().st_ino == before
    packed.unlink()
    (small / "config.json").write_text('{"changed": 1}')
    write_tarball(small, packed)
    assert unpack(packed, tmp_path) == found
    assert (
        find_model(str(packed), download_dir=str(tmp_path)) / "config.json"
    ).read_text() == '{"changed": 1}'
    packed.write_bytes(b"rubbish" * 1000)
    with pytest.raises(ModelError, match=r"x\.tar\.gz"):
        unpack(packed, tmp_path)
    assert not list(found.parent.glob(".*")), "what could not be unpacked leaves nothing"


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"name": "value"}')
    write_tarball(cached(tmp_path / "cache", tmp_path / "source", links=False), tmp_path / "x.tar")
    content = (tmp_path / "x.tar").read_bytes()
    assert content.count(b'"value"') == 1
    (tmp_path / "x.tar").write_bytes(content.replace(b'"value"', b'"valve"'))
    with pytest.raises(ModelError, match=r"blobs/[0-9a-f]{64} is damaged"):
        unpack(tmp_path / "x.tar", tmp_path)


def test_two_processes_unpack_once(small: Path, tmp_path: Path) -> None:
    packed = tmp_path / "x.tar"
    write_tarball(small, packed)
    code = (
        "from pathlib import Path; from vllmlite.hub.tarball import unpack\n"
        f"print(unpack(Path({str(packed)!r}), Path({str(tmp_path)!r})))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1 and not any(process.returncode for process in processes)
    assert {file.suffix for file in (tmp_path / "vllmlite-tarballs").iterdir()} == {"", ".lock"}


def test_a_tarball_unpacked_by_hand_is_a_model(small: Path, tmp_path: Path) -> None:
    root = small.parents[2]
    assert find_model(str(root)) == find_model(str(root / MODEL)) == small
    assert find_model(str(root), revision=COMMIT) == small
    with pytest.raises(ModelError, match=r"no snapshot of revision v9; those here are 0123"):
        find_model(str(root), revision="v9")
    shutil.copytree(root / MODEL, root / "models--other--name", symlinks=True)
    with pytest.raises(ModelError, match="several models"):
        find_model(str(root))


# What is refused


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"x", link: str = "", **more: Any) -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
    for key, value in more.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


def write(path: Path, *members: Any) -> Path:
    with tarfile.open(path, "w") as archive:
        for info, data in members:
            archive.addfile(info, data)
    return path


REFUSED: dict[str, tuple[list[Any], str]] = {
    "absolute": ([member("/etc/x")], "a name outside the target directory"),
    "upwards": ([member("a/../../x")], "a name outside the target directory"),
    "dots alone": ([member("..")], "a name outside the target directory"),
    "backslashes": ([member("..\\x")], "a name outside the target directory"),
    "link out": ([member("a", tarfile.SYMTYPE, link="../x")], "a link out of the target directory"),
    "absolute link": ([member("a", tarfile.SYMTYPE, link="/etc/passwd")], "a link out of the target directory"),
    "link to nothing": ([member("a", tarfile.SYMTYPE, link="b")], "a link to something other than a regular file"),
    "link to itself": ([member("a", tarfile.SYMTYPE, link="a")], "a link to something other than a regular file"),
    "through a link to a directory": (
        [member("d", tarfile.DIRTYPE), member("a", tarfile.SYMTYPE, link="d"), member("a/x")],
        "other than a regular file|unpacked",
    ),
    "link to the root": ([member("a", tarfile.SYMTYPE, link=".")], "link"),
    "links in a chain": (
        [member("f"), member("a", tarfile.SYMTYPE, link="f"), member("b", tarfile.SYMTYPE, link="a")],
        "a link to something other than a regular file",
    ),
    "file over a link": ([member("f"), member("a", tarfile.SYMTYPE, link="f"), member("a")], "twice"),
    "link over a file": ([member("f"), member("f", tarfile.SYMTYPE, link="f")], "twice"),
    "file in a file": ([member("f"), member("f/g")], "cannot be unpacked"),
    "hard link": ([member("a", tarfile.LNKTYPE, link="/etc/passwd")], "neither a regular file"),
    "device": ([member("a", tarfile.CHRTYPE, devmajor=1, devminor=3)], "neither a regular file"),
    "pipe": ([member("a", tarfile.FIFOTYPE)], "neither a regular file"),
    "long name": ([member("a" * 1001)], "a name outside the target directory"),
    "name too long for a file": ([member("a" * 300)], "cannot be unpacked"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unexpected_tarball_members_are_refused(case: str, tmp_path: Path) -> None:
    members, says = REFUSED[case]
    path = write(tmp_path / "x.tar", *members)
    (tmp_path / "inner").mkdir()
    with pytest.raises(ModelError, match=says) as raised:
        extract(path, tmp_path / "inner", 1 << 20)
    assert str(path) in str(raised.value) and len(str(raised.value)) < 500
    assert {file.name for file in tmp_path.iterdir()} == {"x.tar", "inner"}
    with pytest.raises(ModelError):
        unpack(path, tmp_path)
    assert {file.suffix for file in (tmp_path / "vllmlite-tarballs").iterdir()} == {".lock"}


def test_modes_and_owners_in_a_tarball_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", member("a", mode=0o6777), member("d", tarfile.DIRTYPE, mode=0))
    (tmp_path / "inner").mkdir()
    extract(path, tmp_path / "inner", 1 << 20)
    assert (tmp_path / "inner" / "a").stat().st_mode & 0o7111 == 0
    assert (tmp_path / "inner" / "d").stat().st_mode & 0o700 == 0o700


def bomb(write_zeros: Callable[[Any], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with gzip.open(path, "wb") as file:
            write_zeros(file)

    return make


def zeros(file: Any) -> None:
    info, _ = member("a")
    info.size = 1 << 40
    file.write(info.tobuf())
    for _ in range(20):
        file.write(bytes(1 << 20))


def long_header(file: Any) -> None:
    info, _ = member("a")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    file.write(info.tobuf())


def many(file: Any) -> None:
    for index in range(2000):
        file.write(member(f"f{index}", data=b"")[0].tobuf())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (zeros, "more than the allowed 1048576 bytes"),
        (long_header, "a record of|not a readable tarball"),  # newer Pythons read it piece by piece
        (many, "more than 1000 files"),
    ],
)
def test_decompression_bombs_are_refused(
    content: Callable[[Any], None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarball, "MAX_MEMBERS", 1000)
    bomb(content)(tmp_path / "x.tar.gz")
    (tmp_path / "inner").mkdir()
    with pytest.raises(ModelError, match=says):
        extract(tmp_path / "x.tar.gz", tmp_path / "inner", 1 << 20)
    assert sum(file.stat().st_size for file in (tmp_path / "inner").iterdir()) <= 3 << 20


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_tarballs_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    base = tmp_path_factory.mktemp("damaged")
    path = write(base / "x.tar", member("d/f"), member("l", tarfile.SYMTYPE, link="d/f"))
    content = bytearray(path.read_bytes()[:2560])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    (base / "inner").mkdir()
    with contextlib.suppress(ModelError):
        extract(path, base / "inner", 1 << 20)
    assert {file.name for file in base.iterdir()} == {"x.tar", "inner"}
    for file in (base / "inner").rglob("*"):
        assert file.resolve().is_relative_to(base / "inner")
