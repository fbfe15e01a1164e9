"""Start another Python process that runs code of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def start_python(program: str, descriptors: Sequence[int], *args: object) -> subprocess.Popen[bytes]:
    """Start a process that runs the Python code ``program``, with the same module search path as this process. It
    inherits ``descriptors``, whose numbers are its first arguments, before ``args``."""
    paths = [path or os.getcwd() for path in sys.path]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *map(str, (*descriptors, *args))],
        pass_fds=list(descriptors),
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        process_group=0,  # a terminal's signals are for the process that starts it, which ends it in order
    )


def ending(status: int) -> str:
    """Return a description of how a process ended, from its exit status in the form of :class:`subprocess.Popen`."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
