"""The file of the disk tier: it keeps blocks over restarts, and returns none that is damaged."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vllmlite.disk_tier.block_file import BlockFile
from vllmlite.disk_tier.fingerprint import fingerprint
from vllmlite.disk_tier.private_directory import PrivateDirectory
from vllmlite.errors import ParameterError

BYTES = 5000
SIZE = 200_000
"""Room for 23 blocks."""


def opened(path: Path, mark: bytes = b"a" * 32, size: int = SIZE, block_bytes: int = BYTES) -> BlockFile:
    directory = PrivateDirectory(str(path), "kv_disk_path")
    try:
        return BlockFile(directory.open("blocks"), size, block_bytes, mark)
    finally:
        directory.close()


def digest(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


def block(number: int, count: int = BYTES) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, count).astype(np.uint8)


def filled(path: Path, count: int = 10) -> None:
    file = opened(path)
    for number in range(count):
        file.write(digest(number), block(number))
    file.close()


def right(file: BlockFile, count: int) -> int:
    """How many of the first blocks the file returns; each must be as it was written."""
    found, into = 0, np.empty(BYTES, np.uint8)
    for number in range(count):
        if file.read(digest(number), into):
            np.testing.assert_array_equal(into, block(number))
            found += 1
    return found


def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    filled(tmp_path / "kv")
    file = opened(tmp_path / "kv")
    assert right(file, 11) == 10
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "kv" / "blocks").stat().st_mode & 0o777 == 0o600


def test_the_file_keeps_its_size_and_the_blocks_used_last(tmp_path: Path) -> None:
    file = opened(tmp_path / "kv")
    into = np.empty(BYTES, np.uint8)
    for number in range(60):
        file.write(digest(number), block(number))
        assert file.read(digest(0), into)
    assert len(file) == file.num_slots == 23
    assert digest(0) in file and digest(59) in file and digest(1) not in file
    assert (tmp_path / "kv" / "blocks").stat().st_size <= SIZE
    file.close()
    file = opened(tmp_path / "kv")
    assert right(file, 60) == 23


@pytest.mark.parametrize("changes", [{"mark": b"b" * 32}, {"size": SIZE + 9000}, {"block_bytes": 4096}])
def test_a_file_of_another_model_or_layout_is_erased(tmp_path: Path, changes: dict[str, object]) -> None:
    filled(tmp_path / "kv")
    opened(tmp_path / "kv", **changes).close()  # type: ignore[arg-type]
    assert right(opened(tmp_path / "kv"), 10) == 0


def test_no_flipped_byte_is_ever_returned(tmp_path: Path) -> None:
    """Every byte that matters is flipped in turn: the header, the table, the slots."""
    filled(tmp_path / "kv", 3)
    path = tmp_path / "kv" / "blocks"
    whole = path.read_bytes()
    draw = random.Random(0)
    places = [*range(96), *range(4096, 4096 + 3 * 80), *draw.sample(range(8192, len(whole)), 150)]
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        file = opened(tmp_path / "kv")
        right(file, 3)
        file.close()


@pytest.mark.parametrize("keep", [0, 50, 4096, 4150, 8192, 9000, 8192 + 8192, 8192 + 8192 + 100])
def test_a_truncated_file_loses_blocks_and_returns_no_wrong_one(tmp_path: Path, keep: int) -> None:
    filled(tmp_path / "kv")
    os.truncate(tmp_path / "kv" / "blocks", keep)
    file = opened(tmp_path / "kv")
    assert right(file, 10) < 10
    for number in range(10):
        file.write(digest(number), block(number))
    assert right(file, 10) == 10


def test_blocks_of_another_file_are_not_taken(tmp_path: Path) -> None:
    """A block's checksum covers the fingerprint: the slots of a file with another one do not pass."""
    filled(tmp_path / "kv")
    theirs = (tmp_path / "kv" / "blocks").read_bytes()
    opened(tmp_path / "kv", mark=b"b" * 32).close()
    path = tmp_path / "kv" / "blocks"
    path.write_bytes(path.read_bytes().ljust(4096, b"\0") + theirs[4096:])
    file = opened(tmp_path / "kv", mark=b"b" * 32)
    assert len(file) == 10 and right(file, 10) == 0


