"""The disk tier's thread: transfers, a disk that hangs, erasing, and the end of the process."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vllmlite.disk_tier.block_file import BlockFile
from vllmlite.disk_tier.disk import DiskTier
from vllmlite.disk_tier.place_memory import PlaceMemory
from vllmlite.disk_tier.private_directory import PrivateDirectory
from vllmlite.engine.tiers import Transfer

NAMES = [bytes([number]) * 32 for number in range(8)]


class Gated(BlockFile):
    """A file whose writes wait for an event."""

    gate, begun = threading.Event(), threading.Event()

    def write(self, digest: bytes, *parts: NDArray[np.uint8]) -> None:
        self.begun.set()
        self.gate.wait(20)
        super().write(digest, *parts)


@pytest.fixture
def memory() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (8, 1000)).astype(np.uint8)


def a_disk(path: Path, memory: NDArray[np.uint8], kind: type[BlockFile] = BlockFile) -> DiskTier:
    directory = PrivateDirectory(str(path), "kv_disk_path")
    return DiskTier(kind(directory.open("blocks"), 100_000, 1000, bytes(32)), PlaceMemory([memory]))


def hanging_disk(path: Path, memory: NDArray[np.uint8]) -> DiskTier:
    """A disk with the first block, which hangs in writing the second."""
    Gated.gate.set()
    disk = a_disk(path, memory, Gated)
    disk.write(NAMES[0], 0)
    drained(disk, 1)
    Gated.gate.clear()
    Gated.begun.clear()
    disk.write(NAMES[1], 1)
    assert Gated.begun.wait(20)
    return disk


def drained(disk: DiskTier, count: int) -> list[Transfer]:
    found: list[Transfer] = []
    while len(found) < count:
        disk.wait(20)
        found += disk.finished()
    return found


def test_blocks_come_back_after_the_end_of_their_writer(tmp_path: Path, memory: NDArray[np.uint8]) -> None:
    disk = a_disk(tmp_path / "kv", memory)
    for place, name in enumerate(NAMES):
        disk.write(name, place)
        assert name in disk
    whole = memory.copy()
    del disk  # writes what is queued
    gc.collect()
    memory[:] = 0
    disk = a_disk(tmp_path / "kv", memory)
    for place, name in enumerate(NAMES):
        disk.read(name, place)
    disk.read(b"x" * 32, 0)
    found = drained(disk, 9)
    assert found[:8] == [Transfer(name, place, True, True) for place, name in enumerate(NAMES)]
    assert not found[8].done
    np.testing.assert_array_equal(memory[1:], whole[1:])
    assert disk.seconds_per_block is not None
    disk.close()


def test_a_disk_that_hangs_stops_no_caller_and_reads_come_first(
    tmp_path: Path, memory: NDArray[np.uint8]
) -> None:
    disk = hanging_disk(tmp_path / "kv", memory)
    for place in range(2, 5):
        disk.write(NAMES[place], place)
    disk.read(NAMES[0], 7)
    assert disk.finished() == []
    Gated.gate.set()
    found = drained(disk, 5)
    assert [transfer.to_host for transfer in found] == [False, True, False, False, False]
    disk.close()


def test_erasing_fails_what_is_queued_and_leaves_nothing(tmp_path: Path, memory: NDArray[np.uint8]) -> None:
    disk = hanging_disk(tmp_path / "kv", memory)
    disk.read(NAMES[0], 7)
    disk.forget_all()
    assert NAMES[0] not in disk and NAMES[1] not in disk
    Gated.gate.set()
    assert not any(transfer.done for transfer in drained(disk, 2))
    disk.write(NAMES[2], 2)
    drained(disk, 1)
    disk.close()
    disk = a_disk(tmp_path / "kv", memory)
    assert [name in disk for name in NAMES[:3]] == [False, False, True]
    disk.close()


def test_cancelled_transfers_are_not_reported(tmp_path: Path, memory: NDArray[np.uint8]) -> None:
    disk = a_disk(tmp_path / "kv", memory)
    for place, name in enumerate(NAMES):
        disk.write(name, place)
    disk.cancel()
    assert disk.finished() == []
    disk.close()
