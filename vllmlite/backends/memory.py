"""The amount of memory that this process may use: the machine's, limited by control groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Total and free bytes of the memory in which a backend computes."""

    total: int
    free: int


def host_memory(sharing: int = 1) -> Memory:
    """Return total and available bytes of main memory, within the process's cgroup v2 limits; if several ranks are
    ``sharing`` it, the share of one."""
    total, free = _machine()
    for group in _groups():
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is None or used is None:
            continue
        # Inactive file pages count as used, but the kernel reclaims them under pressure.
        used -= _statistic(group / "memory.stat", "inactive_file")
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return Memory(total // sharing, free // sharing)


def _machine() -> tuple[int, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
        return sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


def _groups() -> list[Path]:
    """Return the directories of the process's control group and its ancestors."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root = Path("/sys/fs/cgroup")
    for line in lines:
        if line.startswith("0::/"):
            inner = root / line[4:]
            return [inner, *(group for group in inner.parents if group.is_relative_to(root))]
    return []


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
