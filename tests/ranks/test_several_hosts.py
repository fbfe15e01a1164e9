"""An engine with ranks on several hosts gives the tokens of one rank; a host that is lost ends it with one line."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from native import needs_native_cpu
from rank_hosts import OPTIONS, free_port, headless, launched
from rank_processes import has_ended, ranks_of

from vllmlite import LLM, SamplingParams
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import EngineDeadError, ParameterError

pytestmark = needs_native_cpu
PROMPTS = [{"prompt_token_ids": ids} for ids in ([5, 6, 7, 8] * 8, [9, 10, 11], list(range(20, 60)))]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=1, seed=5, top_k=40, max_tokens=24, ignore_eos=True, prompt_logprobs=1),
]
FOREVER = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)


def generate(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, num_hidden_layers=2, vocab_size=64, max_position_embeddings=4096)
    return path


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    return generate(LLM(str(checkpoint), **OPTIONS))


SHAPES = [
    pytest.param(2, {"tensor_parallel_size": 2}, id="tensor"),
    pytest.param(2, {"pipeline_parallel_size": 2}, id="pipeline", marks=pytest.mark.slow),
    pytest.param(
        2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, id="both", marks=pytest.mark.slow
    ),
    pytest.param(
        4,
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        id="four hosts",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("nodes", "shape"), SHAPES)
def test_several_hosts_give_the_tokens_of_one_rank(
    nodes: int, shape: dict[str, Any], checkpoint: Path, expected: list[list[int]]
) -> None:
    port = free_port()
    with headless(checkpoint, nodes, port, **shape) as others:
        llm = LLM(str(checkpoint), nnodes=nodes, master_port=port, **shape, **OPTIONS)
        assert generate(llm) == expected == generate(llm)
        assert f"processes of 1 thread on {nodes} nodes" in llm.llm_engine.backend_choice
        llm.llm_engine.close()
        for process in others:
            assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGTERM"])
@pytest.mark.parametrize("who", ["rank", "node"])
def test_a_host_that_is_lost_ends_the_engine(name: str, who: str, checkpoint: Path) -> None:
    if (name, who) == ("SIGTERM", "rank"):
        pytest.skip("ranks ignore SIGTERM, which a service manager sends to all processes")
    port = free_port()
    with headless(checkpoint, 2, port, tensor_parallel_size=2) as (node,):
        llm = LLM(str(checkpoint), tensor_parallel_size=2, nnodes=2, master_port=port, **OPTIONS)
        (rank,) = ranks_of(node.pid)
        own = [process.pid for process in llm.llm_engine.engine.runner.group.processes]  # type: ignore[attr-defined]
        target, number = rank if who == "rank" else node.pid, signal.Signals[name]
        sent: list[float] = []

        def disturb() -> None:
            sent.append(time.monotonic())
            import os

            os.kill(target, number)

        timer = threading.Timer(0.2, disturb)
        timer.start()
        with pytest.raises(EngineDeadError) as raised:
            while True:
                llm.generate([{"prompt_token_ids": [3, 4, 5]}], FOREVER, use_tqdm=False)
        assert time.monotonic() - sent[0] < 5
        message = str(raised.value)
        how = {
            "SIGKILL": r"rank 1 of 2 \(.*\) (was killed by signal 9|has (closed|lost) its connection.*); its last",
            "SIGSTOP": r"rank 1 of 2 \(\S+\) has not shown for \S+ s that it runs; its last message: ready",
            "SIGTERM": "node 1 was stopped by a signal",
        }[name]
        assert re.match(how, message) and "\n" not in message
        llm.llm_engine.close()
        if who == "node" and name == "SIGSTOP":
            node.send_signal(signal.SIGCONT)
        _, errors = node.communicate(timeout=20)
        assert node.returncode == (-9 if who == "node" and name == "SIGKILL" else 1)
        assert re.fullmatch(r"(vllmlite: error: .*\n)?", errors)
        deadline = time.monotonic() + 10
        while not all(map(has_ended, [rank, *own])):
            assert time.monotonic() < deadline
            time.sleep(0.01)


PROGRAM = f"""
import json, sys
from vllmlite import LLM, SamplingParams
options = json.loads(sys.argv[2])
extra = options.pop("extra", [])
llm = LLM(sys.argv[1], distributed_executor_backend="external_launcher", **options, **{OPTIONS!r})
import os
prompt = [5, 6, 7, 8] * 8 + extra[:int(os.environ["RANK"])]
params = SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True, logprobs=1)
for _ in range(2):
    (found,) = llm.generate([{{"prompt_token_ids": prompt}}], params, use_tqdm=False)
    print(found.outputs[0].token_ids, found.outputs[0].logprobs)
"""


@pytest.mark.parametrize(("world", "shape"), [SHAPES[0], SHAPES[1], SHAPES[3]])
def test_programs_of_a_launcher_return_equal_outputs(
    world: int, shape: dict[str, int], checkpoint: Path
) -> None:
    processes = launched(PROGRAM, world, free_port(), str(checkpoint), json.dumps(shape))
    found = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * world
    assert found[0][0] and all(each == found[0] for each in found)
    params = SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True)
    (alone,) = LLM(str(checkpoint), **OPTIONS).generate([PROMPTS[0]], params, use_tqdm=False)
    assert found[0][0].startswith(str(list(alone.outputs[0].token_ids)))


@pytest.mark.slow
def test_programs_that_ask_for_different_things_are_stopped(checkpoint: Path) -> None:
    options = json.dumps({"tensor_parallel_size": 2, "extra": [9]})
    processes = launched(PROGRAM, 2, free_port(), str(checkpoint), options)
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and not output
        assert errors.endswith("all ranks must make the same calls\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nnodes": 3}, r"nnodes=3: must divide .* = 2"),
        ({"nnodes": 2, "node_rank": 2}, "node_rank=2: must be less than nnodes=2"),
        ({"nnodes": 2, "distributed_executor_backend": "external_launcher"}, "nnodes=2: needs .*=mp"),
        ({"nnodes": 2, "data_parallel_size": 2}, "data_parallel_size=2: must be 1 with ranks on several"),
        ({"seed": -1, "distributed_executor_backend": "external_launcher"}, "seed=-1: must be the same"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        EngineConfig.from_kwargs(tensor_parallel_size=2, **options)
