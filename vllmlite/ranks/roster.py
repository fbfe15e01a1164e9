"""What a node of an engine knows of all ranks: where they run, how far their start is, what has failed there."""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from vllmlite.errors import BackendError
from vllmlite.ranks.layout import Layout
from vllmlite.ranks.messages import Failed, Phase, Ready

AGREE_SECONDS = 2.0
"""Time in which a step that fails on one rank must have failed on all."""
NOT_STARTED = "starting"


class Roster:
    """The state of each rank, from its messages. Not thread-safe."""

    def __init__(self, layout: Layout, hosts: Mapping[int, str]) -> None:
        """``hosts`` are the names of the other nodes' hosts, as far as they are known."""
        self.layout = layout
        self.ready: list[Ready | None] = [None] * layout.world
        self.left: set[int] = set()
        """Ranks whose programs have ended in order."""
        self.pids: dict[int, int] = {}
        """Rank → its process, if it runs on this host."""
        self._hosts = {layout.node: socket.gethostname(), **hosts}
        self.phases = [NOT_STARTED] * layout.world
        self._failures: defaultdict[int, dict[int, str]] = defaultdict(dict)
        """Step → the ranks at which it failed, and how."""
        self._first_failure = 0.0
        """When the last step that failed failed first."""

    def note(self, rank: int, message: Phase | Ready | Failed) -> None:
        """Record a message of a rank about its state."""
        if isinstance(message, Phase):
            self.phases[rank] = message.name
        elif isinstance(message, Ready):
            self.phases[rank], self.ready[rank] = "ready", message
        else:
            if not self._failures:
                self._first_failure = time.monotonic()
            self._failures[message.step][rank] = message.error

    def has_failed_everywhere(self, step: int) -> bool:
        """Whether all ranks have failed at a step."""
        return len(self._failures[step]) == self.layout.world

    def forget_failure(self, step: int) -> None:
        """Forget a step that has failed on all ranks."""
        self._failures.pop(step, None)

    def lone_failure(self) -> str:
        """Describe a step at which some ranks have failed and others have not, by now; or return an empty string.

        Node 0 alone hears of all failures."""
        if not self.layout.is_hub or not self._failures:
            return ""
        (step, failed), *_ = self._failures.items()
        if time.monotonic() - self._first_failure <= AGREE_SECONDS or len(failed) == self.layout.world:
            return ""
        rank, error = next(iter(failed.items()))
        return f"{self.named(rank)} failed at step {step}, and others did not: {error}"

    def check_equal(self, ready: Sequence[Ready]) -> None:
        """Raise BackendError unless all ranks compute in the same way; otherwise they might sample different ids."""
        for rank, each in enumerate(ready):
            if each.backend != ready[0].backend:
                raise BackendError(
                    f"{self.named(rank)} computes with {each.backend}, {self.named(0)} with {ready[0].backend}: "
                    "choose backend, dtype and cpu_isa so that these are equal"
                )

    def named(self, rank: int) -> str:
        """Name a rank, its process and host for a message."""
        node = rank // self.layout.per_node
        process = f"process {self.pids[rank]} on " if rank in self.pids else ""
        return f"rank {rank} of {self.layout.world} ({process}{self._hosts.get(node, f'node {node}')})"

    def named_node(self, node: int) -> str:
        """Name a node by its ranks and host."""
        ranks = self.layout.ranks_of(node)
        if len(ranks) == 1:
            return self.named(ranks[0])
        return (
            f"node {node} (ranks {ranks[0]} to {ranks[-1]} of {self.layout.world}, "
            f"{self._hosts.get(node, 'another host')})"
        )

    def last_message(self, rank: int) -> str:
        """Return the last message of a rank, as the end of a sentence; nothing if only node 0 gets its messages."""
        return f"; its last message: {self.phases[rank]}" if self.hears_from(rank) else ""

    def hears_from(self, rank: int) -> bool:
        """Whether the messages of a rank come to this node."""
        return self.layout.is_hub or rank in self.layout.local
