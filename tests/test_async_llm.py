"""AsyncLLM: streams from many tasks, consumers that stop early, bad requests, shutdown, and a thread that sleeps when
idle."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cpu_time import least_cpu_seconds
from interrupts import Interrupt, interrupt

from vllmlite import LLM, AsyncLLM, EngineConfig, SamplingParams
from vllmlite.async_llm import NewRequest
from vllmlite.errors import ParameterError, VllmliteError
from vllmlite.sampling_params import RequestOutputKind

CONFIG = EngineConfig(dtype="float32", max_model_len=256, device="cpu")
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
PROMPTS = ["Debian is", "The kernel", "A package", "To install"]


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    engine = AsyncLLM(CONFIG)
    yield engine
    engine.shutdown()


async def text_of(engine: AsyncLLM, prompt: str, request_id: str, params: SamplingParams = PARAMS) -> str:
    return "".join([o.outputs[0].text async for o in engine.generate(prompt, params, request_id)])


def test_concurrent_streams_equal_a_batch(engine: AsyncLLM) -> None:
    async def together() -> list[str]:
        return await asyncio.gather(*(text_of(engine, p, str(i)) for i, p in enumerate(PROMPTS)))

    batch = LLM(dtype="float32", max_model_len=256, device="cpu").generate(PROMPTS, PARAMS)
    assert asyncio.run(together()) == [output.outputs[0].text for output in batch]


def test_streams_with_drafts_equal_a_batch_without() -> None:
    """Steps give several tokens of a stream, through the engine's thread or process."""
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    config = EngineConfig(dtype="float32", max_model_len=256, device="cpu", speculative_config=drafts)
    prompts = ["one two three one two three one", "a a a a a a"]
    params = PARAMS.clone(max_tokens=40, logprobs=1)
    engine = AsyncLLM(config)

    async def together() -> tuple[list[str], int]:
        texts = await asyncio.gather(*(text_of(engine, p, str(i), params) for i, p in enumerate(prompts)))
        return texts, (await engine.stats()).num_accepted_tokens

    try:
        texts, accepted = asyncio.run(together())
    finally:
        engine.shutdown()
    batch = LLM(dtype="float32", max_model_len=256, device="cpu").generate(prompts, params)
    assert texts == [output.outputs[0].text for output in batch]
    assert accepted > 0


def test_a_consumer_that_stops_early_frees_the_blocks(engine: AsyncLLM) -> None:
    async def leave() -> int:
        stream = engine.generate("Debian is", PARAMS.clone(max_tokens=200), "leaver")
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return (await engine.stats()).num_used_blocks

    assert asyncio.run(leave()) == 0


def test_abort_ends_the_stream(engine: AsyncLLM) -> None:
    async def abort() -> None:
        async for _ in engine.generate("Debian is", PARAMS.clone(max_tokens=200), "x"):
            await engine.abort("x")

    with pytest.raises(VllmliteError, match="aborted"):
        asyncio.run(abort())


def test_the_next_request_is_answered_wherever_a_submission_was_interrupted(engine: AsyncLLM) -> None:
    """An event loop may continue after Ctrl-C, as that of a notebook does."""

    params = PARAMS.clone(max_tokens=2)

    async def interrupted() -> int:
        want = await text_of(engine, "Debian is", "same", params)
        point = 1
        while True:
            try:
                with interrupt(point):
                    stream = await engine.submit([NewRequest("same", "Debian is", params)])
            except Interrupt:
                assert await asyncio.wait_for(text_of(engine, "Debian is", "same", params), 60) == want, point
                point += 4
            else:
                stream.close()
                return point

    assert asyncio.run(interrupted()) > 100
    assert not engine._core.has_unfinished_requests() and not engine._streams


def test_bad_requests_disturb_nobody(engine: AsyncLLM) -> None:
    async def both() -> tuple[str, BaseException | str]:
        good, bad = await asyncio.gather(
            text_of(engine, "Debian is", "good"),
            text_of(engine, "x " * 2000, "bad"),
            return_exceptions=True,
        )
        assert isinstance(good, str)
        return good, bad

    good, bad = asyncio.run(both())
    assert good
    assert isinstance(bad, ParameterError)


def test_the_thread_sleeps_when_idle(engine: AsyncLLM) -> None:
    asyncio.run(text_of(engine, "Debian is", "warm"))
    assert least_cpu_seconds() < 0.02


def test_shutdown_ends_open_streams() -> None:
    engine = AsyncLLM(CONFIG)

    async def cut_off() -> None:
        async for _ in engine.generate("Debian is", PARAMS.clone(max_tokens=200), "x"):
            engine.shutdown()

    with pytest.raises(VllmliteError, match="shut down"):
        asyncio.run(cut_off())
    with pytest.raises(VllmliteError, match="shut down"):
        asyncio.run(text_of(engine, "Debian is", "late"))


def test_a_program_can_end_during_a_step() -> None:
    script = (
        "import asyncio\n"
        "from vllmlite import AsyncLLM, EngineConfig, SamplingParams\n"
        "from vllmlite.async_llm import NewRequest\n"
        "engine = AsyncLLM(EngineConfig(device='cpu', max_model_len=256))\n"
        "params = SamplingParams(max_tokens=200, ignore_eos=True)\n"
        "async def run():\n"
        "    stream = await engine.submit([NewRequest(str(i), 'Debian is', params) for i in range(8)])\n"
        "    await stream.take()\n"
        "asyncio.run(run())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert ended.returncode == 0, ended.stderr
