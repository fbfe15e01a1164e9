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
"""Blocks that any step may save."""
READ_AHEAD = 64
"""Most blocks that are read from disk at a time."""
PATIENCE = 2.0
"""How many times as long as its computation a prefix may take to come from disk before the request goes on without."""
LONGEST_WAIT = 30.0
"""Seconds that a request waits for the disk while the speed of computing is unknown."""


@dataclass(slots=True)
class Copies:
    """The block copies of a step, which come before its other work."""

    save_blocks: list[int] = field(default_factory=list)
    """With the next: block ``save_blocks[i]`` is copied to place ``save_places[i]`` of the host."""
    save_places: list[int] = field(default_factory=list)
    load_places: list[int] = field(default_factory=list)
    """With the next: place ``load_places[i]`` is copied to block ``load_blocks[i]``, after the saves."""
    load_blocks: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.save_blocks or self.load_blocks)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A finished transfer between the disk and a place."""

    digest: bytes
    place: int
    to_host: bool
    done: bool
    """False: the disk did not have the block, or had no room for it."""


class Disk(Protocol):
    """Blocks on disk. A thread moves them; no call waits for it but those that say so."""

    @property
    def seconds_per_block(self) -> float | None:
        """Measured time of a read; None before the first one."""
        ...

    def __contains__(self, digest: bytes) -> bool:
        """Whether the disk has, or is about to have, the block of this hash."""
        ...

    def read(self, digest: bytes, place: int) -> None:
        """Begin to read a block into a place."""
        ...

    def write(self, digest: bytes, place: int) -> None:
        """Begin to write a place's block."""
        ...

    def finished(self) -> list[Transfer]:
        """The transfers that have finished since the last call."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until a transfer has finished, at most so long."""
        ...

    def cancel(self) -> None:
        """Drop the transfers that have not begun, and wait for the one that has; none of them is reported."""
        ...

    def forget_all(self) -> None:
        """Erase all blocks."""
        ...


@dataclass(slots=True)
class TransferCost:
    """Whether copying a block takes less time than computing its tokens: measured rates of both."""

    block_size: int
    host_seconds: float = 0.0
    """Time to copy a block from host memory."""
    token_seconds: float | None = None
    """Time to compute a token of a prompt; None before it was measured."""

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """Take in the time of a step of many tokens."""
        if num_tokens > 2 * self.block_size:
            measured = seconds / num_tokens
            last = measured if self.token_seconds is None else self.token_seconds
            self.token_seconds = 0.7 * last + 0.3 * measured

    def pays(self, block_seconds: float | None) -> bool:
        """Whether a copy that takes ``block_seconds`` is faster than computing; what is not measured is assumed so."""
        if self.token_seconds is None or block_seconds is None:
            return True
        return block_seconds < self.block_size * self.token_seconds

    def patience(self, num_blocks: int) -> float:
        """Return how long to wait for ``num_blocks`` that come from disk."""
        if self.token_seconds is None:
            return LONGEST_WAIT
        return PATIENCE * num_blocks * self.block_size * self.token_seconds


class TieredPool(BlockPool):
    """A block pool that knows which cached blocks are nowhere else."""

    def __init__(self, num_blocks: int, host: BlockPool, at_once: bool) -> None:
        """Make a pool beside ``host``. ``at_once``: blocks are to be saved as soon as they are cached, else once they
        are free."""
        self._host = host
        self._at_once = at_once
        super().__init__(num_blocks)

    def reset(self) -> None:
        """See :class:`BlockPool`."""
        super().reset()
        self.unsaved: OrderedDict[int, None] = OrderedDict()
        """Blocks to save, the least recently used first."""
        self.evicted: list[tuple[int, bytes]] = []
        """Blocks that were allocated and are nowhere else, and the hashes they had; the step saves them first."""

    @property
    def num_clean(self) -> int:
        """Number of blocks that can be allocated without losing what they hold."""
        return len(self._free) - len(self.unsaved)

    def cache(self, block: int, digest: bytes) -> None:
        """See :class:`BlockPool`."""
        super().cache(block, digest)
        if self._at_once:
            self._note(block)

    def share(self, blocks: Sequence[int]) -> None:
        """See :class:`BlockPool`."""
        super().share(blocks)
        if not self._at_once:
            for block in blocks:
                self.unsaved.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """See :class:`BlockPool`."""
        super().release(blocks)
        if not self._at_once:
            for block in reversed(blocks):
                if self._references[block] == 0:
                    self._note(block)

    def allocate(self, count: int) -> list[int]:
        """See :class:`BlockPool`."""
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
    """Blocks that were evicted without being saved: there was no place."""
    read: int = 0
    written: int = 0
    failed: int = 0
    """Blocks that could not be read from disk, or written."""
    queries: int = 0
    """Prompt tokens that were looked up, because the pool did not have them."""
    hits: int = 0
    """Prompt tokens that were found."""


@dataclass(slots=True)
class Tiers:
    """Decides which blocks are saved and loaded."""

    num_blocks: int
    """Blocks of the pool."""
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
    """Places that the disk's thread writes to disk."""
    _reading: dict[bytes, int] = field(default_factory=dict)
    """Hashes that the disk's thread reads, and to which places."""
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
        """Save blocks whose contents earlier steps have computed; more of them after a step of more tokens."""
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
        """Save the blocks that the step being scheduled has taken."""
        for block, digest in self.pool.evicted:
            if self.disk is None or digest not in self.disk:
                self.counts.dropped += not self.save(block, digest, copies)
        self.pool.evicted.clear()
        if copies:
            self._unsettled.append(copies)

    def save(self, block: int, digest: bytes, copies: Copies) -> bool:
        """Save a block, unless the host has it; False if there is no place."""
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
        """Return how many of the first of ``digests`` the pool and the host have, and how many after them are on disk,
        of those that are worth copying."""
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
        """Begin to read blocks from disk, as far as the read-ahead goes; returns whether any are being read."""
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
        """Load the block of this hash from its place; False if the host does not have it."""
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
        """Let go of the places of a collected step's copies, and begin to write to disk what it saved."""
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
        """Take in what the disk's thread has done."""
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
        """Wait until the disk's thread has done something, at most so long."""
        if self.disk is not None:
            self.disk.wait(seconds)

    def finish_writing(self, seconds: float) -> None:
        """Wait until the disk has what it was given to write, at most so long."""
        end = time.monotonic() + seconds
        while self._writing and (left := end - time.monotonic()) > 0:
            self.wait(left)
            self.poll()

    def restart(self) -> None:
        """Forget the pool and the host's blocks: a step was lost, and nobody knows which copies were made."""
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
        """Raise AssertionError where places, hashes or counters disagree."""
        copied = [copies.save_places + copies.load_places for copies in self._unsettled]
        self.host.check_integrity([*copied, list(self._writing), list(self._reading.values())])
        assert all(self.pool.digest(block) is not None for block in self.pool.unsaved)
        assert not self.pool.evicted
