"""Choose a replica of the engine for each request: the one that will have computed its prompt the soonest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vllmlite.engine.block_pool import block_hash

TOKENS_PER_REQUEST = 64
"""Prompt tokens whose computation delays a new request about as much as an unfinished request does by decoding."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The prefix of a prompt, as a router compares it."""

    length: int
    """The prompt's length, in tokens."""
    hashes: Sequence[bytes]
    """The hashes of the prompt's full blocks, without its last token, which is never taken from a cache."""


def prefix_of(prompt: Sequence[int], root: bytes, block_size: int) -> Prefix:
    """Return the prefix of ``prompt``, whose blocks have ``block_size`` tokens.

    ``root`` is the hash before the first block; equal prompts under different roots do not match."""
    hashes: list[bytes] = []
    for start in range(0, len(prompt) - block_size, block_size):
        root = block_hash(root, prompt[start : start + block_size])
        hashes.append(root)
    return Prefix(len(prompt), hashes)


@dataclass(slots=True)
class _Replica:
    """A replica as the router sees it."""

    cached: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    """Hashes of the prompt blocks that the replica probably has in its cache, the least recently used first."""
    uncomputed: dict[str, int] = field(default_factory=dict)
    """Unfinished request → number of its prompt tokens that the replica has to compute; 0 once they are computed."""
    num_uncomputed: int = 0
    """Sum of the values of ``uncomputed``."""

    def note_computed(self, request_id: str) -> None:
        """Note that the prompt of an unfinished request has been computed."""
        self.num_uncomputed -= self.uncomputed[request_id]
        self.uncomputed[request_id] = 0


class Router(Generic[K]):
    """Chooses a replica for each request: the one with the least work, in which the tokens of the request's own prompt
    count, except those of the longest prefix that the replica probably has in its prefix cache.

    So requests with a common prefix stay together until their replica has that much more to do than another. The
    caches are not asked: the router remembers the block hashes of the prompts that it sent to each, as many as the
    replica has blocks."""

    def __init__(
        self,
        replicas: Iterable[K],
        block_size: int,
        num_blocks: int,
        caches_prefixes: bool = True,
        tokens_per_request: int = TOKENS_PER_REQUEST,
    ) -> None:
        """``block_size`` in tokens and ``num_blocks`` are those of each replica's cache; an unfinished request counts
        as ``tokens_per_request`` prompt tokens."""
        self._replicas: dict[K, _Replica] = {key: _Replica() for key in replicas}
        self._block_size = block_size
        self.num_blocks = num_blocks if caches_prefixes else 0
        self._tokens_per_request = tokens_per_request
        self._last = -1

    def set_replicas(self, keys: Iterable[K]) -> None:
        """Replace the replicas by those with ``keys``; those that stay keep their state."""
        self._replicas = {key: self._replicas.get(key) or _Replica() for key in keys}

    def choose(self, request_id: str, prompt_token_ids: Sequence[int], root: bytes) -> K:
        """Return the replica for a request, and count the request as its work. ``root`` is the parent hash of the
        prompt's first block."""
        if self.num_blocks:
            prefix = prefix_of(prompt_token_ids, root, self._block_size)
        else:
            prefix = Prefix(len(prompt_token_ids), ())
        return self.route(request_id, prefix)

    def route(self, request_id: str, prefix: Prefix) -> K:
        """Return the replica for a request whose prompt has ``prefix``, and count the request as its work."""
        work = self._work(prefix)
        chosen = min(work, key=work.__getitem__)
        self.note_sent(chosen, request_id, prefix)
        return chosen

    def order(self, prefix: Prefix) -> list[K]:
        """Return all replicas, the best one for a request first."""
        work = self._work(prefix)
        return sorted(work, key=work.__getitem__)

    def note_sent(self, key: K, request_id: str, prefix: Prefix) -> None:
        """Note that replica ``key`` got a request, which counts as its work from now on."""
        replica = self._replicas[key]
        uncomputed = prefix.length - self._num_cached(replica, prefix.hashes)
        replica.uncomputed[request_id] = uncomputed
        replica.num_uncomputed += uncomputed
        for digest in reversed(prefix.hashes):  # the end of a prefix is of no use without its beginning
            replica.cached[digest] = None
            replica.cached.move_to_end(digest)
        while len(replica.cached) > self.num_blocks:
            replica.cached.popitem(last=False)
        self._last = [*self._replicas].index(key)

    def note_token(self, key: K, request_id: str) -> None:
        """Note that a request of replica ``key`` has a token, so its prompt has been computed."""
        replica = self._replicas.get(key)
        if replica is not None and request_id in replica.uncomputed:
            replica.note_computed(request_id)

    def note_end(self, key: K, request_id: str) -> None:
        """Note that a request of replica ``key`` has ended."""
        self.note_token(key, request_id)
        if key in self._replicas:
            self._replicas[key].uncomputed.pop(request_id, None)

    def forget_prefixes(self) -> None:
        """Note that the replicas have emptied their prefix caches."""
        for replica in self._replicas.values():
            replica.cached.clear()

    def _work(self, prefix: Prefix) -> dict[K, int]:
        """Return the work before each replica with the request, in prompt tokens. Replicas take turns: the one after
        the last chosen comes first."""
        keys = [*self._replicas]
        turn = self._last + 1
        return {
            key: replica.num_uncomputed
            + self._tokens_per_request * len(replica.uncomputed)
            + prefix.length
            - self._num_cached(replica, prefix.hashes)
            for key in keys[turn:] + keys[:turn]
            for replica in [self._replicas[key]]
        }

    def _num_cached(self, replica: _Replica, hashes: Sequence[bytes]) -> int:
        """Return how many prompt tokens ``replica`` probably has in its prefix cache."""
        for count, digest in enumerate(hashes):
            if digest not in replica.cached:
                return count * self._block_size
        return len(hashes) * self._block_size
