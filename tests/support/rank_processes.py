"""The processes of an engine's ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import cast

from vllmlite import LLM
from vllmlite.ranks.runner import ParallelRunner


def processes_of(llm: LLM) -> list[subprocess.Popen[bytes]]:
    """The processes of the ranks, in their order."""
    return cast(ParallelRunner, llm.llm_engine.engine.runner).group.processes


def ranks_of(pid: int) -> list[int]:
    """The processes of the ranks that process ``pid`` drives."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for file in children for child in file.read_text().split())


def has_ended(pid: int) -> bool:
    """Whether a process has ended; it may not have been waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
