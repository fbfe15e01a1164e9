"""The blocks of requests: their block tables, the prefix cache, and loading from the cache tiers."""

from __future__ import annotations

from vllmlite.engine.block_pool import BlockPool, block_hash
from vllmlite.engine.request import Request
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.tiers import Copies, Tiers


class CacheManager:
    """Gives requests blocks of the pool, and keeps full blocks for other requests with the same prefix."""

    def __init__(self, pool: BlockPool, block_size: int, *, caches_prefixes: bool) -> None:
        """Manage ``pool``, whose blocks hold ``block_size`` tokens. ``caches_prefixes``: reuse the blocks of equal
        prefixes."""
        self.pool = pool
        self.block_size = block_size
        self._caches_prefixes = caches_prefixes

    def missing_blocks(self, request: Request, count: int) -> int:
        """Return how many blocks the next ``count`` tokens of a sequence need."""
        return -(-(request.num_computed_tokens + count) // self.block_size) - len(request.blocks)

    def append_blocks(self, request: Request, blocks: list[int], schedule: Schedule) -> None:
        """Give a sequence further blocks, and write them to its block table."""
        column = len(request.blocks)
        request.blocks.extend(blocks)
        self.write_blocks(request, column, schedule)

    def write_blocks(self, request: Request, column: int, schedule: Schedule) -> None:
        """Write the blocks of a sequence to its block table, from ``column`` on."""
        blocks = request.blocks[column:]
        schedule.block_slots.extend([request.slot] * len(blocks))
        schedule.block_columns.extend(range(column, column + len(blocks)))
        schedule.block_ids.extend(blocks)

    def find_prefix(self, request: Request, leave: int) -> list[int]:
        """Return the cached blocks that ``request`` can start from, but for the last ``leave`` of them."""
        hits = self.pool.find(self._prefix_hashes(request))
        return hits[: len(hits) - leave]

    def _prefix_hashes(self, request: Request) -> list[bytes]:
        """Return the hashes of the blocks that ``request`` could start from, which never include its last known
        token: a step has to compute at least one."""
        if not self._caches_prefixes or request.needs_every_state:
            return []
        self._extend_hashes(request, request.num_known_ids // self.block_size)
        return request.block_hashes[: (request.end_of_prefix - 1) // self.block_size]

    def needed_blocks(self, request: Request) -> int:
        """Return how many blocks all known tokens of ``request`` need."""
        if request.beams is not None:
            return request.beams.num_blocks(request.num_tokens, self.block_size)
        return -(-request.num_tokens // self.block_size)

    def note_prefix(self, request: Request) -> None:
        """Count all blocks of a request as computed and cached."""
        request.num_cached_blocks = len(request.blocks)
        request.num_computed_tokens = len(request.blocks) * self.block_size
        if self._caches_prefixes:
            request.next_full_at = request.num_computed_tokens + self.block_size

    def load(self, tiers: Tiers, request: Request, schedule: Schedule, copies: Copies, now: float) -> None:
        """Append the blocks of a request's prefix that the pool and the tiers have. If more are on disk, start to read
        them; the request then waits (``awaits_blocks``)."""
        block_size, first = self.block_size, len(request.blocks)
        digests = self._prefix_hashes(request)[first:]
        ready, on_disk = tiers.loadable(digests, request.metrics.num_preemptions > 0)
        if not request.awaits_blocks:
            request.waits_until = now + tiers.cost.patience(on_disk)
            tiers.counts.queries += len(request.prompt_token_ids) - request.num_computed_tokens
        blocks: list[int] = []
        for digest in digests[:ready]:
            found = self.pool.find((digest,))
            if found:
                self.pool.share(found)
            elif self.pool.num_free and tiers.host.has(digest):
                found = self.pool.allocate(1)
                tiers.load(digest, found[0], copies)
            else:
                break
            blocks += found
        if blocks:
            self.append_blocks(request, blocks, schedule)
            self.note_prefix(request)
            tiers.counts.hits += len(blocks) * block_size
            if not request.metrics.num_preemptions:
                request.num_cached_tokens = max(request.num_cached_tokens or 0, request.num_computed_tokens)
        waits = len(blocks) == ready and on_disk > 0 and now < request.waits_until
        request.awaits_blocks = waits and tiers.fetch(digests[ready : ready + on_disk])

    def cache_full_blocks(self, request: Request) -> None:
        """Offer the blocks that are full of known, computed tokens to the prefix cache."""
        block_size = self.block_size
        full = min(request.num_known_ids, request.num_computed_tokens) // block_size
        self._extend_hashes(request, full)
        for index in range(request.num_cached_blocks, full):
            self.pool.cache(request.blocks[index], request.block_hashes[index])
        request.num_cached_blocks = max(request.num_cached_blocks, full)
        request.next_full_at = (request.num_cached_blocks + 1) * block_size

    def _extend_hashes(self, request: Request, count: int) -> None:
        block_size = self.block_size
        for index in range(len(request.block_hashes), count):
            parent = request.block_hashes[-1] if request.block_hashes else request.root
            request.block_hashes.append(
                block_hash(parent, request.known_ids(index * block_size, (index + 1) * block_size))
            )
