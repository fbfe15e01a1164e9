"""Which steps a runner captures and keeps, on a backend that only counts captures."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import pytest
from paged import host_batch

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import CAPTURED_QUERY_LEN, ForwardBatch, GraphKey
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.runner.graphs import MOST_GRAPHS, MOST_RECORDED_ROWS, RECORDED_AFTER, Graphs

SPEC = KVSpec(1, 1, 16, 16, "float32")


class Counting:
    """A backend that records the keys of captures."""

    def __init__(self) -> None:
        self.captured: list[GraphKey] = []
        self.pads_rows = True

    def capture(self, key: GraphKey, step: Any, slots: Any, spec: KVSpec) -> Any:
        self.captured.append(key)
        return step


def make(most_rows: int, pads_rows: bool = True) -> tuple[Graphs, Counting]:
    backend = Counting()
    backend.pads_rows = pads_rows
    rows = CudaBackend.graph_rows(cast(CudaBackend, backend), most_rows)
    return Graphs(cast(Backend, backend), lambda batch: [], None, SPEC, rows), backend


def step(rows: int, query_len: int, sampled: int | None = None) -> ForwardBatch:
    """Return a batch of rows of ``query_len`` tokens each; the last ``sampled`` of each (default: all) are sampled."""
    batch = host_batch(range(rows), [0] * rows, [query_len] * rows)
    tokens = np.arange(rows * query_len).reshape(rows, query_len)
    batch.logits_rows = tokens[:, query_len - (sampled or query_len) :].reshape(-1)
    return batch


def unequal(counts: list[int]) -> ForwardBatch:
    """Return a batch of rows of ``counts`` tokens, all of which are sampled from."""
    batch = host_batch(list(range(len(counts))), [0] * len(counts), counts)
    batch.logits_rows = np.arange(sum(counts), dtype=np.int32)
    return batch


@pytest.mark.parametrize("most_rows", [1, 8, 32, 256, 1024])
def test_there_are_never_more_steps_than_the_limit(most_rows: int) -> None:
    """After random calls, steps of one token per row are still captured, and so is the one recorded last."""
    graphs, _ = make(most_rows)
    singles = [GraphKey(rows, 1) for rows in graphs.capture()]
    assert len(graphs) == len(singles)
    assert graphs.limit <= max(MOST_GRAPHS, len(singles) + 5)
    draw = random.Random(0)
    for _ in range(500):
        rows, query_len = draw.randint(1, most_rows + 10), draw.randint(2, CAPTURED_QUERY_LEN + 2)
        wanted = rows <= min(most_rows, MOST_RECORDED_ROWS) and query_len <= CAPTURED_QUERY_LEN
        assert graphs.record(rows, query_len) == wanted
        found = graphs.find(step(rows, query_len)) if rows <= most_rows else None
        assert (found is not None) == wanted
        if found is not None:
            assert found[0] >= rows
            assert found[1] == query_len
        assert len(graphs) <= graphs.limit
        assert set(singles) <= set(graphs)
    assert (len(graphs) == graphs.limit) == (most_rows > 8)


def test_the_least_recently_used_captured_step_is_dropped_first() -> None:
    graphs, backend = make(256)
    list(graphs.capture())
    for query_len in (2, 3, 4, 5, 6):
        graphs.record(1, query_len)
    assert len(graphs) == 40
    assert graphs.find(step(1, 2)) == GraphKey(1, 2)
    graphs.record(1, 7)
    assert graphs.find(step(1, 2)) == GraphKey(1, 2)
    assert graphs.find(step(1, 3)) is None
    before = len(backend.captured)
    assert graphs.record(1, 4)
    assert len(backend.captured) == before


def test_find_captures_nothing() -> None:
    """``find`` captures no step: neither with rows of very different lengths, nor prompts, nor steps not recorded."""
    graphs, backend = make(32)
    assert graphs.find(step(1, 1)) is None
    assert not graphs.record(1, 2)
    list(graphs.capture())
    before = list(backend.captured)
    assert graphs.find(step(5, 1)) == GraphKey(8, 1)
    assert graphs.find(step(5, 3)) is None
    assert graphs.find(step(5, 3, sampled=1)) is None
    assert backend.captured == before
    graphs.record(5, 3)
    assert graphs.find(step(6, 3)) == GraphKey(8, 3)
    assert graphs.find(step(6, 3, sampled=1)) is None
    assert graphs.find(unequal([3, 1, 2, 1, 3])) == GraphKey(8, 3)
    assert graphs.find(unequal([3] + [1] * 7)) == GraphKey(8, 3)  # padded to 24 tokens, which cost no more
    graphs.record(32, 3)
    assert graphs.find(unequal([3] * 20 + [1] * 10)) == GraphKey(32, 3)
    assert graphs.find(unequal([3] + [1] * 29)) is None  # 90 tokens for 32
    unpadded, _ = make(32, pads_rows=False)
    list(unpadded.capture())
    unpadded.record(2, 3)
    assert unpadded.find(unequal([3, 3])) == GraphKey(2, 3)
    assert unpadded.find(unequal([3, 2])) is None


def test_steps_that_come_often_are_captured_once() -> None:
    """Steps that verify drafts, if rows have about as many; the lengths that come most are captured most often."""
    graphs, backend = make(256)
    list(graphs.capture())
    before = len(backend.captured)
    for _ in range(3 * RECORDED_AFTER):
        for uncaptured in (
            unequal([9] + [1] * 20),
            step(3, 4, sampled=1),
            step(40, 2),
            step(3, CAPTURED_QUERY_LEN + 1),
        ):
            graphs.record_if_frequent(uncaptured)
    assert len(backend.captured) == before
    for count in range(2 * RECORDED_AFTER):
        graphs.record_if_frequent(step(3, 4))
        assert (graphs.find(step(3, 4)) == GraphKey(4, 4)) == (count + 1 >= RECORDED_AFTER)
    assert backend.captured[before:] == [GraphKey(4, 4)]
    draw = random.Random(0)
    for _ in range(1000):
        graphs.record_if_frequent(step(draw.randint(1, 32), draw.randint(2, 9)))
    assert len(backend.captured) - before <= 1 + 1000 / RECORDED_AFTER
    assert len(graphs) <= graphs.limit


def test_no_step_is_captured_where_the_backend_captures_none() -> None:
    graphs = Graphs(cast(Backend, Counting()), lambda batch: [], None, SPEC, ())
    assert list(graphs.capture()) == []
    assert not graphs.record(1, 2)
    assert graphs.find(step(1, 1)) is None
