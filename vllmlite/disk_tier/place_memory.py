"""The host memory through which blocks are copied to and from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class PlaceMemory:
    """Host memory divided into numbered places, one for each block.

    Each of ``parts`` is ``[places, bytes]`` and holds a part of every block: with several ranks, the part of one
    rank."""

    parts: Sequence[NDArray[np.uint8]]
    """Empty while the engine sleeps without a runner; then nothing is read or written."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all parts together."""
        return sum(int(part.shape[1]) for part in self.parts)

    def __getitem__(self, place: int) -> list[NDArray[np.uint8]]:
        """Return the parts of the block in a place."""
        return [part[place] for part in self.parts]
