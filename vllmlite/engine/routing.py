"""Routing of requests to replicas of an engine: to the one that will have computed their prompt the soonest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllmlite.engine.block_pool import block_hash

TOKENS_PER_REQUEST = 64
"""Prompt tokens whose computation delays a new request about as much as an unfinished request does by decoding."""


@dataclass(slots=True)
class _Replica:
    """The router's view of a replica."""

    cached: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Hashes of the prompt blocks that the replica probably has in its cache, the least recently used first."""
    uncomputed: dict[str, int] = field(default_factory=dict)
    """The unfinished requests, and the prompt tokens that were to be computed for each; 0 once it has a token."""
    num_uncomputed: int = 0
    """The sum of these numbers."""

    def load(self) -> int:
        """Return the work before the replica, in prompt tokens."""
        return self.num_uncomputed + TOKENS_PER_REQUEST * len(self.uncomputed)

    def note_computed(self, request_id: str) -> None:
        """Note that the prompt of an unfinished request has been computed."""
        self.num_uncomputed -= self.uncomputed[request_id]
        self.uncomputed[request_id] = 0


class Router:
    """Chooses a replica for each request: the one with the least work, in which the tokens of the request's own prompt
    count, except those of the longest prefix that the replica probably has in its prefix cache.

    So requests with a common prefix stay together until their replica has that much more to do than another. The
    caches are not asked: the router remembers the block hashes of the prompts that it sent to each, as many as the
    replica has blocks."""

    def __init__(
        self, num_replicas: int, block_size: int, num_blocks: int, caches_prefixes: bool = True
    ) -> None:
        """``block_size`` in tokens and ``num_blocks`` are those of each replica's cache."""
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._block_size = block_size
        self._num_blocks = num_blocks if caches_prefixes else 0
        self._last = 0

    def choose(self, request_id: str, prompt_token_ids: Sequence[int], root: bytes) -> int:
        """Return the index of the replica for a request, which counts as its work from now on.

        ``root`` is the hash before the first block; equal prefixes under different roots do not match."""
        hashes = self._hashes(prompt_token_ids, root)
        computed = [len(prompt_token_ids) - self._num_cached(replica, hashes) for replica in self._replicas]
        # Equal ones take turns.
        count = len(self._replicas)
        order = [(self._last + offset) % count for offset in range(1, count + 1)]
        chosen = min(order, key=lambda index: self._replicas[index].load() + computed[index])
        self._last = chosen
        replica = self._replicas[chosen]
        replica.uncomputed[request_id] = computed[chosen]
        replica.num_uncomputed += computed[chosen]
        for digest in reversed(hashes):  # the end of a prefix is of no use without its beginning
            replica.cached[digest] = None
            replica.cached.move_to_end(digest)
        while len(replica.cached) > self._num_blocks:
            replica.cached.popitem(last=False)
        return chosen

    def note_token(self, index: int, request_id: str) -> None:
        """Note that a request of replica ``index`` has a token, so its prompt has been computed."""
        if request_id in self._replicas[index].uncomputed:
            self._replicas[index].note_computed(request_id)

    def note_end(self, index: int, request_id: str) -> None:
        """Note that a request of replica ``index`` has ended."""
        self.note_token(index, request_id)
        self._replicas[index].uncomputed.pop(request_id, None)

    def forget_prefixes(self) -> None:
        """Note that the replicas have emptied their prefix caches."""
        for replica in self._replicas:
            replica.cached.clear()

    def _hashes(self, prompt_token_ids: Sequence[int], root: bytes) -> list[bytes]:
        """Return the hashes of the prompt's full blocks; the last token is never taken from a cache."""
        hashes: list[bytes] = []
        if self._num_blocks:
            size = self._block_size
            for start in range(0, len(prompt_token_ids) - size, size):
                root = block_hash(root, prompt_token_ids[start : start + size])
                hashes.append(root)
        return hashes

    def _num_cached(self, replica: _Replica, hashes: Sequence[bytes]) -> int:
        """Return how many prompt tokens ``replica`` probably has in its prefix cache."""
        for count, digest in enumerate(hashes):
            if digest not in replica.cached:
                return count * self._block_size
        return len(hashes) * self._block_size
