"""Measurements of the command line: time to first token, memory, and CPU time when idle."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpu_bench.models import Models
from cpu_bench.systems import Programs, last_line

from vllmlite.hub import find_model

COMMAND = [sys.executable, "-m", "vllmlite"]
MEGABYTE = 1_000_000
POOL = 8 << 20
"""Bytes of key/value cache in the memory measurement."""
IDLE_SECONDS = 10.0
START_LIMIT = 60.0


def programs(models: Models) -> Programs:
    """Return the measurements ``first_token`` (weights, or none for the built-in model), ``memory``, ``idle``."""

    def first_token(weights: str | None = None) -> float:
        """Return the seconds from the start of ``generate`` to its first byte: the prompt with the first token."""
        model = [] if weights is None else ["--model", str(models.checkpoint(weights))]
        start = time.perf_counter()
        with _running(["generate", *model, "--backend", "cpu", "--max-tokens", "1", "Debian is"]) as process:
            _first_byte(process)
            return time.perf_counter() - start

    def memory(weights: str) -> float:
        """Return the resident megabytes of ``chat`` after an answer, minus the bytes of weights and cache."""
        arguments = ["--model", str(models.checkpoint(weights)), "--backend", "cpu", "--max-tokens", "8"]
        sizes = ["--max-model-len", "128", "--kv-cache-memory-bytes", str(POOL)]
        with _running(["chat", *arguments, *sizes]) as process:
            _ask(process)
            status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return (peak - models.weight_bytes(weights) - POOL) / MEGABYTE

    def idle(command: str) -> float:
        """Return the CPU seconds that ``chat``, after an answer, or ``serve`` uses in ten idle seconds."""
        arguments = {"chat": ["chat", "--max-tokens", "8"], "serve": ["serve", "--port", str(_free_port())]}
        with _running([*arguments[command], "--backend", "cpu"]) as process:
            if command == "chat":
                _ask(process)
            else:
                _connect(process, int(arguments[command][-1]))
            time.sleep(2)
            before = _cpu_seconds(process.pid)
            time.sleep(IDLE_SECONDS)
            return _cpu_seconds(process.pid) - before

    return Programs(first_token=first_token, memory=memory, idle=idle)


def step_model(directory: Path) -> Path:
    """Create the configuration of a model too small to take time, with the built-in model's tokenizer."""
    made = directory / "step-model"
    if not made.exists():
        built_in = find_model(None)
        made.mkdir(parents=True)
        for file in built_in.glob("tokenizer*.json"):
            shutil.copy(file, made)
        config = json.loads((built_in / "config.json").read_text())
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        (made / "config.json").write_text(json.dumps({**config, **small, **heads}))
    return made


@contextmanager
def _running(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command line as a process that is killed at the end."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _first_byte(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None and process.stderr is not None
    if not process.stdout.read(1):
        raise RuntimeError(last_line(process.stderr.read().decode(errors="replace")))


def _ask(process: subprocess.Popen[bytes]) -> None:
    """Do one turn of ``chat``: send a line, read a line."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"What is Debian?\n")
    _first_byte(process)
    time.sleep(2)


def _connect(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the process listens."""
    assert process.stderr is not None
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(last_line(process.stderr.read().decode(errors="replace")))
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"serve does not listen after {START_LIMIT:.0f} s")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process in seconds, at the kernel's resolution of nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
