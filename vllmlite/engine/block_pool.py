"""The pool of KV-cache blocks: reference counts, a least-recently-used free list, and the prefix cache's names.

A block is an integer. It is *used* while its reference count is positive, else *free*. A full block may be *named*
by a digest that chains its parent's digest, its tokens and whatever else its numbers depend on; a named block keeps
its contents while it is free, until it is handed out again, and can be taken up by the next request that asks for
the same prefix (PagedAttention, Kwon et al. 2023; automatic prefix caching as in vLLM).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256


def root_digest(*parts: str) -> bytes:
    """The parent of a sequence's first block: what its numbers depend on besides its tokens (cache salt, adapter)."""
    return sha256(repr(parts).encode()).digest()


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block: SHA-256 of the ``parent`` block's name and this block's tokens.

    Nobody can find two prefixes of one name, so equal names mean equal contents, also between hostile users.
    """
    return sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """``num_blocks`` blocks; every operation is O(1) a block."""

    def __init__(self, num_blocks: int) -> None:
        """All blocks free, none named."""
        self.num_blocks = num_blocks
        self.peak_used = 0
        self.reset()

    def reset(self) -> None:
        """Free every block and forget every name, whatever state an interrupted call has left."""
        self._references = [0] * self.num_blocks
        self._names: list[bytes | None] = [None] * self.num_blocks
        self._by_name: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, named ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one request holds."""
        return self.num_blocks - len(self._free)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Blocks of the longest run of ``names`` from the start that is in the pool. Takes no reference."""
        blocks = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_in(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` are free."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each of ``blocks``."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        self.peak_used = max(self.peak_used, self.num_used)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, the least recently used first; their names are forgotten. Needs that many free."""
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        self.peak_used = max(self.peak_used, self.num_used)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence, the sequence's last block to be reused first.

        Blocks without a name hold nothing worth keeping: they go to the front of the free list.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._names[block] is None:
                    self._free.move_to_end(block, last=False)

    def name(self, block: int, name: bytes) -> None:
        """Name a full, used block. Where another block already bears the name, this one stays unnamed."""
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block

    def forget_all(self) -> None:
        """Empty the prefix cache: no block is named; used blocks stay with their holders."""
        for block in list(self._by_name.values()):
            self._forget(block)

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless counts, free list and names agree with the block lists of all ``holders``."""
        held = Counter(block for blocks in holders for block in blocks)
        for block in range(self.num_blocks):
            assert self._references[block] == held[block], (block, self._references[block], held[block])
            assert (block in self._free) == (held[block] == 0), block
        named = {name: block for block, name in enumerate(self._names) if name is not None}
        assert named == self._by_name
        assert len(named) == sum(name is not None for name in self._names)

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            del self._by_name[name]
