"""CPU time, which other programs on the machine change little, in place of wall-clock time."""

from __future__ import annotations

import time


def least_cpu_seconds(windows: int = 5, seconds: float = 0.1) -> float:
    """The least CPU time that this process takes in any of several windows: a thread that waits by spinning takes its
    share of each, and a thread that ends its work takes some of one."""
    found = []
    for _ in range(windows):
        before = time.process_time()
        time.sleep(seconds)
        found.append(time.process_time() - before)
    return min(found)
