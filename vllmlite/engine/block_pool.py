"""The pool of KV-cache blocks: reference counts, a least-recently-used free list, and the prefix cache.

A block is an integer. It is *used* while its reference count is positive, else *free*. A full block may have a *block
hash*, a digest that chains the hash of the block before it, its tokens, and everything else its contents depend on. A
block with a hash is *cached*: it keeps its contents while it is free, until it is allocated again, and the next request
with the same prefix can share it (PagedAttention, Kwon et al. 2023; automatic prefix caching as in vLLM).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

DIGEST_SIZE = sha256().digest_size
PRIVATE = b"private"
"""Suffix of the block hashes of private sequences."""


def root_digest(*parts: str, private: bool = False) -> bytes:
    """Return the parent hash of a sequence's first block, from the properties that its contents depend on besides
    tokens (such as the cache salt). All block hashes of a ``private`` sequence are marked (:func:`is_private`)."""
    return sha256(repr(parts).encode()).digest() + (PRIVATE if private else b"")


def is_private(digest: bytes) -> bool:
    """Return whether a block hash is that of a private sequence, whose blocks must not be written to disk."""
    return len(digest) > DIGEST_SIZE


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the SHA-256 of the ``parent`` block's hash and this block's tokens.

    SHA-256 resists collisions, so equal hashes mean equal contents, also between hostile users.
    """
    return sha256(parent + array("q", token_ids).tobytes()).digest() + parent[DIGEST_SIZE:]


class BlockPool:
    """A pool of ``num_blocks`` blocks. Every operation takes O(1) time for each block."""

    def __init__(self, num_blocks: int) -> None:
        """Make a pool of free blocks, none of them cached."""
        self.num_blocks = num_blocks
        self.peak_used = 0
        self.reset()

    def reset(self) -> None:
        """Free every block and forget every hash, whatever state an interrupted call has left."""
        self._references = [0] * self.num_blocks
        self._hashes: list[bytes | None] = [None] * self.num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated, including cached ones."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of blocks that at least one request holds."""
        return self.num_blocks - len(self._free)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the cached blocks of the longest prefix of ``hashes`` that the pool has. Their reference counts do not
        change."""
        blocks = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def has(self, digest: bytes) -> bool:
        """Return whether a block has this hash."""
        return digest in self._by_hash

    def digest(self, block: int) -> bytes | None:
        """Return the hash of a block, if it has one."""
        return self._hashes[block]

    def num_free_in(self, blocks: Iterable[int]) -> int:
        """Return how many of ``blocks`` are free."""
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Take one more reference to each of ``blocks``."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        self.peak_used = max(self.peak_used, self.num_used)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, the least recently used first, and forget their hashes. At least ``count`` must
        be free."""
        blocks = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        self.peak_used = max(self.peak_used, self.num_used)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence. Of these, the sequence's last block is reused first.

        Blocks without a hash go to the front of the free list, since they cannot be shared later."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def cache(self, block: int, digest: bytes) -> None:
        """Give a full, used block its hash, unless another block has the same hash already."""
        if self._hashes[block] is None and digest not in self._by_hash:
            self._hashes[block] = digest
            self._by_hash[digest] = block

    def forget(self, digests: Iterable[bytes]) -> None:
        """Remove these hashes from the prefix cache. Blocks in use stay in use."""
        for block in [self._by_hash[digest] for digest in digests if digest in self._by_hash]:
            self._forget(block)

    def forget_all(self) -> None:
        """Remove all hashes from the prefix cache. Blocks in use stay in use."""
        for block in list(self._by_hash.values()):
            self._forget(block)

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless counts, free list and hashes agree with the block lists of all ``holders``."""
        held = Counter(block for blocks in holders for block in blocks)
        for block in range(self.num_blocks):
            assert self._references[block] == held[block], (block, self._references[block], held[block])
            assert (block in self._free) == (held[block] == 0), block
        cached = {digest: block for block, digest in enumerate(self._hashes) if digest is not None}
        assert cached == self._by_hash
        assert len(cached) == sum(digest is not None for digest in self._hashes)

    def _forget(self, block: int) -> None:
        digest = self._hashes[block]
        if digest is not None:
            self._hashes[block] = None
            del self._by_hash[digest]
