"""Two hosts as network namespaces: delay, loss and a partition, where the machine lets tests make them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu
from rank_hosts import OPTIONS, flags, headless

from vllmlite.ranks.address import SECRET_VARIABLE

pytestmark = [needs_native_cpu, pytest.mark.slow]
ADDRESS = "10.97.231.1"
PORT = 29877


def ip(*arguments: str) -> None:
    """Run ip, or tc; skip the test if it cannot do that here."""
    program = [] if arguments[0] == "tc" else ["ip"]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join((*program, *arguments))}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces that are connected; in the first, ``ranks0`` is the network device."""
    if os.geteuid() or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root, ip and tc")
    names = f"ranks{os.getpid()}a", f"ranks{os.getpid()}b"
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip(
            "-n",
            names[0],
            "link",
            "add",
            "ranks0",
            "type",
            "veth",
            "peer",
            "name",
            "ranks0",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.97.231.{number}/24", "dev", "ranks0")
            for device in ("lo", "ranks0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, num_hidden_layers=2, vocab_size=64, max_position_embeddings=4096)
    return path


def command(checkpoint: Path, prompts: Path, max_tokens: int, **options: Any) -> list[str]:
    """A command that completes two prompts, and prints a line for each."""
    prompts.write_text('{"prompt_token_ids": [3, 4, 5]}\n{"prompt_token_ids": [7, 8, 9, 10]}\n')
    return [
        sys.executable, "-m", "vllmlite", "generate", "--model", str(checkpoint), "--json", "-f", str(prompts),
        "--max-tokens", str(max_tokens), "--temperature", "0", "--ignore-eos",
        *flags(OPTIONS | options),
    ]  # fmt: skip


def token_ids(output: str) -> list[Any]:
    return [json.loads(line)["token_ids"] for line in output.splitlines()]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of an engine on both hosts, which have a secret in common."""
    monkeypatch.setenv(SECRET_VARIABLE, "a secret of the two hosts")
    return {"tensor_parallel_size": 2, "master_addr": ADDRESS, "max_num_seqs": 1}


@pytest.mark.parametrize("disturbance", ["", "delay 3ms 1ms", "delay 3ms loss 2%"])
def test_a_slow_network_changes_no_text(
    disturbance: str, hosts: tuple[str, str], several: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    if disturbance:
        device = ["qdisc", "add", "dev", "ranks0", "root", "netem", *disturbance.split()]
        ip("netns", "exec", hosts[0], "tc", *device)
    prompts = tmp_path / "prompts.jsonl"
    alone = subprocess.check_output(command(checkpoint, prompts, 12), text=True)
    inside = [["ip", "netns", "exec", name] for name in hosts]
    with headless(checkpoint, 2, PORT, inside[1], **several) as (node,):
        generate = command(checkpoint, prompts, 12, nnodes=2, master_port=PORT, **several)
        found = subprocess.check_output([*inside[0], *generate], text=True)
        assert token_ids(found) == token_ids(alone)
        assert node.communicate(timeout=20) == ("", "") and node.returncode == 0


def test_a_partition_ends_both_sides(
    hosts: tuple[str, str], several: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    inside = [["ip", "netns", "exec", name] for name in hosts]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with headless(checkpoint, 2, PORT, inside[1], **several) as (node,):
        generate = command(checkpoint, tmp_path / "prompts", 4000, nnodes=2, master_port=PORT, **several)
        with subprocess.Popen([*inside[0], *generate], **pipes) as engine:
            assert engine.stdout is not None
            assert engine.stdout.readline().startswith('{"index": 0')
            cut = time.monotonic()
            ip("-n", hosts[0], "link", "set", "ranks0", "down")
            for process, other in ((engine, 1), (node, 0)):
                _, message = process.communicate(timeout=30)
                assert process.returncode == 1
                assert message.startswith(f"vllmlite: error: rank {other} of 2 (")
                assert "has not shown for" in message and message.count("\n") == 1
            assert time.monotonic() - cut < 8  # with the ends of both programs; detection takes up to 4.3 s
