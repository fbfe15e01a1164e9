"""Shared memories of ranks on several "hosts", with links between them, and what a host would send."""

from __future__ import annotations

import hmac
import os
import socket
import struct
from typing import Any

from vllmlite.backends.native import load_extension

TO_HUB, FROM_HUB = b"key to the hub", b"key from the hub"
PART, ONWARD, TAKEN, BEAT, PIECE, MESSAGE = range(6)
"""Kinds of frames."""


class HostMemory:
    """The memory of one host, of whose ranks some run there."""

    def __init__(self, world: int, first: int, local: int) -> None:
        self.native, self.world = load_extension("_cpu"), world
        self.descriptor = os.memfd_create("ranks")
        os.ftruncate(self.descriptor, self.native.Ranks.memory_size(world))
        self.driver: Any = self.native.Ranks(self.descriptor, -1, world, first, local)

    def rank(self, rank: int) -> Any:
        return self.native.Ranks(self.descriptor, rank, self.world)

    def link(self, connection: socket.socket, node: range, group: int, is_hub: bool) -> Any:
        """A link over ``connection`` to the hub, or from it to the node that has the ranks ``node``."""
        keys = (FROM_HUB, TO_HUB) if is_hub else (TO_HUB, FROM_HUB)
        return self.native.Link(self.driver, connection.detach(), *keys, node.start, len(node), group, is_hub)


def linked(world: int, nodes: int, group: int) -> tuple[list[HostMemory], list[Any]]:
    """The memories of some hosts, and the links between the first and the others."""
    per_node = world // nodes
    memories = [HostMemory(world, node * per_node, per_node) for node in range(nodes)]
    links = []
    for node in range(1, nodes):
        ranks = range(node * per_node, (node + 1) * per_node)
        ours, theirs = socket.socketpair()
        links += [
            memories[0].link(ours, ranks, group, True),
            memories[node].link(theirs, ranks, group, False),
        ]
    return memories, links


def frame(
    number: int, kind: int, payload: bytes = b"", rank: int = 1, channel: int = 0, key: bytes = TO_HUB
) -> bytes:
    """A frame as a node sends it to the hub."""
    content = struct.pack("<IHBBQ", len(payload), rank, kind, channel, number) + payload
    return content + hmac.digest(key, content, "sha256")[:16]
