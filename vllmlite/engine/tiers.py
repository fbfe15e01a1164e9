"""Cache tiers: blocks that leave the pool are kept in host memory, and on disk, under the same hashes. No tensors.

Host memory is a second block pool, whose blocks are called places. The copies of a step are two lists in its schedule:
the runner first saves blocks of the pool to places, then loads places to blocks, then computes.

**Saving.** A free block with a hash is saved before the pool runs dry: as long as fewer than :attr:`Tiers.watermark`
blocks could be allocated without losing anything, each step saves some of the least recently used ones, beside its
computation. A block that is allocated before that is saved in the same step. With a disk, every block is saved soon
after it has become full, so that it survives the process. Preempted sequences need nothing of their own: their full
blocks are free blocks with a hash.

**Loading.** A request that is admitted continues its cached prefix with blocks that the host has, if copying takes
less time than computing (:class:`TransferCost`). What only the disk has is first read into places, by a thread, while
other requests run; the request then waits in the batch without a row (:attr:`Request.awaits_blocks`).

Places of a step's copies are held until the step is collected: only then may the disk's thread touch them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from vllmlite.engine.block_pool import BlockPool, is_private

LEAST_SAVES = 4
"""Minimum number of blocks that a step may save."""
READ_AHEAD = 64
"""Maximum number of blocks that are being read from disk at a time."""
PATIENCE = 2.0
"""Maximum time that a request waits for a prefix from disk, as a multiple of the time to compute it."""
LONGEST_WAIT = 30.0
"""Maximum seconds that a request waits for the disk while the time to compute a token is not known."""


@dataclass(slots=True)
class Copies:
    """The block copies of a step, which are made before its other work."""

    save_blocks: list[int] = field(default_factory=list)
    """With ``save_places``: block ``save_blocks[i]`` is copied to place ``save_places[i]`` in host memory."""
    save_places: list[int] = field(default_factory=list)
    load_places: list[int] = field(default_factory=list)
    """With ``load_blocks``: place ``load_places[i]`` is copied to block ``load_blocks[i]``, after the saves."""
    load_blocks: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Return whether there is any copy."""
        return bool(self.save_blocks or self.load_blocks)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A finished transfer between the disk and a place in host memory."""

    digest: bytes
    place: int
    to_host: bool
    done: bool
    """Whether the block was transferred; False if the disk did not have it, or had no room for it."""


class Disk(Protocol):
    """Blocks on disk. A thread moves them; only :meth:`wait` and :meth:`cancel` wait for it."""

    @property
    def seconds_per_block(self) -> float | None:
        """Measured time of a read; None before the first one."""
        ...

    def __contains__(self, digest: bytes) -> bool:
        """Return whether the disk has the block of this hash, or is about to write it."""
        ...

    def read(self, digest: bytes, place: int) -> None:
        """Begin to read a block to a place in host memory."""
        ...

    def write(self, digest: bytes, place: int) -> None:
        """Begin to write the block at a place in host memory."""
        ...

    def finished(self) -> list[Transfer]:
        """Return the transfers that have finished since the last call."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until a transfer has finished, for at most ``seconds``."""
        ...

    def cancel(self) -> None:
        """Drop the transfers that have not begun, and wait for one that has. None of them is reported as finished."""
        ...

    def forget_all(self) -> None:
        """Erase all blocks."""
        ...


