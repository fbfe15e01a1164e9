"""Links between the ranks' memories of several hosts, with threads in place of hosts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
from native import needs_native_cpu
from rank_links import BEAT, MESSAGE, ONWARD, PART, PIECE, TAKEN, HostMemory, frame, linked

from vllmlite.backends.cpu import CpuBackend
from vllmlite.ranks.comm import connect

pytestmark = needs_native_cpu
Result = TypeVar("Result")


def run(memories: list[HostMemory], compute: Callable[[Any], Result]) -> list[Result]:
    """What ``compute`` returns for each rank, in a thread of its own."""
    world = memories[0].world
    ranks = [memories[rank * len(memories) // world].rank(rank) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(compute, ranks))


@pytest.mark.parametrize(("world", "nodes"), [(2, 2), (4, 2), (3, 3)])
def test_sums_are_those_of_one_host(world: int, nodes: int) -> None:
    """A tensor of 200,000 elements takes several exchanges."""
    parts = np.random.default_rng(0).standard_normal((world, 5, 40_000), np.float32)
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    memories, links = linked(world, nodes, world)

    def add(ranks: Any) -> Any:
        backend = CpuBackend(threads=1)
        comm = connect(backend, ranks)
        found = [backend.to_host(comm.all_reduce(backend.tensor(parts[ranks.rank].copy()))) for _ in range(3)]
        return found, comm.least(10 - ranks.rank)

    for found, least in run(memories, add):
        assert all(np.array_equal(each, expected) for each in found)
        assert least == 10 - (world - 1)
    for link in links:
        link.close(b"")


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_pipeline_goes_over_links(nodes: int) -> None:
    """Four ranks in two stages send more than a ring holds; with four nodes the hub passes all of it on."""
    memories, links = linked(4, nodes, 2)
    sent = np.random.default_rng(1).standard_normal((7, 100_000), np.float32)

    def pass_on(ranks: Any) -> Any:
        backend = CpuBackend(threads=1)
        comm = connect(backend, ranks, stages=2)
        for _ in range(2):
            if ranks.rank < 2:
                comm.send(backend.tensor(sent + ranks.rank))
                backend.to_host(comm.all_reduce(backend.tensor(sent.copy())))
                found = None
            else:
                both = comm.all_reduce(comm.receive(sent.shape, "float32"))
                found = backend.to_host(both)
        return found

    *_, third, fourth = run(memories, pass_on)
    assert np.array_equal(third, sent + (sent + 1)) and np.array_equal(third, fourth)
    for link in links:
        link.close(b"")


def test_messages_of_any_size_go_both_ways() -> None:
    _, (hub, node) = linked(2, 2, 2)
    messages = [bytes([index]) * size for index, size in enumerate((0, 1, 3_000_000, 7))]
    for message in messages:
        assert hub.send(message) and node.send(message)
    assert [node.receive() for _ in messages] == messages == [hub.receive() for _ in messages]
    with pytest.raises(ValueError, match="is too large"):
        hub.send(bytes(hub.MOST_MESSAGE + 1))
    hub.close(b"goodbye")
    assert node.receive() == b"goodbye"
    assert node.receive() is None and node.end == "has closed its connection"
    assert not hub.send(b"more")


def test_signs_of_life_go_over_links() -> None:
    (first, second), links = linked(2, 2, 2)
    assert first.driver.silence(1) < 0
    rank = second.rank(1)
    rank.start_heartbeat(-1)
    while first.driver.silence(1) < 0:
        pass
    assert first.driver.silence(1) < 5
    for link in links:
        link.close(b"")


GARBAGE: dict[str, tuple[list[bytes], str]] = {
    "noise": ([b"GET / HTTP/1.1\r\n\r\n" * 4], "a frame of 542393671 bytes, which is too large"),
    "too large": ([frame(0, PART, bytes((512 << 10) + 1))], "which is too large"),
    "another key": ([frame(0, BEAT, key=b"guess")], "is not authentic"),
    "altered": ([frame(0, MESSAGE, b"abcd").replace(b"abcd", b"abce")], "is not authentic"),
    "replayed": ([frame(0, MESSAGE, b"a"), frame(0, MESSAGE, b"a")], "frame 0 out of order"),
    "left out": ([frame(1, MESSAGE, b"a")], "frame 1 out of order"),
    "unknown kind": ([frame(0, 99)], "makes no sense"),
    "rank of the hub": ([frame(0, PART, b"abcd", rank=0)], "makes no sense"),
    "unknown rank": ([frame(0, BEAT, rank=9)], "makes no sense"),
    "unknown channel": ([frame(0, PART, b"abcd", channel=2)], "makes no sense"),
    "no pipeline": ([frame(0, ONWARD, b"abcd")], "makes no sense"),
    "nothing sent": ([frame(0, TAKEN, bytes(8), rank=0)], "makes no sense"),
    "endless message": ([frame(number, PIECE, bytes(512 << 10)) for number in range(129)], "makes no sense"),
    "cut off": ([frame(0, MESSAGE, b"abcd")[:-3]], "has closed its connection"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_no_node_sends_ends_the_link(name: str) -> None:
    frames, reason = GARBAGE[name]
    ours, theirs = socket.socketpair()
    memory = HostMemory(2, 0, 1)
    link = memory.link(ours, range(1, 2), 2, True)
    with theirs:
        for each in frames:
            try:
                theirs.sendall(each)
            except BrokenPipeError:
                break
        theirs.shutdown(socket.SHUT_WR)
        while link.receive() is not None:
            pass
    assert reason in link.end
