"""CPU time, which other programs on the machine affect little, to be used instead of wall-clock time."""

from __future__ import annotations

import time


def least_cpu_seconds(windows: int = 5, seconds: float = 0.1) -> float:
    """The least CPU time, in seconds, that this process uses in any of several windows. A thread that spins while it
    waits uses its share of each window; one that is finishing its work uses part of one window only."""
    found = []
    for _ in range(windows):
        before = time.process_time()
        time.sleep(seconds)
        found.append(time.process_time() - before)
    return min(found)
