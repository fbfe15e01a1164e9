"""Measure whether a process makes progress, by the system's counts of its work."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

LEAST_SECONDS = 0.05
"""Processor time that counts as progress. A thread that only gives signs of life uses less in a minute."""


class Progress:
    """Measures for how long a process has neither computed, nor read anything, nor entered another phase."""

    def __init__(self, pid: int) -> None:
        """Watch process ``pid``."""
        self._directory = Path(f"/proc/{pid}")
        self._phase = ""
        self._seconds, self._read = 0.0, (0, 0)
        self._since = time.monotonic()

    def idle_seconds(self, phase: str) -> float:
        """Return the seconds since the process has last made progress; it is in ``phase`` now."""
        seconds, read = self._work()
        if phase != self._phase or read != self._read or seconds >= self._seconds + LEAST_SECONDS:
            self._phase, self._seconds, self._read = phase, seconds, read
            self._since = time.monotonic()
        return time.monotonic() - self._since

    def _work(self) -> tuple[float, tuple[int, int]]:
        """Return the processor time that the process has used, and two counts that grow when it reads: page faults that
        waited for a disk, and bytes. A count that the system does not provide does not change."""
        seconds, (faults, size) = self._seconds, self._read
        with suppress(OSError):
            fields = (self._directory / "stat").read_text().rpartition(")")[2].split()
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            faults = int(fields[9])
        with suppress(OSError):
            size = int((self._directory / "io").read_text().split()[1])
        return seconds, (faults, size)
