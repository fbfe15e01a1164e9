"""Facts about this machine, read from /proc, /sys and /etc; a fact that cannot be read is None or empty."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "sve", "sve2", "i8mm", "bf16", "svebf16", "sme", "v", "vsx", "vxe2",
)  # fmt: skip
"""CPU features relevant to matrix multiplication, under the kernel's names."""


def system() -> dict[str, Any]:
    """Return the distribution, kernel version and architecture."""
    release = _fields("/etc/os-release", "=")
    name = release.get("PRETTY_NAME", "").strip('"') or platform.system()
    return {"os": name, "kernel": platform.release(), "machine": platform.machine()}


def cpu() -> dict[str, Any]:
    """Return the CPU model, its cores, the cores this process may use, the container's limit, and ISA features."""
    info = _fields("/proc/cpuinfo", ":")
    flags = set((info.get("flags") or info.get("Features") or info.get("isa") or "").split())
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": info.get("model name") or info.get("cpu") or platform.processor() or None,
        "cores": os.cpu_count(),
        "usable_cores": affinity,
        "core_limit": _cpu_limit(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def memory() -> dict[str, int | None]:
    """Return bytes of memory: total, available, and the container's limit."""
    info = _fields("/proc/meminfo", ":")

    def kibibytes(name: str) -> int | None:
        number = info.get(name, "").split()
        return int(number[0]) * 1024 if number and number[0].isdigit() else None

    limits = [int(text) for text in _cgroup_values("memory.max") if text.isdigit()]
    return {
        "total": kibibytes("MemTotal"),
        "available": kibibytes("MemAvailable"),
        "limit": min(limits, default=None),
    }


def nvidia() -> dict[str, Any]:
    """Return the version of NVIDIA's kernel driver and the GPUs it lists, without loading a library."""
    driver = _read("/proc/driver/nvidia/version").split("\n")[0].partition(":")[2].split()
    version = next((word for word in driver if word[0].isdigit()), None)
    directories = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = (_fields(str(file), ":").get("Model") for file in directories)
    return {"driver": version, "gpus": [name for name in names if name]}


def _cpu_limit() -> float | None:
    limits = []
    for text in _cgroup_values("cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _cgroup_values(name: str) -> list[str]:
    """Return the contents of control file ``name`` in this process's cgroup and its ancestors (cgroup v2)."""
    own = next((line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    root = Path("/sys/fs/cgroup")
    place = root / own.strip("/")
    return [_read(str(p / name)).strip() for p in (place, *place.parents) if p == root or root in p.parents]


def _fields(path: str, separator: str) -> dict[str, str]:
    """Parse the ``name separator value`` lines of a file; the first line of each name counts."""
    fields: dict[str, str] = {}
    for line in _read(path).splitlines():
        name, found, value = line.partition(separator)
        if found:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
