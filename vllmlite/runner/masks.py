"""Bitmasks of the ids that may be sampled."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.batch import ForwardBatch
from vllmlite.engine.schedule import Schedule


def restrict(
    batch: ForwardBatch, schedule: Schedule, allowed_ids: Mapping[int, NDArray[np.uint32]], vocab_size: int
) -> None:
    """Set the bitmasks of ``batch`` from the grammars and banned ids of the schedule's sampled positions, and from
    ``allowed_ids``: slot → bitmask of the ids that its request allows."""
    sample_slots = batch.sample_slots.tolist()
    restricted = [
        index
        for index, slot in enumerate(sample_slots)
        if index in schedule.masks or index in schedule.banned or slot in allowed_ids
    ]
    if not restricted:
        return
    bitmask = np.full((len(restricted), -(-vocab_size // 32)), 2**32 - 1, np.uint32)
    for mask, index in zip(bitmask, restricted, strict=True):
        if (grammar := schedule.masks.get(index)) is not None:
            mask[:] = np.frombuffer(grammar, "<u4")
        if (allowed := allowed_ids.get(sample_slots[index])) is not None:
            mask &= allowed
        if (banned := schedule.banned.get(index)) is not None:
            mask &= ~pack_bits(np.array(banned), vocab_size)
    batch.mask_rows = np.array(restricted, np.int32)
    batch.bitmask = bitmask.view(np.int32)


def pack_bits(ids: NDArray[np.integer], vocab_size: int) -> NDArray[np.uint32]:
    """Return a bitmask ``[ceil(vocab_size / 32)]`` with the bits of ``ids`` set: bit ``i % 32`` of word ``i // 32``."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[ids[ids < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
