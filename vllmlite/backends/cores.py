"""How many CPUs this process may use, its affinity or less where a control group's quota says so; and which of them
share memory."""

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


def thread_places(threads: int, nodes: Path = Path("/sys/devices/system/node")) -> list[list[int]]:
    """For each thread the CPUs to bind it to: those of one NUMA node, threads shared out among the nodes by how many of
    their CPUs the process may use. Empty lists, which bind nothing, where there are no two nodes to choose from."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    lists = (_cpu_list(file) for file in sorted(nodes.glob("node*/cpulist")))
    usable = [cpus for cpus in (sorted(own.intersection(numbers)) for numbers in lists) if cpus]
    if len(usable) < 2:
        return [[] for _ in range(threads)]
    ends = [sum(map(len, usable[: index + 1])) for index in range(len(usable))]
    places = []
    for thread in range(threads):
        share = thread * ends[-1] // threads
        places.append(usable[next(index for index, end in enumerate(ends) if share < end)])
    return places


def _cpu_list(file: Path) -> list[int]:
    """The numbers in a list such as ``0-3,8``; none where it cannot be read."""
    try:
        ranges = [part.partition("-") for part in file.read_text().strip().split(",") if part]
        return [cpu for low, dash, high in ranges for cpu in range(int(low), int(high if dash else low) + 1)]
    except (OSError, ValueError):
        return []


def _quota(file: Path) -> int:
    """Whole CPUs that ``cpu.max`` grants, at least one; 0 where it grants all or cannot be read."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 0
