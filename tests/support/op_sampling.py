"""Slots that sample every token from logits given by a test, and formulas to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paged import host_batch

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch, SlotParams, SlotSpec
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.sampling import Logprobs, Sampled

Array = NDArray[Any]


SPEC = KVSpec(1, 1, 16, 16, "float32")


class Sampler:
    """Slots whose rows are all sampled in one step, from logits given by the test."""

    def __init__(self, backend: Backend, params: Sequence[SlotParams], vocab_size: int) -> None:
        self.backend = backend
        self.params = list(params)
        self.slots = backend.alloc_slots(SlotSpec(len(params), 1, 16, vocab_size, 1))
        for slot, one in enumerate(params):
            backend.set_slot(self.slots, slot, one)

    def upload(
        self,
        rows: Sequence[int],
        positions: Sequence[int] | Array | int,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> ForwardBatch:
        """Upload a step that samples from every token of ``rows``: id 0, then the row's drafts."""
        drafts = [()] * len(rows) if drafts is None else drafts
        counts = [1 + len(draft) for draft in drafts]
        batch = host_batch(rows, [0] * len(rows), counts)
        ids = np.concatenate([[0, *draft] for draft in drafts])
        batch.token_ids = ids.astype(np.int32)
        batch.logits_rows = np.arange(len(ids), dtype=np.int32)
        batch.sample_slots = np.repeat(np.asarray(rows, np.int32), counts)
        batch.sample_positions = np.broadcast_to(np.asarray(positions, np.int64), len(ids)).copy()
        return batch

    def sample(
        self,
        logits: Array,
        positions: Sequence[int] | Array | int = 1,
        *,
        rows: Sequence[int] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
        masks: dict[int, Array] | None = None,
        num_logprobs: int = -1,
    ) -> tuple[Sampled, Array]:
        """The sampled ids, and which of them are accepted."""
        batch = self.upload(list(range(len(self.params))) if rows is None else list(rows), positions, drafts)
        batch.num_logprobs = num_logprobs
        if masks:
            batch.mask_rows = np.array(list(masks), np.int32)
            batch.bitmask = np.stack([bits(allowed) for allowed in masks.values()])
        device = self.backend.upload(batch, self.slots, SPEC)
        count = len(batch.logits_rows)
        given = np.broadcast_to(np.asarray(logits, np.float32), (count, np.shape(logits)[-1]))
        sampled = self.backend.sample(self.backend.tensor(given.copy()), self.slots, device)
        return sampled, self.backend.to_host(self.backend.accept(sampled.ids, self.slots, device))

    def ids(self, logits: Array, positions: Sequence[int] | Array | int = 1, **options: Any) -> list[int]:
        sampled, _ = self.sample(logits, positions, **options)
        found: list[int] = self.backend.to_host(sampled.ids).tolist()
        return found

    def last_ids(self) -> list[int]:
        """The last accepted id of each slot, as the next step would read it."""
        rows = list(range(len(self.params)))
        batch = host_batch(rows, [1] * len(rows), [1] * len(rows))
        ids: list[int] = self.backend.to_host(self.backend.upload(batch, self.slots, SPEC).token_ids).tolist()
        return ids


def bits(allowed: Array) -> NDArray[np.int32]:
    """A bool vector as a bitmask in the form of ``Backend.sample``."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, np.bool_)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view("<i4").astype(np.int32)


def read(backend: Backend, logprobs: Logprobs | None) -> tuple[Array, ...]:
    assert logprobs is not None
    return tuple(backend.to_host(x) for x in (logprobs.chosen, logprobs.rank, logprobs.top_ids, logprobs.top))


def check_logprobs(logits: Array, ids: Sequence[int], k: int, found: tuple[Array, ...]) -> None:
    chosen, rank, top_ids, top = found
    exact = logits.astype(np.float64)
    exact = (
        exact
        - np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - exact.max(-1, keepdims=True)
    )
    order = np.argsort(-exact, axis=-1, kind="stable")
    rows = np.arange(len(ids))
    np.testing.assert_allclose(chosen, exact[rows, list(ids)], atol=2e-5)
    assert rank.tolist() == [order[row].tolist().index(token) + 1 for row, token in enumerate(ids)]
    assert top_ids.tolist() == order[:, :k].tolist()
    np.testing.assert_allclose(top, np.take_along_axis(exact, order[:, :k], -1), atol=2e-5)
    assert [array.dtype.name for array in found] == ["float32", "int32", "int32", "float32"]
