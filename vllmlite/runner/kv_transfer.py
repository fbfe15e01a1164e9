"""Copies of key/value blocks between the pool and host memory."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from vllmlite.backends.host_blocks import HostBlocks
from vllmlite.engine.tiers import Copies

MEASURED_SECONDS = 0.01
"""Approximate seconds that a measurement of copies may take."""


def start_copies(host: HostBlocks, copies: Copies, written: Sequence[int]) -> None:
    """Start the block copies of a step, before its other work. Saves run beside that work, unless they read blocks that
    are loaded, or that are in ``written``, the blocks that the step may write."""
    host.join()
    if copies.save_blocks:
        host.save(np.array(copies.save_blocks, np.int32), np.array(copies.save_places, np.int32))
        if not {*copies.save_blocks}.isdisjoint([*written, *copies.load_blocks]):
            host.join()
    if copies.load_blocks:
        host.load(np.array(copies.load_places, np.int32), np.array(copies.load_blocks, np.int32))


def seconds_per_load(host: HostBlocks, num_blocks: int) -> float:
    """Return the measured seconds to copy one block from host memory. The pool must not contain anything yet."""
    count = min(num_blocks, len(host.memory), 16)
    host.memory[:count] = 0  # no page fault is measured
    ids = np.arange(count, dtype=np.int32)
    begin, rounds = time.perf_counter(), 0
    while not rounds or time.perf_counter() - begin < MEASURED_SECONDS:
        host.load(ids, ids)
        host.wait()
        rounds += 1
    return (time.perf_counter() - begin) / (rounds * count)
