"""Shared memory of ranks: messages, collective operations and signs of life, with threads in place of processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
from native import needs_native_cpu

from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.native import load_extension
from vllmlite.backends.torch import TorchBackend
from vllmlite.ranks.comm import connect

pytestmark = needs_native_cpu
Result = TypeVar("Result")


class Memory:
    """Anonymous shared memory of some ranks."""

    def __init__(self, world: int) -> None:
        self.native, self.world = load_extension("_cpu"), world
        self.descriptor = os.memfd_create("ranks")
        os.ftruncate(self.descriptor, self.native.Ranks.memory_size(world))

    def ranks(self, rank: int) -> Any:
        return self.native.Ranks(self.descriptor, rank, self.world)

    def run(self, compute: Callable[[Any], Result]) -> list[Result]:
        """Return what ``compute`` returns for each rank, in a thread of its own."""
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(compute, map(self.ranks, range(self.world))))


@pytest.fixture
def memory() -> Any:
    memory = Memory(2)
    yield memory
    os.close(memory.descriptor)


def test_messages_reach_all_ranks_in_order(memory: Memory) -> None:
    """Some messages are larger than the ring."""
    messages = [bytes([index]) * size for index, size in enumerate((0, 1, 3_000_000, 7, 1 << 20))]
    driver = memory.ranks(-1)

    def receive(ranks: Any) -> list[bytes]:
        return [ranks.receive(10.0) for _ in messages]

    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(memory.run, receive)
        assert all(driver.send(message) for message in messages)
        assert received.result(20) == [messages, messages]
    rank = memory.ranks(0)
    assert rank.receive(0.0) is None
    assert driver.receive(0.01) is None
    assert rank.send(b"result")
    assert driver.receive(10.0) == b"result"


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("make", [lambda: CpuBackend(threads=2), TorchBackend], ids=["cpu", "torch"])
def test_sums_are_added_in_rank_order(world: int, make: Callable[[], Any]) -> None:
    """A tensor of 200,000 elements takes several exchanges."""
    memory = Memory(world)
    parts = np.random.default_rng(0).standard_normal((world, 5, 40_000), np.float32)
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part

    def add(ranks: Any) -> Any:
        backend = make()
        comm = connect(backend, ranks)
        return backend.to_host(comm.all_reduce(backend.tensor(parts[ranks.rank].copy())))

    for found in memory.run(add):
        assert found.tobytes() == expected.tobytes()
    os.close(memory.descriptor)


@pytest.mark.parametrize("make", [CpuBackend, TorchBackend])
@pytest.mark.parametrize("widths", [[48, 16], [30_000, 23_001], [5, 0]])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_parts_of_different_widths_are_gathered(
    memory: Memory, make: Callable[[], Any], widths: list[int], dtype: str
) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 1 << 30, (3, width)).astype(dtype) for width in widths]

    def gather(ranks: Any) -> Any:
        backend = make()
        return backend.to_host(connect(backend, ranks).all_gather(backend.tensor(parts[ranks.rank]), widths))

    for found in memory.run(gather):
        np.testing.assert_array_equal(found, np.concatenate(parts, axis=1))


def test_an_abort_ends_all_waits(memory: Memory) -> None:
    driver = memory.ranks(-1)

    def wait(ranks: Any) -> bool:
        if ranks.rank == 0:
            return ranks.receive(-1) is None
        backend = CpuBackend(threads=1)
        backend.to_host(connect(backend, ranks).all_reduce(backend.tensor(np.zeros(4, np.float32))))
        return bool(ranks.aborted)

    timer = threading.Timer(0.1, driver.abort)
    timer.start()
    assert memory.run(wait) == [True, True]
    assert not driver.send(b"x" * (2 << 20))


def test_a_rank_that_does_not_come_is_named(memory: Memory) -> None:
    driver = memory.ranks(-1)
    assert driver.late == -1

    def wait(ranks: Any) -> None:
        if ranks.rank == 0:
            ranks.limit(0.01)
            backend = CpuBackend(threads=1)
            backend.to_host(connect(backend, ranks).all_reduce(backend.tensor(np.zeros(4, np.float32))))
            return
        while driver.late < 0:
            time.sleep(0.001)
        assert driver.late == 1
        driver.abort()

    memory.run(wait)


def test_waiting_takes_no_processor_time(memory: Memory) -> None:
    rank = memory.ranks(0)
    begin = time.process_time()
    assert rank.receive(0.3) is None
    assert time.process_time() - begin < 0.1
