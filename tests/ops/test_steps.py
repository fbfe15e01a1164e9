"""The parts of a step: batches, slots, captured steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from op_backends import check, numbers, put
from paged import host_batch

from vllmlite.backends.base import Backend, KVSpec, Rope, SlotParams, SlotSpec

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

    steps = {rows: exact.capture((rows, 1), step, slots, SPEC) for rows in exact.graph_rows(8)}
    for rows in (1, 5, 8, 2, 8, 5):
        size = min(size for size in steps if size >= rows)
        batch = host_batch(list(range(rows)), [0] * rows, [1] * rows)
        batch.token_ids = (np.arange(rows) * 3 % 10).astype(np.int32)
        (found,) = steps[size](exact.upload(batch, slots, SPEC, (size, 1)))
        check(exact, found, table[batch.token_ids])
