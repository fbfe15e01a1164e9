"""A rank that ends or stops ends the engine within seconds, with one line that names it, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu
from rank_processes import has_ended, processes_of, ranks_of

from vllmlite import LLM, SamplingParams
from vllmlite.backends.native import load_extension
from vllmlite.errors import BackendError, EngineDeadError
from vllmlite.ranks import group
from vllmlite.ranks.layout import Layout
from vllmlite.runner.build import WAITING
from vllmlite.subprogram import start_python

pytestmark = needs_native_cpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, num_hidden_layers=1, vocab_size=64, max_position_embeddings=4096)
    return path


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_ends_or_stops_ends_the_engine(name: str, rank: int, checkpoint: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    llm = LLM(
        str(checkpoint), tensor_parallel_size=2, backend="cpu", threads=1, skip_tokenizer_init=True,
        num_gpu_blocks_override=300,
    )  # fmt: skip
    processes = processes_of(llm)
    number = signal.Signals[name]
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        processes[rank].send_signal(number)

    timer = threading.Timer(0.1, kill)
    timer.start()
    how = "was killed by signal 9" if number == signal.SIGKILL else r"has not shown for \S+ s that it runs"
    with pytest.raises(EngineDeadError, match=rf"^rank {rank} of 2 \(process \d+ on \S+\) {how}; its last"):
        while True:
            params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
            llm.generate([{"prompt_token_ids": [3, 4, 5]}], params, use_tqdm=False)
    assert time.monotonic() - killed[0] < 5
    assert all(process.poll() is not None for process in processes)
    assert set(os.listdir("/dev/shm")) == shared


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import time; time.sleep(60)",
            r"rank [01] of 2 \(process \d+ on \S+\) has not started: it has done",
        ),
        ("import sys; sys.exit(3)", r"rank [01] of 2 .* ended with status 3; its last message: starting"),
    ],
)
def test_a_rank_that_does_not_start_is_named(
    program: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "PROGRAM", program)
    monkeypatch.setattr(group, "START_SECONDS", 0.3)
    setup: Any = None  # is not read by these programs
    ranks = group.RankGroup([setup, setup], Layout(2, 2))
    with pytest.raises(BackendError, match=message):
        ranks.wait_until_ready()
    assert all(process.poll() is not None for process in ranks.processes)


def test_a_rank_whose_driver_has_ended_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    memory = os.memfd_create("test")
    os.ftruncate(memory, load_extension("_cpu").Ranks.memory_size(1))
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        assert start_python(group.PROGRAM, [theirs.fileno(), memory], 0, 1).wait(60) in (0, 1)
    os.close(memory)
    assert capfd.readouterr().err == ""


STALLED = """
import sys, time, socket
from vllmlite.backends.native import load_extension
from vllmlite.engine_process.wire import pack
from vllmlite.ranks.messages import Phase
control, memory, rank, world = map(int, sys.argv[1:])
ranks = load_extension("_cpu").Ranks(memory, rank, world)
ranks.start_heartbeat(control)
connection = socket.socket(fileno=control)
connection.sendall(pack(Phase("loading the weights" if rank else WAITING)))
time.sleep(60)
"""


def test_a_rank_that_stops_loading_is_named_and_not_those_that_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "PROGRAM", STALLED.replace("WAITING", repr(WAITING)))
    monkeypatch.setattr(group, "STALLED_SECONDS", 1.0)
    setup: Any = None  # is not read by this program
    ranks = group.RankGroup([setup, setup], Layout(2, 2))
    with pytest.raises(BackendError, match=r"rank 1 of 2 .*: loading the weights; .* neither computed nor"):
        ranks.wait_until_ready()


def test_the_ranks_end_with_a_driver_that_is_killed(checkpoint: Path) -> None:
    """The command says nothing but one line and fails when a rank is killed while it runs."""
    program = (
        "import sys, time; from vllmlite import LLM\n"
        f"llm = LLM({str(checkpoint)!r}, tensor_parallel_size=2, threads=1, skip_tokenizer_init=True,"
        " num_gpu_blocks_override=300)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        process.kill()
    deadline = time.monotonic() + 5
    while not all(map(has_ended, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_the_command_fails_with_one_line(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [3, 4, 5]}\n' * 50)
    command = [
        sys.executable, "-m", "vllmlite", "generate", "--model", str(checkpoint), "-tp", "2", "--threads", "1",
        "--skip-tokenizer-init", "--json", "--max-tokens", "4000", "--ignore-eos", "--temperature", "0",
        "--max-num-seqs", "1", "--num-gpu-blocks-override", "300", "-f", str(prompts),
    ]  # fmt: skip
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith('{"index": 0')
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        process.stdout.read()
        message = process.stderr.read()
    assert re.fullmatch(r"vllmlite: error: rank 1 of 2 \(process .*\) was killed by signal 9; .*\n", message)
    assert process.returncode == 1
