"""A small substitute for the runner, which drives a backend and a model with shuffled blocks and a pool that is not
zeroed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import ForwardBatch, GraphKey, SlotParams, SlotSpec, Step
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.sampling import Sampled
from vllmlite.weights.host import HostTensor, HostWeight, PackedWeight


def host_batch(slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> ForwardBatch:
    """Rows of ``counts`` tokens from the positions ``starts``, with ids of -1; each row's last token is sampled."""
    start, count = np.array(starts, np.int32), np.array(counts, np.int32)
    loc = np.concatenate(([0], np.cumsum(count))).astype(np.int32)
    positions = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, counts, strict=True)]).astype(
        np.int32
    )
    slot_ids = np.array(slots, np.int32)
    return ForwardBatch(
        num_tokens=int(loc[-1]),
        num_rows=len(slots),
        max_query_len=int(count.max()),
        max_context=int((start + count).max()),
        token_ids=np.full(loc[-1], -1, np.int32),
        positions=positions,
        query_start_loc=loc,
        slots=slot_ids,
        context_lens=start + count,
        logits_rows=loc[1:] - 1,
        sample_slots=slot_ids,
        sample_positions=(start + count).astype(np.int64),
    )


class Paged:
    """A pool and slots: block tables grow with the sequences, out of a shuffled free list; blocks start as NaN."""

    def __init__(
        self,
        backend: Backend,
        spec: KVSpec,
        *,
        vocab_size: int = 8,
        num_blocks: int = 128,
        max_slots: int = 10,
        max_context: int | None = None,
    ) -> None:
        if spec.dtype not in backend.kv_dtypes:
            pytest.skip(f"the {backend.name} backend has no {spec.dtype} cache")
        self.backend, self.spec = backend, spec
        self.num_blocks = num_blocks
        self.kv = backend.alloc_kv(spec, num_blocks)
        self.max_context = max_context or num_blocks * spec.block_size
        max_blocks = -(-self.max_context // spec.block_size)
        self.slots = backend.alloc_slots(
            SlotSpec(max_slots, max_blocks, self.max_context, vocab_size, num_blocks)
        )
        self.free = np.random.default_rng(7).permutation(num_blocks).tolist()
        self.owned: list[list[int]] = [[] for _ in range(max_slots)]
        self.lengths = [0] * max_slots
        self.adapters = np.zeros(max_slots, np.int32)
        """Index of each slot's adapter."""
        self._poison(max_slots - 1)

    def _poison(self, slot: int) -> None:
        whole = max(1, self.max_context // self.spec.block_size)
        for begin in range(0, self.num_blocks, whole):
            blocks = np.arange(begin, min(begin + whole, self.num_blocks), dtype=np.int32)
            self.backend.append_blocks(self.slots, np.full_like(blocks, slot), blocks - begin, blocks)
            count = min(len(blocks) * self.spec.block_size, self.max_context)
            batch = self.upload(host_batch([slot], [0], [count]))
            width = 3 * self.spec.num_kv_heads * self.spec.head_dim
            for layer in range(self.spec.num_layers):
                rubbish = self.backend.tensor(np.full((count, width), np.nan, np.float32), self.backend.dtype)
                self.backend.attn_prep(rubbish, self.spec.num_kv_heads, None, self.kv, layer, batch)

    def upload(self, batch: ForwardBatch, key: GraphKey | None = None) -> ForwardBatch:
        return self.backend.upload(batch, self.slots, self.spec, key)

    def admit(self, slot: int, params: SlotParams | None = None) -> None:
        self.backend.set_slot(self.slots, slot, params or SlotParams())
        self.free += self.owned[slot]
        self.owned[slot], self.lengths[slot] = [], 0

    def batch(self, slots: Sequence[int], counts: Sequence[int]) -> ForwardBatch:
        """The batch of the next ``counts`` tokens of ``slots``, with blocks for them."""
        starts = [self.lengths[slot] for slot in slots]
        for slot, count in zip(slots, counts, strict=True):
            self.lengths[slot] += count
            owned = self.owned[slot]
            new = [
                self.free.pop() for _ in range(-(-self.lengths[slot] // self.spec.block_size) - len(owned))
            ]
            columns = np.arange(len(owned), len(owned) + len(new), dtype=np.int32)
            if new:
                self.backend.append_blocks(
                    self.slots, np.full_like(columns, slot), columns, np.array(new, np.int32)
                )
            owned += new
        batch = host_batch(slots, starts, counts)
        if self.adapters[list(slots)].any():
            batch.adapters = self.adapters[list(slots)]
        return batch


class PagedModel(Paged):
    """:class:`Paged` with a model."""

    def __init__(self, model: Any, **options: Any) -> None:
        options = {"max_context": 128} | options  # what the models of the tests are loaded for
        super().__init__(model.backend, model.kv_spec, vocab_size=model.vocab_size, **options)
        self.model = model
        self.captured: dict[GraphKey, Step] = {}

    def logits(self, slots: Sequence[int], chunks: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Feed ``chunks`` to ``slots`` in one step, and return the logits of every token, one row each."""
        batch = self.batch(slots, [len(chunk) for chunk in chunks])
        batch.token_ids = np.concatenate(chunks).astype(np.int32)
        device = self.upload(batch)
        adapted = () if device.token_adapters is None else (device.token_adapters,)
        logits = self.backend.to_host(self.model.logits(self.model.forward(device, self.kv), *adapted))
        return np.split(logits, batch.query_start_loc[1:-1])

    def sample(
        self,
        slots: Sequence[int],
        chunks: Sequence[NDArray[np.int32]] | None = None,
        *,
        captured: bool = False,
        num_logprobs: int = -1,
    ) -> Sampled:
        """Run a step as the runner does; without ``chunks`` it is fed the ids sampled last, on the device."""
        batch = self.batch(slots, [1] * len(slots) if chunks is None else [len(chunk) for chunk in chunks])
        if chunks is not None:
            batch.token_ids = np.concatenate(chunks).astype(np.int32)
        batch.num_logprobs = num_logprobs
        key = GraphKey(len(slots), 1, batch.adapters is not None) if captured else None
        if key is not None and key not in self.captured:
            self.captured[key] = self.backend.capture(key, self.step, self.slots, self.spec)
        device = self.upload(batch, key)
        (logits,) = self.step(device) if key is None else self.captured[key](device)
        sampled = self.backend.sample(logits, self.slots, device)
        self.backend.accept(sampled.ids, self.slots, device)
        return sampled

    def verify(
        self, slots: Sequence[int], drafts: Sequence[Sequence[int]], *, captured: bool = False
    ) -> list[list[int]]:
        """Feed each slot its last id, from the device, and its draft: returns the ids that are accepted."""
        counts = [1 + len(draft) for draft in drafts]
        batch = self.batch(slots, counts)
        for begin, draft in zip(batch.query_start_loc, drafts, strict=False):
            batch.token_ids[begin + 1 : begin + 1 + len(draft)] = draft
        batch.logits_rows = np.arange(batch.num_tokens, dtype=np.int32)
        batch.sample_slots = np.repeat(np.array(slots, np.int32), counts)
        batch.sample_positions = batch.positions.astype(np.int64) + 1
        key = GraphKey(len(slots), counts[0]) if captured else None
        if key is not None and key not in self.captured:
            self.captured[key] = self.backend.capture(key, self.step, self.slots, self.spec)
        device = self.upload(batch, key)
        (logits,) = self.step(device) if key is None else self.captured[key](device)
        sampled = self.backend.sample(logits, self.slots, device).ids
        accepted = self.backend.to_host(self.backend.accept(sampled, self.slots, device)).astype(bool)
        ids, ends = self.backend.to_host(sampled), batch.query_start_loc[1:-1]
        found: list[list[int]] = [
            own[kept].tolist()
            for own, kept in zip(np.split(ids, ends), np.split(accepted, ends), strict=True)
        ]
        for slot, count, own in zip(slots, counts, found, strict=True):
            self.lengths[slot] -= count - len(own)
        return found

    def step(self, batch: ForwardBatch) -> list[Any]:
        return [self.model.logits(self.backend.rows(self.model.forward(batch, self.kv), batch.logits_rows))]


def host_tensor(values: NDArray[Any], dtype: str = "float32") -> HostTensor:
    """``values`` as a checkpoint would store them in ``dtype``; bfloat16 truncates, so pass values that it can hold."""
    if dtype == "bfloat16":
        data = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")
    else:
        data = np.ascontiguousarray(values).astype(np.dtype(dtype).newbyteorder("<"))
    return HostTensor(dtype, values.shape, data.reshape(-1).view(np.uint8))


def stored_data(tensor: HostWeight) -> NDArray[np.uint8]:
    """The bytes of a tensor as its checkpoint stores them; a packed weight must have one part."""
    if isinstance(tensor, PackedWeight):
        (tensor,) = tensor.parts.values()
    return tensor.data


def same_bytes(one: HostWeight, other: HostWeight) -> bool:
    return stored_data(one).tobytes() == stored_data(other).tobytes()
