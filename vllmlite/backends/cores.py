"""How many CPUs this process may use: its affinity, or less where a control group's quota says so."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """CPUs of the process's affinity mask, within the quotas of its control groups (version 2), and at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return cores
    root = Path("/sys/fs/cgroup")
    own = next((root / line[4:] for line in lines if line.startswith("0::/")), root)
    for group in (own, *own.parents):
        if group.is_relative_to(root):
            cores = min(cores, _quota(group / "cpu.max") or cores)
    return cores


def _quota(file: Path) -> int:
    """Whole CPUs that ``cpu.max`` grants, at least one; 0 where it grants all or cannot be read."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 0
