"""Engines in a thread or process of their own: same outputs and errors as in the caller's thread, and they end with
their client."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllmlite import LLM, AsyncLLM, EngineConfig, LLMEngine, SamplingParams
from vllmlite.async_llm import NewRequest, OutputStream
from vllmlite.beam_params import BeamOptions
from vllmlite.engine.bounds import RequestBounds
from vllmlite.engine.trace import TraceEvent
from vllmlite.engine_process.client import EngineClient
from vllmlite.engine_process.host import EngineProcess
from vllmlite.engine_process.start import start_process, start_thread
from vllmlite.engine_process.wire import EngineCall, pack, unpack
from vllmlite.errors import EngineDeadError, ModelError, ParameterError, VllmliteError
from vllmlite.outputs import EngineStats, RequestOutput
from vllmlite.pooling_params import PoolingParams
from vllmlite.sampling_params import RequestOutputKind, StructuredOutputsParams

CONFIG = EngineConfig(dtype="float32", max_model_len=256, device="cpu", max_num_seqs=8)
PROMPTS = ["Debian is", "The kernel", "A package", "To install", "What"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1, seed=3, n=2, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=40, stop=[" the"]),
    SamplingParams(temperature=0.8, seed=5, presence_penalty=0.5, max_tokens=16, bad_words=["Debian"]),
]


@pytest.fixture(scope="module", params=[start_thread, start_process], ids=["thread", "process"])
def engine(request: pytest.FixtureRequest) -> Iterator[LLMEngine]:
    engine = LLMEngine(CONFIG, request.param)
    yield engine
    engine.close()


def core(engine: LLMEngine) -> EngineClient:
    assert isinstance(engine.engine_core, EngineClient)
    return engine.engine_core


def pid_of(engine: LLMEngine) -> int:
    handle = core(engine).handle
    assert isinstance(handle, EngineProcess)
    return handle.process.pid


def run(engine: LLMEngine, params: list[SamplingParams], pause: float) -> tuple[list[RequestOutput], int]:
    """Return the output of each prompt, with deltas joined, and the largest number of new tokens in one output."""
    whole: dict[str, RequestOutput] = {}
    most = 0
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, params[index])
    while engine.has_unfinished_requests():
        time.sleep(pause)
        for output in engine.step():
            most = max(most, *(len(completion.token_ids) for completion in output.outputs))
            if output.request_id in whole:
                whole[output.request_id].extend(output)
            else:
                whole[output.request_id] = output
    return [whole[str(index)] for index in range(len(PROMPTS))], most


def take_logprobs(output: RequestOutput) -> list[float]:
    """Return the log-probabilities, and set them to 0: in torch their last digits depend on what else is in a step."""
    found = []
    entries = [*(output.prompt_logprobs or ()), *(e for c in output.outputs for e in c.logprobs or ())]
    for logprob in (logprob for entry in entries for logprob in (entry or {}).values()):
        found.append(logprob.logprob)
        logprob.logprob = 0.0
    for completion in output.outputs:
        found.append(completion.cumulative_logprob or 0.0)
        completion.cumulative_logprob = None
    return found


def test_beams_come_from_another_process(engine: LLMEngine) -> None:
    params = SamplingParams(n=3, temperature=0, max_tokens=6, beams=BeamOptions(4))
    with pytest.raises(ParameterError, match="must be at most 8"):
        engine.add_request("wide", "Debian is", params.clone(beams=BeamOptions(9)))
    engine.add_request("beams", "Debian is", params)
    (output,) = run_to_end(engine)
    scores = [completion.cumulative_logprob or 0.0 for completion in output.outputs]
    assert output.finished and len(output.outputs) == 3 and scores == sorted(scores, reverse=True)
    assert len({completion.text for completion in output.outputs}) == 3
    engine.add_request("aborted", "Debian is", params)
    engine.abort_request("aborted")
    engine.add_request("after", "Debian is", SamplingParams(temperature=0, max_tokens=2))
    assert [output.request_id for output in run_to_end(engine) if output.finished] == ["after"]


def run_to_end(engine: LLMEngine) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("pauses", [(0.0,), (0.05, 0.5, 2.0)], ids=["prompt reader", "slow reader"])
def test_outputs_equal_those_of_an_engine_in_this_thread(
    engine: LLMEngine, pauses: tuple[float, ...]
) -> None:
    at_home = LLM(dtype="float32", max_model_len=256, device="cpu", max_num_seqs=8).generate(PROMPTS, PARAMS)
    deltas = [params.clone(output_kind=RequestOutputKind.DELTA) for params in PARAMS]
    for pause in pauses:  # seconds
        apart, most = run(engine, deltas, pause)
        if most > 1 or not pause:
            break
    else:
        pytest.fail("a slow reader found no two tokens at once")
    for here, there in zip(at_home, apart, strict=True):
        there.outputs.sort(key=lambda completion: completion.index)
        there.request_id, there.metrics, there.num_cached_tokens = here.request_id, here.metrics, 0
        here.num_cached_tokens = 0
        assert take_logprobs(there) == pytest.approx(take_logprobs(here), abs=1e-4)
        assert there == here


def test_impossible_requests_are_refused_by_the_client(engine: LLMEngine) -> None:
    with pytest.raises(ParameterError, match="max_model_len"):
        engine.add_request("long", [1] * 300, SamplingParams())
    with pytest.raises(ParameterError, match="max_logprobs"):
        engine.add_request("wide", [1], SamplingParams(logprobs=100))
    assert not engine.has_unfinished_requests()


def test_a_request_that_cannot_be_sent_leaves_no_trace(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, calls = engine.engine_core.add_request, []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise TypeError("cannot be pickled")
        return add(*args, **options)

    monkeypatch.setattr(engine.engine_core, "add_request", fail)
    params = SamplingParams(n=2, temperature=1, max_tokens=2)
    with pytest.raises(TypeError):
        engine.add_request("again", "Debian is", params)
    assert not engine.has_unfinished_requests()
    engine.add_request("again", "Debian is", params)
    while engine.has_unfinished_requests():
        engine.step()


def test_embeddings_equal_those_of_an_engine_in_this_thread(engine: LLMEngine) -> None:
    (at_home,) = LLM(dtype="float32", max_model_len=256, device="cpu").embed("Debian is")
    engine.add_request("vector", "Debian is", PoolingParams())
    given: list[RequestOutput] = []
    while not given:
        given = engine.step()
    (apart,) = given
    assert apart.finished and apart.embedding == at_home.outputs.embedding


def test_a_grammar_restricts_the_output(engine: LLMEngine) -> None:
    pytest.importorskip("xgrammar")
    choice = StructuredOutputsParams(choice=["tar", "dpkg"])
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=choice)
    engine.add_request("choice", "A tool:", params)
    text = ""
    while engine.has_unfinished_requests():
        for output in engine.step():
            text = output.outputs[0].text
    assert text in ("tar", "dpkg")


def test_a_reused_id_gets_no_output_of_the_earlier_request(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request("x", "Debian is", params.clone(max_tokens=200))
    engine.step()
    engine.abort_request("x")
    engine.add_request("x", "The kernel", params)
    last: list[RequestOutput] = []
    while engine.has_unfinished_requests():
        last = engine.step() or last
    at_home = LLM(dtype="float32", max_model_len=256, device="cpu").generate("The kernel", params)
    assert last[0].request_id == "x"
    assert last[0].outputs[0].token_ids == at_home[0].outputs[0].token_ids


def test_a_grammar_that_cannot_be_loaded_ends_only_its_request(engine: LLMEngine) -> None:
    pytest.importorskip("xgrammar")
    choice = StructuredOutputsParams(choice=["tar", "dpkg", "apt"])
    compiled = engine.grammars.compile(choice)
    compiled.packed, whole = b"damaged on the way", compiled.packed
    params = SamplingParams(temperature=0, max_tokens=20, structured_outputs=choice)
    try:
        engine.add_request("bad", "A tool:", params)
    finally:
        compiled.packed = whole
    engine.add_request("good", "Debian is", SamplingParams(max_tokens=4))
    reasons = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            reasons[output.request_id] = output.outputs[0].finish_reason
    assert reasons == {"bad": "error", "good": "length"}
    assert engine.take_error("bad")


def test_a_request_aborted_before_its_grammar_is_loaded_never_runs(engine: LLMEngine) -> None:
    pytest.importorskip("xgrammar")
    structure = StructuredOutputsParams(json={"type": "array", "items": {"type": "string", "maxLength": 99}})
    engine.add_request("gone", "Debian is", SamplingParams(max_tokens=200, structured_outputs=structure))
    engine.abort_request("gone")
    engine.add_request("good", "Debian is", SamplingParams(max_tokens=4))
    engine.add_request("next", "Debian is", SamplingParams(max_tokens=4, structured_outputs=structure))
    seen = set()
    while engine.has_unfinished_requests():
        seen |= {output.request_id for output in engine.step()}
    assert seen == {"good", "next"}
    assert engine.stats().num_running == 0


def test_an_aborted_request_frees_its_blocks(engine: LLMEngine) -> None:
    engine.add_request("gone", "Debian is", SamplingParams(max_tokens=200, ignore_eos=True))
    engine.step()
    engine.abort_request("gone")
    assert not engine.has_unfinished_requests()
    deadline = time.monotonic() + 60
    while engine.stats().num_used_blocks and time.monotonic() < deadline:
        time.sleep(0.01)
        core(engine).receive()
    assert engine.stats().num_used_blocks == engine.stats().num_running == 0


def test_steps_are_traced_in_the_engine() -> None:
    engine = AsyncLLM(CONFIG, engine_process=True)

    async def run() -> list[list[TraceEvent]]:
        await engine.ask("start_trace")
        async for _ in engine.generate("Debian is", SamplingParams(temperature=0, max_tokens=4), "traced"):
            pass
        return [await engine.ask("stop_trace"), await engine.ask("stop_trace")]

    events, later = asyncio.run(run())
    engine.shutdown()
    assert {event["name"] for event in events} == {"step", "launch", "collect"}
    assert {event["pid"] for event in events} == {pid_of(engine.llm_engine)}
    assert later == []


def test_errors_of_loading_are_raised_in_the_client() -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        LLMEngine(EngineConfig(model="./no-such-model"), start_process)
    with pytest.raises(ParameterError, match="max_model_len"):
        LLMEngine(EngineConfig(max_model_len=1 << 20), start_process)


@pytest.mark.parametrize("busy", [True, False])
def test_the_death_of_the_engine_process_is_noticed(busy: bool) -> None:
    engine = AsyncLLM(CONFIG, engine_process=True)

    async def run() -> None:
        died = asyncio.Event()
        engine.on_death(died.set)
        if busy:
            params = SamplingParams(max_tokens=200, ignore_eos=True)
            with pytest.raises(EngineDeadError, match="signal 9"):
                async for _ in engine.generate("Debian is", params, "x"):
                    os.kill(pid_of(engine.llm_engine), signal.SIGKILL)
        else:
            question = engine.ask("current_stats")
            os.kill(pid_of(engine.llm_engine), signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="signal 9"):
                while True:
                    await question
                    question = engine.ask("current_stats")
        await asyncio.wait_for(died.wait(), 60)
        with pytest.raises(EngineDeadError, match="signal 9"):
            await engine.stats()

    asyncio.run(run())
    assert "signal 9" in str(engine.dead_error)
    engine.shutdown()


@pytest.mark.parametrize("process", [False, True])
def test_outputs_that_arrive_while_the_event_loop_is_busy_are_merged(process: bool) -> None:
    engine = AsyncLLM(CONFIG, engine_process=process)
    params = SamplingParams(
        temperature=0, max_tokens=100, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    pieces: list[int] = []

    async def run() -> None:
        async for output in engine.generate("Debian is", params, "x"):
            pieces.append(len(output.outputs[0].token_ids))
            if len(pieces) >= 3 and max(pieces) <= 5:
                time.sleep(0.1 * len(pieces))  # longer each time: another program may have the machine

    try:
        asyncio.run(run())
    finally:
        engine.shutdown()
    assert sum(pieces) == 100
    assert max(pieces) > 5


class Deaf:
    """A handle whose host reads only when the test does."""

    def __init__(self) -> None:
        self.connection, self.theirs = socket.socketpair()

    def wait_for_end(self) -> str:
        return "it was never there"


def test_messages_that_do_not_fit_the_socket_are_sent_later() -> None:
    deaf = Deaf()
    client = EngineClient(deaf, RequestBounds(512, frozenset(), 1 << 20, -1), EngineStats())
    prompt = list(range(3, 500)) * 100

    async def run() -> None:
        client.join_loop(asyncio.get_running_loop(), client.receive)
        for index in range(20):
            client.add_request(str(index), [index, *prompt], SamplingParams(max_tokens=1))
        with deaf.theirs.makefile("rb") as stream:
            for index in range(20):
                command = await asyncio.to_thread(unpack, stream)
                assert command.args[1] == [index, *prompt]
        client.close()

    with deaf.theirs:
        asyncio.run(asyncio.wait_for(run(), 60))
    with pytest.raises(EngineDeadError, match="never there"):
        client.reset_prefix_cache()


def test_an_engine_serves_one_event_loop_at_a_time() -> None:
    engine = AsyncLLM(CONFIG)
    errors: list[BaseException] = []

    async def elsewhere() -> None:
        try:
            await engine.stats()
        except VllmliteError as error:
            errors.append(error)

    async def run() -> None:
        await engine.stats()
        await asyncio.to_thread(asyncio.run, elsewhere())

    try:
        asyncio.run(run())
        assert len(errors) == 1 and "another event loop" in str(errors[0])
        asyncio.run(elsewhere())
        assert len(errors) == 1
    finally:
        engine.shutdown()


def test_calls_made_between_two_event_loops_are_carried_out() -> None:
    engine = AsyncLLM(CONFIG)
    endless = SamplingParams(max_tokens=200, ignore_eos=True)

    async def begin() -> OutputStream:
        stream = await engine.submit([NewRequest("x", "Debian is", endless)])
        await stream.take()
        return stream

    try:
        asyncio.run(begin()).close()
        assert asyncio.run(engine.stats()).num_running == 0
    finally:
        engine.shutdown()


def test_the_host_ends_when_its_client_is_killed_in_the_middle_of_a_message() -> None:
    host = EngineProcess(CONFIG)
    host.wait_until_ready()
    host.connection.sendall(pack(EngineCall("reset_prefix_cache"))[:-1])
    host.connection.close()
    assert host.process.wait(30) == 0


def test_an_interrupt_while_the_model_loads_ends_the_host_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[EngineProcess] = []

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    def start_one(config: EngineConfig, replica: int) -> EngineProcess:
        started.append(EngineProcess(config, replica))
        return started[0]

    monkeypatch.setattr("vllmlite.engine_process.host.PROGRAM", "import time; time.sleep(30)")
    monkeypatch.setattr("vllmlite.engine_process.host.CLOSING_SECONDS", 60)
    monkeypatch.setattr("vllmlite.engine_process.start.EngineProcess", start_one)
    monkeypatch.setattr("vllmlite.engine_process.start.load_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_process(CONFIG)
    assert started[0].process.returncode == -signal.SIGKILL and started[0].connection.fileno() == -1


def test_the_host_ends_when_its_client_ends_while_the_model_loads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    host = EngineProcess(EngineConfig(model=str(tmp_path), device="cpu"))
    with open(
        tmp_path / "config.json", "w"
    ):  # opened as soon as the process reads it, which then waits for the end
        host.connection.close()
        assert host.process.wait(60) == 1


def test_the_host_ends_when_its_client_is_killed() -> None:
    script = (
        "from vllmlite import LLMEngine, EngineConfig\n"
        "from vllmlite.engine_process.start import start_process\n"
        "engine = LLMEngine(EngineConfig(device='cpu', max_model_len=64), start_process)\n"
        "print(engine.engine_core.handle.process.pid, flush=True); input()"
    )
    user = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert user.stdout is not None
    pid = int(user.stdout.readline())
    user.kill()
    user.communicate()
    deadline = time.monotonic() + 60
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether the process runs; a zombie, which may have no parent that waits for it, does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
