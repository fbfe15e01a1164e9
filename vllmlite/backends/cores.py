"""Find the number of CPUs that this process may use (affinity and cgroup quotas), and bind threads to NUMA nodes."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def usable_cores() -> int:
    """Return the number of CPUs in the affinity mask, limited by cgroup v2 quotas; at least 1."""
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


def thread_places(threads: int, nodes: Path = NODES) -> list[list[int]]:
    """Return the CPUs to bind each thread to: those of one NUMA node.

    Threads are distributed over the nodes in proportion to their usable CPUs. The lists are empty (no binding) unless
    there are at least two nodes."""
    usable = _usable_nodes(nodes)
    if len(usable) < 2:
        return [[] for _ in range(threads)]
    ends = [sum(map(len, usable[: index + 1])) for index in range(len(usable))]
    places = []
    for thread in range(threads):
        share = thread * ends[-1] // threads
        places.append(usable[next(index for index, end in enumerate(ends) if share < end)])
    return places


def rank_cpus(ranks: int, nodes: Path = NODES) -> list[list[int]]:
    """Return the CPUs that each of several processes on this host may use: equal shares of those of this process, node
    by node.

    The lists are empty (no restriction) unless there are at least two NUMA nodes and a CPU for each process."""
    usable = [cpu for cpus in _usable_nodes(nodes) for cpu in cpus]
    if len(_usable_nodes(nodes)) < 2 or len(usable) < ranks:
        return [[] for _ in range(ranks)]
    ends = [rank * len(usable) // ranks for rank in range(ranks + 1)]
    return [usable[first:end] for first, end in pairwise(ends)]


def _usable_nodes(nodes: Path) -> list[list[int]]:
    """Return the CPUs that this process may use, by NUMA node; nodes without any are left out."""
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    lists = (_cpu_list(file) for file in sorted(nodes.glob("node*/cpulist")))
    return [cpus for cpus in (sorted(own.intersection(numbers)) for numbers in lists) if cpus]


def _cpu_list(file: Path) -> list[int]:
    """Parse a list of numbers such as ``0-3,8``; return [] if it cannot be read."""
    try:
        ranges = [part.partition("-") for part in file.read_text().strip().split(",") if part]
        return [cpu for low, dash, high in ranges for cpu in range(int(low), int(high if dash else low) + 1)]
    except (OSError, ValueError):
        return []


def _quota(file: Path) -> int:
    """Return the whole CPUs that ``cpu.max`` grants, at least 1; or 0 if it is unlimited or unreadable."""
    try:
        quota, period = file.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 0
