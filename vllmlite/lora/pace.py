"""Work beside a running engine that does not delay the engine's steps noticeably."""

from __future__ import annotations

import time
from collections.abc import Callable

PIECE = 0.001
"""Seconds of computing after which a thread rests."""
REST = 3.0
"""Seconds of rest for each second of computing: the thread takes a quarter of a core."""


class Pace:
    """Lets a thread rest between pieces of work, so that the threads that compute a step get the cores.

    Resting is better than a lower priority: a thread of low priority that holds the interpreter's lock, and gets no
    core, stops all others."""

    def __init__(
        self, clock: Callable[[], float] = time.thread_time, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._since = 0.0

    def begin(self) -> None:
        """Begin to count the computing time of the calling thread."""
        self._since = self._clock()

    def __call__(self) -> None:
        """Rest if the thread has computed long enough since it began or last rested."""
        used = self._clock() - self._since
        if used >= PIECE:
            self._sleep(used * REST)
            self._since = self._clock()