@dataclass(slots=True)
class TransferCost:
    """Measured times of copying a block and of computing a token, by which a copy is preferred to computing or not."""

    block_size: int
    host_seconds: float = 0.0
    """Seconds to copy a block from host memory."""
    token_seconds: float | None = None
    """Seconds to compute a token of a prompt; None before it was measured."""

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a step; steps of few tokens are ignored."""
        if num_tokens > 2 * self.block_size:
            measured = seconds / num_tokens
            last = measured if self.token_seconds is None else self.token_seconds
            self.token_seconds = 0.7 * last + 0.3 * measured

    def pays(self, block_seconds: float | None) -> bool:
        """Return whether copying a block in ``block_seconds`` is faster than computing it; True if either time is not
        known."""
        if self.token_seconds is None or block_seconds is None:
            return True
        return block_seconds < self.block_size * self.token_seconds

    def patience(self, num_blocks: int) -> float:
        """Return the maximum seconds to wait for ``num_blocks`` blocks from disk."""
        if self.token_seconds is None:
            return LONGEST_WAIT
        return PATIENCE * num_blocks * self.block_size * self.token_seconds


class TieredPool(BlockPool):
    """A block pool that knows which cached blocks are in no other tier."""

    def __init__(self, num_blocks: int, host: BlockPool, at_once: bool) -> None:
        """Create a pool whose blocks are saved to the pool ``host`` in host memory. ``at_once``: they are to be saved
        as soon as they are cached, otherwise once they are free."""
        self._host = host
        self._at_once = at_once
        super().__init__(num_blocks)

    def reset(self) -> None:
        """Free every block and forget every hash, whatever state an interrupted call has left."""
        super().reset()
        self.unsaved: OrderedDict[int, None] = OrderedDict()
        """Blocks to save, the least recently used first."""
        self.evicted: list[tuple[int, bytes]] = []
        """Blocks that were allocated although no other tier has their former contents, with their former hashes; the
        step saves them before it computes."""

    @property
    def num_clean(self) -> int:
        """Number of blocks that can be allocated without losing contents that no other tier has."""
        return len(self._free) - len(self.unsaved)

    def cache(self, block: int, digest: bytes) -> None:
        """Give a full, used block its hash, unless another block has the same hash already."""
        super().cache(block, digest)
        if self._at_once:
            self._note(block)

    def share(self, blocks: Sequence[int]) -> None:
        """Take one more reference to each of ``blocks``."""
        super().share(blocks)
        if not self._at_once:
            for block in blocks:
                self.unsaved.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence; its last block is to be reused first."""
        super().release(blocks)
        if not self._at_once:
            for block in reversed(blocks):
                if self._references[block] == 0:
                    self._note(block)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, which must be free, the least recently used first, and forget their hashes."""
        for block in islice(self._free, count):
            digest = self._hashes[block]
            if digest is not None and not self._host.has(digest):
                self.evicted.append((block, digest))
        return super().allocate(count)

    def _note(self, block: int) -> None:
        digest = self._hashes[block]
        if digest is not None and not self._host.has(digest):
            self.unsaved[block] = None

    def _forget(self, block: int) -> None:
        super()._forget(block)
        self.unsaved.pop(block, None)


@dataclass(slots=True)
class TierCounts:
    """Counters of the tiers, in blocks."""

    saved: int = 0
    loaded: int = 0
    dropped: int = 0
    """Blocks that were evicted without being saved, because host memory was full."""
    read: int = 0
    written: int = 0
    failed: int = 0
    """Blocks that could not be read from disk, or written."""
    queries: int = 0
    """Prompt tokens that were looked up in the tiers, because the pool did not have them."""
    hits: int = 0
    """Prompt tokens that were found in the tiers."""


@dataclass(slots=True)
class Tiers:
    """Decides which blocks are saved to and loaded from host memory and disk."""

    num_blocks: int
    """Number of blocks of the pool."""
    num_places: int
    cost: TransferCost
    preemption_mode: str = "auto"
    """How preempted sequences resume: ``swap`` copies what the tiers have, ``recompute`` copies nothing, ``auto``
    decides by the cost, as for other requests."""
    disk: Disk | None = None
    counts: TierCounts = field(default_factory=TierCounts)
    host: BlockPool = field(init=False)
    pool: TieredPool = field(init=False)
    watermark: int = field(init=False)
    _writing: set[int] = field(default_factory=set)
    """Places in host memory that the disk's thread is writing to disk."""
    _reading: dict[bytes, int] = field(default_factory=dict)
    """Hash of each block that the disk's thread is reading → the place that it is read to."""
    _unsettled: list[Copies] = field(default_factory=list)
    """Copies of steps that have not been collected."""

    def __post_init__(self) -> None:
        """Begin with empty tiers."""
        self.host = BlockPool(self.num_places)
        self.pool = TieredPool(self.num_blocks, self.host, self.disk is not None)
        self.watermark = max(self.num_blocks // 2, 1)

    @property
    def is_waiting(self) -> bool:
        """Whether blocks are being read from disk."""
        return bool(self._reading)

    def save_behind(self, copies: Copies, num_tokens: int) -> None:
        """Save blocks that earlier steps have computed; more of them after a step with more tokens."""
        most = self.watermark - self.pool.num_clean
        if self.disk is not None:
            most = self.num_places // 2 - len(self._writing)
        if most > 0 and self.pool.unsaved:
            self._save_unsaved(copies, min(most, LEAST_SAVES + 2 * num_tokens // self.cost.block_size))

    def save_idle(self, copies: Copies, everything: bool = False) -> None:
        """Save all unsaved blocks, because nothing runs; without a disk, only if the pool may soon run out of blocks or
        ``everything`` is set."""
        if self.disk is not None:
            self._save_unsaved(copies, self.num_places // 2 - len(self._writing))
        elif everything or self.pool.num_clean < self.watermark:
            self._save_unsaved(copies, self.num_places)
        self.save_evicted(copies)

    def _save_unsaved(self, copies: Copies, most: int) -> None:
        unsaved = self.pool.unsaved
        for block in list(islice(unsaved, max(most, 0))):
            digest = self.pool.digest(block)
            if digest is not None and not self.save(block, digest, copies):
                break
            del unsaved[block]

    def save_evicted(self, copies: Copies) -> None:
        """Save the former contents of the blocks that the step being scheduled has allocated."""
        for block, digest in self.pool.evicted:
            if self.disk is None or digest not in self.disk:
                self.counts.dropped += not self.save(block, digest, copies)
        self.pool.evicted.clear()
        if copies:
            self._unsettled.append(copies)

    def save(self, block: int, digest: bytes, copies: Copies) -> bool:
        """Save a block, unless host memory has it already. Returns False if host memory is full."""
        host = self.host
        if host.has(digest):
            return True
        if not host.num_free:
            return False
        [place] = host.allocate(1)
        host.cache(place, digest)
        copies.save_blocks.append(block)
        copies.save_places.append(place)
        self.counts.saved += 1
        return True

    def loadable(self, digests: Sequence[bytes], preempted: bool) -> tuple[int, int]:
        """Return how many of the first ``digests`` the pool and host memory have, and how many after them are on disk;
        0 where computing is faster than copying."""
        mode = self.preemption_mode if preempted else "auto"
        if mode == "recompute":
            return 0, 0
        ready = 0
        if mode == "swap" or self.cost.pays(self.cost.host_seconds):
            for digest in digests:
                if not (self.host.has(digest) or self.pool.has(digest)):
                    break
                ready += 1
        on_disk = 0
        if self.disk is not None and (mode == "swap" or self.cost.pays(self.disk.seconds_per_block)):
            for digest in islice(digests, ready, None):
                if digest not in self.disk:
                    break
                on_disk += 1
        return ready, on_disk

    def fetch(self, digests: Sequence[bytes]) -> bool:
        """Begin to read blocks from disk, up to :data:`READ_AHEAD` at a time. Returns whether any are being read."""
        disk = self.disk
        assert disk is not None
        most = max(min(READ_AHEAD, self.num_places // 4), 1)
        for digest in islice(digests, most):
            if digest in self._reading or self.host.has(digest):
                continue
            if len(self._reading) >= most or not self.host.num_free:
                break
            [place] = self.host.allocate(1)
            self._reading[digest] = place
            disk.read(digest, place)
        return self.is_waiting

    def load(self, digest: bytes, block: int, copies: Copies) -> bool:
        """Schedule the copy of the block with this hash from host memory to ``block``. Returns False if host memory
        does not have it."""
        found = self.host.find((digest,))
        if not found:
            return False
        self.host.share(found)
        self.pool.cache(block, digest)
        copies.load_places += found
        copies.load_blocks.append(block)
        self.counts.loaded += 1
        return True

    def settled(self, copies: Copies) -> None:
        """Release the places of a collected step's copies, and begin to write the blocks that it saved to disk."""
        if not copies:
            return
        host, disk = self.host, self.disk
        self._unsettled.remove(copies)
        host.release(copies.load_places)
        if disk is None:
            host.release(copies.save_places)
            return
        for place in copies.save_places:
            digest = host.digest(place)
            if digest is None or is_private(digest) or digest in disk:
                host.release((place,))
            elif len(self._writing) >= max(self.num_places // 2, 1):
                host.release((place,))  # the disk is too slow
                self.counts.failed += 1
            else:
                self._writing.add(place)
                disk.write(digest, place)

    def poll(self) -> None:
        """Process the transfers that the disk's thread has finished."""
        if self.disk is None:
            return
        for transfer in self.disk.finished():
            if transfer.to_host:
                del self._reading[transfer.digest]
                self.counts.read += transfer.done
                if transfer.done:
                    self.host.cache(transfer.place, transfer.digest)
            else:
                self._writing.discard(transfer.place)
                self.counts.written += transfer.done
            self.counts.failed += not transfer.done
            self.host.release((transfer.place,))

    def wait(self, seconds: float) -> None:
        """Wait until the disk's thread has finished a transfer, for at most ``seconds``."""
        if self.disk is not None:
            self.disk.wait(seconds)

    def finish_writing(self, seconds: float) -> None:
        """Wait until all blocks that are being written are on disk, for at most ``seconds``."""
        end = time.monotonic() + seconds
        while self._writing and (left := end - time.monotonic()) > 0:
            self.wait(left)
            self.poll()

    def restart(self) -> None:
        """Forget the blocks in the pool and in host memory, after a step was lost: which of its copies were made is not
        known."""
        if self.disk is not None:
            self.disk.cancel()
        self._writing.clear()
        self._reading.clear()
        self._unsettled.clear()
        self.pool.reset()
        self.host.reset()

    def forget_all(self) -> None:
        """Empty the prefix cache of all tiers, and erase the disk."""
        self.pool.forget_all()
        self.host.forget_all()
        if self.disk is not None:
            self.disk.forget_all()

    def check_integrity(self) -> None:
        """Raise AssertionError if places, hashes or counters disagree."""
        copied = [copies.save_places + copies.load_places for copies in self._unsettled]
        self.host.check_integrity([*copied, list(self._writing), list(self._reading.values())])
        assert all(self.pool.digest(block) is not None for block in self.pool.unsaved)
        assert not self.pool.evicted