def test_a_full_disk_loses_the_block_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "kv")
    file, write = opened(tmp_path / "kv"), os.pwrite
    for failing in range(3):
        left = failing

        def full(fd: int, data: bytes, at: int) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= 1
            return write(fd, data, at)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
            patch.setattr(os, "pwrite", full)
            file.write(digest(10), block(10))
    assert right(file, 11) == 10
    file.write(digest(10), block(10))
    file.close()
    assert right(opened(tmp_path / "kv"), 11) == 11


WRITER = """
import sys; sys.path[:0] = {path!r}
from test_block_file import *
file = opened(Path({directory!r}))
print(flush=True)
for number in range(10 ** 6):
    file.write(digest(number % 40), block(number % 40))
"""


def test_a_writer_that_is_killed_leaves_whole_blocks(tmp_path: Path) -> None:
    program = WRITER.format(path=sys.path, directory=str(tmp_path / "kv"))
    for seconds in (0.0, 0.04):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.send_signal(signal.SIGKILL)
        file = opened(tmp_path / "kv")
        known = len(file)
        assert right(file, 40) == known
        file.close()


def test_erasing_leaves_nothing_of_the_blocks(tmp_path: Path) -> None:
    """A second name for the file would show what is overwritten: here the descriptor does, before the truncation."""
    filled(tmp_path / "kv")
    file, truncated = opened(tmp_path / "kv"), []
    truncate = os.ftruncate

    def look(fd: int, size: int) -> None:
        truncated.append(os.pread(fd, SIZE, 0))
        truncate(fd, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "ftruncate", look)
        file.forget_all()
    assert not any(truncated[0])
    assert right(file, 10) == 0 and len(file) == 0
    file.write(digest(1), block(1))
    file.close()
    assert right(opened(tmp_path / "kv"), 10) == 1


def test_a_second_engine_is_refused(tmp_path: Path) -> None:
    file = opened(tmp_path / "kv")
    with pytest.raises(ParameterError, match="in use by another engine"):
        opened(tmp_path / "kv")
    file.close()
    opened(tmp_path / "kv").close()


def test_links_and_open_modes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").write_text("")
    for name, reason in {
        "link": "symbolic link",
        "open": "mode 0700",
        "file": "opened",
        "a/b": "made",
    }.items():
        with pytest.raises(ParameterError, match=reason):
            opened(tmp_path / name)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "real" / "blocks").symlink_to(victim)
    with pytest.raises(ParameterError, match="blocks in it must not be a symbolic link"):
        opened(tmp_path / "real")
    (tmp_path / "real" / "blocks").unlink()
    os.link(victim, tmp_path / "real" / "blocks")
    with pytest.raises(ParameterError, match="one name"):
        opened(tmp_path / "real")
    (tmp_path / "real" / "blocks").unlink()
    os.mkfifo(tmp_path / "real" / "blocks", 0o600)
    with pytest.raises(ParameterError, match="regular file"):
        opened(tmp_path / "real")
    assert victim.read_text() == "mine"


def test_a_file_without_room_for_a_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least"):
        opened(tmp_path / "kv", size=9000)


def test_the_fingerprint_follows_the_weights_and_every_fact(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(bytes(3 << 20))
    found = {fingerprint(tmp_path, "a", 1), fingerprint(tmp_path, "a", 2), fingerprint(tmp_path, "b", 1)}
    (tmp_path / "config.json").write_text("[]")
    found.add(fingerprint(tmp_path, "a", 1))
    with (tmp_path / "model.bin").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"x")
    os.utime(tmp_path / "model.bin", (1, 1))  # the time of the change of the inode still differs
    found.add(fingerprint(tmp_path, "a", 1))
    assert len(found) == 5
    assert fingerprint(tmp_path, "a", 1) in found


def test_the_fingerprint_follows_every_file_of_a_split_model(tmp_path: Path) -> None:
    first, second = (tmp_path / f"model-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"first")
    found = []
    for content in (b"one", b"other"):
        second.write_bytes(content)
        found.append(fingerprint(first))
    assert found[0] != found[1]
