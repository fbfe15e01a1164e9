"""Integer codes of a weight as a checkpoint packs them, and their conversion to rows of 4 or 8 bits a code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.weights.host import HostTensor, Shape
from vllmlite.weights.schemes.bits import pack_rows, row_bytes, unpack_rows, words

Bytes: TypeAlias = NDArray[np.uint8]

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each of the eight rows of one of AWQ's words, the nibble that holds its code."""
AWQ_ROWS = len(AWQ_NIBBLES)


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """Unsigned codes ``[rows, columns]`` of 2, 3, 4 or 8 bits, in one of three packings.

    - ``rows``: ``data [rows, n]`` holds each row's codes as a stream of bits, low bits first; elements may follow that
      are not used.
    - ``words``: int32 ``data [columns * bits / 32, rows]`` holds the same streams, word by word.
    - ``awq``: int32 ``data [columns, rows / 8]`` holds eight rows' codes of 4 bits in a word, see :data:`AWQ_NIBBLES`.
    """

    packing: Literal["rows", "words", "awq"]
    bits: int
    shape: Shape
    """Rows and columns of the weight."""
    data: HostTensor
    added: int = 0
    """Number to add to every code, modulo 256."""
    order: NDArray[np.int32] | None = None
    """The stored column of each column of the result; None: the same."""

    def in_rows(self, bits: int) -> Bytes | None:
        """Return a view of the codes as :meth:`repacked` returns them, or None if they are stored otherwise."""
        if self.packing != "rows" or self.bits != bits or self.added or self.order is not None:
            return None
        return self.data.data.reshape(self.shape[0], -1)[:, : -(-self.shape[1] * bits // 8)]

    def unpacked(self) -> Bytes:
        """Return the codes, a byte each: uint8 ``[rows, columns]``."""
        if self.packing == "awq":
            codes = self._awq()
        else:
            stored = (
                self.data.data.reshape(self.shape[0], -1)
                if self.packing == "rows"
                else row_bytes(words(self.data).T)
            )
            codes = unpack_rows(stored, self.bits, self.shape[1])
        if self.added:
            codes = codes + np.uint8(self.added)
        return codes if self.order is None else codes[:, self.order]

    def repacked(self, bits: int) -> Bytes:
        """Return the codes as rows of ``bits``, 4 or 8, a code: uint8 ``[rows, ceil(columns * bits / 8)]``, low bits
        first. Backends may have native code for this."""
        return pack_rows(self.unpacked(), bits)

    def _awq(self) -> Bytes:
        by_row = np.ascontiguousarray(words(self.data).T)
        codes = np.empty((len(by_row), AWQ_ROWS, self.shape[1]), np.uint8)
        for row, nibble in enumerate(AWQ_NIBBLES):
            codes[:, row] = by_row >> np.uint32(4 * nibble) & np.uint32(15)
        return codes.reshape(self.shape)
