"""The parts of a step: batches, slots, captured steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from op_backends import check, numbers, put
from paged import host_batch

from vllmlite.backends.base import Backend, Rope
from vllmlite.backends.batch import ForwardBatch, GraphKey, SlotParams, SlotSpec
from vllmlite.backends.kv_cache import KVSpec

SPEC = KVSpec(1, 1, 16, 4, "float32")


@pytest.mark.parametrize(
    ("field", "values", "complaint"),
    [
        ("token_ids", [3, -2, 5], "token id -2 is not within -1 and 9"),
        ("positions", [0, 1, 4], "position 4 is not within 0 and 3"),
        ("positions", [-1, 1, 0], "position -1 is not within 0 and 1"),
        ("context_lens", [2, 5], "context length 5 is not within 0 and 4"),
        ("query_start_loc", [0, 4, 3], "query_start_loc 4 is not within 0 and 3"),
        ("query_start_loc", [0, 2, 2], "query_start_loc does not run from 0 to num_tokens"),
    ],
)
def test_batches_with_indices_out_of_range_are_refused(
    exact: Backend, field: str, values: list[int], complaint: str
) -> None:
    if exact.name == "torch":
        pytest.skip("the reference trusts its caller")
    slots = exact.alloc_slots(SlotSpec(2, 8, 32, 10, 8))
    batch = host_batch([0, 1], [0, 3], [2, 1])
    exact.upload(batch, slots, SPEC)
    setattr(batch, field, np.array(values, np.int32))
    with pytest.raises((IndexError, ValueError), match=complaint):
        exact.upload(batch, slots, SPEC)


@pytest.mark.parametrize(("max_context", "accepted"), [(11, 11), (40, 32)])
def test_contexts_longer_than_the_slots_are_refused(exact: Backend, max_context: int, accepted: int) -> None:
    if exact.name == "torch":
        pytest.skip("the reference trusts its caller")
    slots = exact.alloc_slots(SlotSpec(2, 8, max_context, 10, 8))
    exact.upload(host_batch([0], [accepted - 1], [1]), slots, SPEC)
    with pytest.raises(IndexError, match=f"max_context {accepted + 1} is not within 0 and {accepted}"):
        exact.upload(host_batch([0], [accepted], [1]), slots, SPEC)


def test_ropes_and_pools_that_do_not_fit_the_slots_are_refused(exact: Backend) -> None:
    if exact.name == "torch":
        pytest.skip("the reference trusts its caller")
    slots = exact.alloc_slots(SlotSpec(2, 8, 32, 10, 8))
    kv, batch = exact.alloc_kv(SPEC, 8), exact.upload(host_batch([0], [0], [1]), slots, SPEC)
    qkv = put(exact, numbers((1, 3 * 16)))

    def rope(positions: int) -> Rope:
        return Rope(exact.tensor(np.ones((positions, 16), np.float32)), 16)

    q = exact.attn_prep(qkv, 1, rope(32), kv, 0, batch)
    exact.paged_attention(q, kv, 0, batch, 1.0)
    with pytest.raises(ValueError, match="32 positions or more"):
        exact.attn_prep(qkv, 1, rope(31), kv, 0, batch)
    few, large = exact.alloc_kv(SPEC, 7), exact.alloc_kv(KVSpec(1, 1, 16, 8, "float32"), 8)
    for pool, complaint in (
        (few, "of a pool of 8 blocks, and this one has 7"),
        (large, "caches of blocks of 4 tokens, and this one's hold 8"),
    ):
        with pytest.raises(ValueError, match=complaint):
            exact.attn_prep(qkv, 1, None, pool, 0, batch)
        with pytest.raises(ValueError, match=complaint):
            exact.paged_attention(q, pool, 0, batch, 1.0)


def test_upload_fills_in_last_ids(exact: Backend) -> None:
    slots = exact.alloc_slots(SlotSpec(4, 8, 32, 10, 8))
    for slot in range(4):
        exact.set_slot(slots, slot, SlotParams())
    first = exact.upload(host_batch([2, 0], [0, 0], [1, 1]), slots, SPEC)
    sampled = exact.sample(put(exact, np.eye(10)[[7, 4]]), slots, first)
    exact.accept(sampled.ids, slots, first)
    assert exact.to_host(sampled.ids).tolist() == [7, 4]
    batch = host_batch([0, 1, 2], [1, 0, 1], [1, 3, 1])
    batch.token_ids = np.array([-1, 5, 6, 8, -1], np.int32)
    assert exact.to_host(exact.upload(batch, slots, SPEC).token_ids).tolist() == [4, 5, 6, 8, 7]
    assert batch.token_ids.tolist() == [-1, 5, 6, 8, -1]


def test_a_captured_step_equals_the_step(exact: Backend) -> None:
    """For every number of rows up to the captured one, however often, and whatever other steps run in between."""
    if not exact.graph_rows(8):
        pytest.skip("the backend captures nothing")
    slots = exact.alloc_slots(SlotSpec(8, 8, 32, 10, 8))
    table = numbers((10, 16), 3)
    weight = exact.tensor(table.astype(np.float32))

    def step(batch: Any) -> list[Any]:
        return [exact.rows(exact.embedding(batch.token_ids, weight), batch.logits_rows)]

    steps = {
        GraphKey(rows, query_len): exact.capture(GraphKey(rows, query_len), step, slots, SPEC)
        for rows in exact.graph_rows(8)
        for query_len in (1, 2, 9)
    }
    for rows, query_len in ((1, 1), (5, 1), (8, 9), (2, 2), (8, 1), (5, 9), (1, 9), (7, 2)):
        key = min(key for key in steps if key[0] >= rows and key[1] == query_len)
        (found,) = steps[key](exact.upload(batch := drafted([query_len] * rows), slots, SPEC, key))
        check(exact, found, table[batch.token_ids])
    for counts in ([9, 1, 4], [1, 1, 2, 9, 1, 1, 3]) if exact.pads_rows else ():
        key = min(key for key in steps if key[0] >= len(counts) and key[1] == 9)
        (found,) = steps[key](exact.upload(batch := drafted(counts), slots, SPEC, key))
        check(exact, found, table[batch.token_ids])


def drafted(counts: Sequence[int]) -> ForwardBatch:
    """Rows of ``counts`` tokens, all of which are sampled from."""
    total = sum(counts)
    batch = host_batch(range(len(counts)), [0] * len(counts), counts)
    batch.token_ids = (np.arange(total) * 3 % 10).astype(np.int32)
    batch.logits_rows = np.arange(total, dtype=np.int32)
    batch.sample_slots = np.repeat(batch.slots, counts)
    batch.sample_positions = batch.positions.astype(np.int64) + 1
    return batch


def test_batches_that_do_not_fit_a_captured_step_are_refused(exact: Backend) -> None:
    if exact.name != "cuda":
        pytest.skip("the cuda backend pads batches for their captured step")
    slots = exact.alloc_slots(SlotSpec(8, 8, 32, 10, 8))
    last_only = host_batch(range(2), [0, 0], [3, 3])
    for batch, key in (
        (drafted([2, 2, 2]), GraphKey(2, 2)),
        (drafted([1, 4]), GraphKey(2, 3)),
        (last_only, GraphKey(2, 3)),
    ):
        with pytest.raises(
            ValueError, match=f"not up to 2 rows of up to {key[1]} tokens, all of them sampled from"
        ):
            exact.upload(batch, slots, SPEC, key)
    with pytest.raises(ValueError, match="rows of 10 tokens; 1 to 9 are possible"):
        exact.upload(drafted([10]), slots, SPEC, GraphKey(1, 10))
