"""Replicas of an engine behind one client: same texts as of one engine, and their end is everybody's."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from vllmlite import LLM, AsyncLLM, EngineConfig, SamplingParams
from vllmlite.engine_process import start
from vllmlite.engine_process.host import EngineProcess
from vllmlite.engine_process.replicas import ReplicaClient, add_stats
from vllmlite.errors import EngineDeadError, ParameterError, VllmliteError
from vllmlite.outputs import EngineStats

CONFIG = EngineConfig(dtype="float32", max_model_len=256, device="cpu", max_num_seqs=8, data_parallel_size=2)
PROMPTS = [
    f"{word} is a" for word in ("Debian", "The kernel", "A package", "The shell", "Python", "A daemon")
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[AsyncLLM]:
    engine = AsyncLLM(CONFIG)
    yield engine
    engine.shutdown()


def client_of(engine: AsyncLLM) -> ReplicaClient:
    client = engine.llm_engine.engine_core
    assert isinstance(client, ReplicaClient)
    return client


async def text_of(engine: AsyncLLM, name: str, prompt: str, params: SamplingParams = GREEDY) -> list[str]:
    async for output in engine.generate(prompt, params, name):
        last = output
    return [completion.text for completion in last.outputs]


def test_replicas_give_the_texts_of_one_engine_and_end_together(engine: AsyncLLM) -> None:
    reference = LLM(dtype="float32", max_model_len=256, device="cpu", max_num_seqs=8)
    want = [output.outputs[0].text for output in reference.generate(PROMPTS, GREEDY)]
    sampled = SamplingParams(temperature=2, max_tokens=12, n=4)
    client = client_of(engine)
    processes = [each.handle for each in client._clients]

    async def main() -> None:
        found = await asyncio.gather(*(text_of(engine, str(i), prompt) for i, prompt in enumerate(PROMPTS)))
        assert [texts[0] for texts in found] == want
        steps = [each.stats.num_generation_tokens for each in client._clients]
        assert sum(steps) == 12 * len(PROMPTS) and min(steps) >= 12
        assert (await engine.stats()).num_generation_tokens == sum(steps)
        # Unseeded requests have other random numbers in each replica.
        found = await asyncio.gather(*(text_of(engine, str(i), PROMPTS[0], sampled) for i in range(2)))
        assert len({text for texts in found for text in texts}) == 8
        assert await engine.reset_prefix_cache()
        with pytest.raises(ParameterError, match="prompt"):
            await text_of(engine, "bad", "Debian " * 300)
        assert not client.has_unfinished_requests()

        stream = asyncio.ensure_future(
            text_of(engine, "cut", "Debian", SamplingParams(max_tokens=200, ignore_eos=True))
        )
        await asyncio.sleep(0)
        assert isinstance(processes[1], EngineProcess)
        os.kill(processes[1].process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=r"replica 1: .*signal 9"):
            await stream
            await text_of(engine, "later", "Debian")

    asyncio.run(main())
    assert "replica 1" in str(engine.dead_error)
    for process in processes:
        assert isinstance(process, EngineProcess) and process.process.wait(10) is not None


def test_counters_of_replicas_are_added_up() -> None:
    one = EngineStats(num_running=1, block_size=16, num_accepted_tokens_per_pos=(3, 1), device="cpu")
    other = EngineStats(
        num_running=2, block_size=16, num_accepted_tokens_per_pos=(1,), last_error="broke", device="cpu"
    )
    both = add_stats([one, other])
    assert (both.num_running, both.block_size, both.num_accepted_tokens_per_pos) == (3, 16, (4, 1))
    assert (both.last_error, both.device) == ("broke", "cpu")


def test_replicas_on_unlike_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    class Client:
        def __init__(self, number: int) -> None:
            self.number = number
            self.stats = EngineStats(device="cuda" if number == 0 else "cpu")

        def close(self) -> None:
            ended.append(self.number)

    class Started:
        engine = (Client(0), Client(1))

    monkeypatch.setattr(start, "_start_processes", lambda _config, _count: Started)
    with pytest.raises(ParameterError, match=r"data_parallel_size.*cuda, cpu"):
        start.start_replicas(CONFIG)
    assert ended == [0, 1]


def test_one_engine_does_not_pass_for_replicas() -> None:
    with pytest.raises(VllmliteError, match="data_parallel_size"):
        LLM(data_parallel_size=2)
    with pytest.raises(ParameterError, match="device"):
        EngineConfig(data_parallel_size=2, device="cuda:1")
