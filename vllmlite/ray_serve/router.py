"""Ray Serve's request router: sends a request to the replica that has most of its prompt in its cache, unless that
replica has too much to do.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from vllmlite.engine.routing import TOKENS_PER_REQUEST, Prefix, Router
from vllmlite.ray_serve.http import BLOCK_BYTES, BYTES_PER_TOKEN

DEFAULT_CACHE_TOKENS = 1 << 18
"""Assumed size of a replica's cache, in tokens, until the replica has reported it."""


class PrefixRouter(RequestRouter):
    """Routes the requests of an ingress by their prompts' prefixes; see :class:`~vllmlite.engine.routing.Router`.

    The first argument of each request is an :class:`~vllmlite.ray_serve.http.HttpRequest`. A replica that has
    ``max_ongoing_requests`` refuses more, and the next best one is asked."""

    def initialize_state(self, **options: Any) -> None:
        """Begin without replicas; there are no ``options``."""
        self._router: Router[ReplicaID] = Router(
            (),
            BLOCK_BYTES,
            DEFAULT_CACHE_TOKENS * BYTES_PER_TOKEN // BLOCK_BYTES,
            tokens_per_request=TOKENS_PER_REQUEST * BYTES_PER_TOKEN,
        )
        self._sent: dict[str, tuple[ReplicaID, Prefix]] = {}
        """Unfinished request → its replica and the prefix of its prompt."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replace the replicas, and note the sizes of their caches."""
        self._router.set_replicas(replica.replica_id for replica in replicas)
        sizes = [replica.routing_stats.get("cache_tokens") for replica in replicas]
        if known := [size for size in sizes if size is not None]:
            self._router.num_blocks = min(known) * BYTES_PER_TOKEN // BLOCK_BYTES
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica."""
        super().on_replica_actor_died(replica_id)
        self._router.set_replicas(self.curr_replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the best for the request first. The request counts as work of that one from
        now on."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        request_id = pending_request.metadata.internal_request_id
        prefix: Prefix = pending_request.args[0].prefix
        candidates = {replica.replica_id: replica for replica in candidate_replicas}
        self._forget(request_id)
        order = [key for key in self._router.order(prefix) if key in candidates]
        if order:
            self._note(request_id, order[0], prefix)
            pending_request.future.add_done_callback(
                lambda future: self._forget(request_id) if future.cancelled() else None
            )
        return [[candidates[key]] for key in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note that ``replica_id`` took the request."""
        request_id = pending_request.metadata.internal_request_id
        if request_id in self._sent and self._sent[request_id][0] != replica_id:
            _, prefix = self._sent[request_id]
            self._forget(request_id)
            self._note(request_id, replica_id, prefix)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a request has ended."""
        self._forget(internal_request_id)

    def _note(self, request_id: str, replica_id: ReplicaID, prefix: Prefix) -> None:
        if replica_id in self.curr_replicas:
            self._router.note_sent(replica_id, request_id, prefix)
            self._sent[request_id] = replica_id, prefix

    def _forget(self, request_id: str) -> None:
        if request_id in self._sent:
            replica_id, _ = self._sent.pop(request_id)
            self._router.note_end(replica_id, request_id)
