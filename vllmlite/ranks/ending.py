"""Ending the processes of an engine's ranks and the links to other nodes."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from socket import socket
from typing import Any

JOIN_SECONDS = 2.0
"""Maximum seconds to wait for the end of a thread that reads from a closed link."""


def kill(processes: Sequence[subprocess.Popen[bytes]], sockets: Sequence[socket], ranks: Any) -> None:
    """Kill the ranks' processes, and abort everything that waits for them."""
    for process in processes:
        process.kill()
    if ranks is not None:
        ranks.abort()
    for process in processes:
        process.wait()
    for connection in sockets:
        connection.close()


def leave(
    processes: Sequence[subprocess.Popen[bytes]],
    sockets: Sequence[socket],
    ranks: Any,
    links: Sequence[Any],
    farewell: bytes,
    listeners: Sequence[threading.Thread],
) -> None:
    """End the ranks of a group that no longer exists or whose process ends, after sending all that they have written
    to the other nodes."""
    for link in links:
        link.flush()
        link.close(farewell)
    kill(processes, sockets, ranks)
    for thread in listeners:
        if thread is not threading.current_thread():
            thread.join(JOIN_SECONDS)
