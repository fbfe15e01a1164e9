"""Pooling: one vector for each prompt, from the hidden states of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import Tensor


@dataclass(frozen=True, slots=True)
class Pool:
    """A row of a step whose hidden states are part of the vector of its prompt."""

    row: int
    slot: int
    pooling_type: str
    span: tuple[int, int]
    """Its first token in the step, and the one after its last."""
    begins: bool
    """Whether the row begins with the prompt's first token."""
    ends: bool
    """Whether the row ends with the prompt's last token."""
    num_prompt: int


class Pooling:
    """Computes the vectors of prompts, which may be computed in chunks over several steps."""

    def __init__(self, backend: Backend) -> None:
        """Start without prompts."""
        self._backend = backend
        self._sums: dict[int, NDArray[np.float64]] = {}
        """Slot → sum of the hidden states of a prompt so far, for its mean."""

    def read(self, pools: Sequence[Pool], hidden: Tensor) -> dict[int, list[float]]:
        """Add the ``hidden`` states of a step, and wait for them. Returns the vectors of the prompts that end in it:
        row → float32 elements."""
        found: dict[int, list[float]] = {}
        for kind in {pool.pooling_type for pool in pools}:
            group = [pool for pool in pools if pool.pooling_type == kind]
            vectors = self._backend.pool(hidden, np.array([pool.span for pool in group], np.int32), kind)
            for pool, vector in zip(group, vectors, strict=True):
                if kind == "MEAN":
                    before = self._sums.pop(pool.slot, None)
                    vector = vector if pool.begins or before is None else before + vector
                if not pool.ends:
                    self._sums[pool.slot] = vector
                    continue
                mean = vector / pool.num_prompt if kind == "MEAN" else vector
                found[pool.row] = mean.astype(np.float32).tolist()
        return found
