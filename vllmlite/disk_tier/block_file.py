"""A file of bounded size that stores blocks by their hashes, and returns only blocks that are exactly as they were
written.

Layout: a header, a table with an entry for each slot, and the slots, each of the size of a block. An entry has the hash
of the block, the checksum of fingerprint, hash and contents, and a number that grows with each write. It is cleared
before its slot is written and set afterwards, so that a process that is killed leaves whole blocks or none; damage by
the machine itself is found by the checksums. The fingerprint names everything besides the hash that the contents depend
on: a file with another one is erased.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<16s32sQQ32s")
"""Magic number, fingerprint, bytes of a block, number of slots, checksum of these."""
ENTRY = struct.Struct("<32s32sQ8s")
"""Hash, checksum of the contents, sequence number, checksum of these."""
MAGIC = b"vllmlite-blocks1"
ALIGNMENT = 4096
ZEROS = bytes(1 << 20)


class BlockFile:
    """Blocks of ``block_bytes`` bytes in an open, locked file; the least recently used ones are overwritten. One thread
    reads and writes; any thread may look up hashes."""

    def __init__(self, fd: int, max_bytes: int, block_bytes: int, fingerprint: bytes) -> None:
        """Use the descriptor ``fd``, and close it at the end. The file is erased unless it was written with the same
        arguments. Raises ValueError if it is too small for one block."""
        self._fd = fd
        self._block_bytes = block_bytes
        self._stride = _aligned(block_bytes)
        self.num_slots = (max_bytes - 2 * ALIGNMENT) // (self._stride + ENTRY.size)
        if self.num_slots < 1:
            raise ValueError(f"must be at least {self._stride + ENTRY.size + 2 * ALIGNMENT}")
        self._fingerprint = fingerprint
        self._slots_at = _aligned(ALIGNMENT + self.num_slots * ENTRY.size)
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        """Hash → slot, the least recently used first."""
        self._free: list[int] = []
        self._checksums: dict[bytes, bytes] = {}
        self._sequence = 0
        header = _header(fingerprint, block_bytes, self.num_slots)
        found = os.pread(fd, len(header), 0)
        self.is_new = found != header
        if self.is_new:
            self._erase(bool(found))
            os.pwrite(fd, header, 0)
            self._free = list(range(self.num_slots))[::-1]
        else:
            self._read_table()
        self._header = header

    def __contains__(self, digest: bytes) -> bool:
        """Return whether the table has an entry for this hash; the block itself may turn out to be damaged."""
        return digest in self._slots

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._slots)

    def digests(self) -> list[bytes]:
        """Return the hashes of all blocks, the least recently used first."""
        return list(self._slots)

    def read_ahead(self, digests: Sequence[bytes]) -> None:
        """Have the system read the blocks of these hashes."""
        for digest in digests:
            slot = self._slots.get(digest)
            if slot is not None and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, self._at(slot), self._block_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, digest: bytes, *parts: NDArray[np.uint8]) -> bool:
        """Read a block into arrays of contiguous bytes, one after the other. Returns False if the block is missing or
        damaged; the arrays then have arbitrary contents."""
        slot = self._slots.get(digest)
        if slot is None:
            return False
        try:
            whole = self._read_into(parts, self._at(slot))
        except OSError:
            whole = False
        if not whole or self._checksum(digest, parts) != self._checksums[digest]:
            self._drop(digest)
            return False
        self._slots.move_to_end(digest)
        return True

    def write(self, digest: bytes, *parts: NDArray[np.uint8]) -> None:
        """Write a block, which consists of the bytes of ``parts``, unless it is there. Raises OSError, and does not
        keep the block, if the disk is full or fails."""
        if digest in self._slots:
            self._slots.move_to_end(digest)
            return
        if not self._free:
            self._drop(next(iter(self._slots)))
        slot = self._free.pop()
        checksum = self._checksum(digest, parts)
        self._sequence += 1
        try:
            os.pwrite(self._fd, bytes(ENTRY.size), self._entry_at(slot))
            self._write_all(parts, self._at(slot))
            fields = ENTRY.pack(digest, checksum, self._sequence, b"")[:-8]
            os.pwrite(self._fd, fields + sha256(fields).digest()[:8], self._entry_at(slot))
        except OSError:
            self._free.append(slot)
            raise
        self._checksums[digest] = checksum
        self._slots[digest] = slot

    def forget_all(self) -> None:
        """Erase every block: overwrite what was written, then free its space."""
        self._slots.clear()
        self._checksums.clear()
        self._erase(True)
        os.pwrite(self._fd, self._header, 0)
        self._free = list(range(self.num_slots))[::-1]

    def close(self) -> None:
        """Close the file, which also unlocks it."""
        os.close(self._fd)

    def _at(self, slot: int) -> int:
        return self._slots_at + slot * self._stride

    def _entry_at(self, slot: int) -> int:
        return ALIGNMENT + slot * ENTRY.size

    def _checksum(self, digest: bytes, parts: Sequence[NDArray[np.uint8]]) -> bytes:
        total = sha256(self._fingerprint + digest)
        for part in parts:
            total.update(part.data)
        return total.digest()

    def _read_into(self, parts: Sequence[NDArray[np.uint8]], at: int) -> bool:
        for part in parts:
            view = memoryview(part.data)
            while view:
                count = os.preadv(self._fd, [view], at)
                if not count:
                    return False
                view, at = view[count:], at + count
        return True

    def _write_all(self, parts: Sequence[NDArray[np.uint8]], at: int) -> None:
        for part in parts:
            view = memoryview(part.data)
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count

    def _drop(self, digest: bytes) -> None:
        del self._checksums[digest]
        self._free.append(self._slots.pop(digest))

    def _read_table(self) -> None:
        table = os.pread(self._fd, self.num_slots * ENTRY.size, ALIGNMENT)
        found = {}
        for slot in range(self.num_slots):
            entry = table[slot * ENTRY.size : (slot + 1) * ENTRY.size]
            if len(entry) == ENTRY.size and any(entry) and sha256(entry[:-8]).digest()[:8] == entry[-8:]:
                digest, checksum, sequence, _ = ENTRY.unpack(entry)
                found[sequence] = (digest, checksum, slot)
        for sequence in sorted(found):
            digest, checksum, slot = found[sequence]
            self._slots[digest], self._checksums[digest] = slot, checksum
            self._sequence = sequence
        used = set(self._slots.values())
        self._free = [slot for slot in range(self.num_slots) if slot not in used][::-1]

    def _erase(self, overwrite: bool) -> None:
        """Empty the file, after overwriting those parts of it that have been written."""
        size = os.fstat(self._fd).st_size if overwrite else 0
        at = 0
        with suppress(OSError):  # the end of what was written, or a file system that cannot tell
            while at < size:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
                end = os.lseek(self._fd, at, os.SEEK_HOLE)
                while at < end:
                    at += os.pwrite(self._fd, memoryview(ZEROS)[: end - at], at)
        if size:
            os.fdatasync(self._fd)
        os.ftruncate(self._fd, 0)


def file_size(num_slots: int, block_bytes: int) -> int:
    """Return the bytes of a file of ``num_slots`` slots."""
    return num_slots * (_aligned(block_bytes) + ENTRY.size) + 2 * ALIGNMENT


def stored_slots(fd: int, block_bytes: int, fingerprint: bytes) -> int | None:
    """Return the number of slots of a file; None if it was not written with these arguments."""
    found = os.pread(fd, HEADER.size, 0)
    if len(found) < HEADER.size:
        return None
    num_slots: int = HEADER.unpack(found)[3]
    return num_slots if found == _header(fingerprint, block_bytes, num_slots) else None


def _header(fingerprint: bytes, block_bytes: int, num_slots: int) -> bytes:
    fields = HEADER.pack(MAGIC, fingerprint, block_bytes, num_slots, b"")[:-32]
    return fields + sha256(fields).digest()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
