"""Nodes of an engine, each a process, and programs that a launcher would start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "backend": "cpu", "threads": 1, "skip_tokenizer_init": True, "num_gpu_blocks_override": 300,
}  # fmt: skip


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def flags(options: Mapping[str, Any]) -> list[str]:
    """The command line of some options of the engine."""
    found = []
    for name, value in options.items():
        found.append("--" + name.replace("_", "-"))
        if value is not True:
            found.append(str(value))
    return found


@contextmanager
def headless(
    model: Path, nodes: int, port: int, wrap: Sequence[str] = (), **options: Any
) -> Iterator[list[subprocess.Popen[str]]]:
    """The nodes above 0 of an engine; those that still run at the end are killed. ``wrap`` precedes each command."""
    given = OPTIONS | {"nnodes": nodes, "master_port": port} | options
    command = [*wrap, sys.executable, "-m", "vllmlite", "serve", str(model), "--headless", *flags(given)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes: list[subprocess.Popen[str]] = []
    try:
        for node in range(1, nodes):
            processes.append(subprocess.Popen([*command, "--node-rank", str(node)], **pipes))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def launched(program: str, world: int, port: int, *args: str) -> list[subprocess.Popen[str]]:
    """Processes that run a program with the environment of torchrun."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = []
    for rank in range(world):
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in (place | meeting).items()}
        found.append(subprocess.Popen([sys.executable, "-c", program, *args], env=environment, **pipes))
    return found
