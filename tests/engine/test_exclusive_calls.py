"""Calls from several threads, a forked process or a signal handler: each waits for its turn, or is refused with the
reason."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from vllmlite import LLM, AsyncLLM, EngineConfig, SamplingParams
from vllmlite.errors import EngineUseError
from vllmlite.outputs import RequestOutput
from vllmlite.sampling_params import RequestOutputKind

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = ["Debian is", "The kernel", "A package manager", "To install"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", max_model_len=128, device="cpu")


@pytest.fixture(scope="module")
def want(llm: LLM) -> dict[str, str]:
    return {prompt: text(llm, prompt) for prompt in PROMPTS}


def text(llm: LLM, prompt: str) -> str:
    return llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text


def in_threads(work: Callable[[int], None], count: int = 4) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` in threads; raise an exception that one of them raised."""
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


def test_threads_take_turns_in_one_llm(llm: LLM, want: dict[str, str]) -> None:
    def work(index: int) -> None:
        for turn in range(3):
            prompts = [PROMPTS[(index + turn + i) % 4] for i in range(2)]
            outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert [output.outputs[0].text for output in outputs] == [want[prompt] for prompt in prompts]

    in_threads(work)
    assert llm.llm_engine.stats().num_used_blocks == 0


def test_threads_take_turns_in_one_engine(llm: LLM, want: dict[str, str]) -> None:
    """The thread that calls step gets the outputs; none is lost, and none comes twice."""
    engine = llm.llm_engine
    deltas: list[RequestOutput] = []

    def work(index: int) -> None:
        params = GREEDY.clone(output_kind=RequestOutputKind.DELTA)
        engine.add_request(f"thread {index}", PROMPTS[index], params)
        while engine.has_unfinished_requests():
            deltas.extend(engine.step())

    in_threads(work)
    assert len(deltas) == 4 * 16
    for index, prompt in enumerate(PROMPTS):
        own = [output for output in deltas if output.request_id == f"thread {index}"]
        own.sort(key=lambda output: output.metrics.num_generation_tokens if output.metrics else 0)
        assert sorted(output.outputs[0].text for output in own) == sorted(_pieces(llm, want[prompt]))


def _pieces(llm: LLM, whole: str) -> list[str]:
    tokenizer = llm.get_tokenizer()
    return [tokenizer.decode([token_id]) for token_id in tokenizer.encode(whole, add_special_tokens=False)]


@contextmanager
def alarm(handler: Callable[[], None]) -> Iterator[None]:
    """Have ``handler`` called in the main thread every few milliseconds."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_thread_goes_on_while_another_is_interrupted(llm: LLM, want: dict[str, str]) -> None:
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.extend(text(llm, prompt) for prompt in PROMPTS * 3), daemon=True
    )

    def interrupt() -> None:
        raise InterruptedError

    thread.start()
    interrupted = 0
    while thread.is_alive():
        try:
            with alarm(interrupt):
                text(llm, PROMPTS[0])
        except InterruptedError:
            interrupted += 1
    thread.join(60)
    assert found == [want[prompt] for prompt in PROMPTS * 3]
    assert text(llm, PROMPTS[0]) == want[PROMPTS[0]]
    assert interrupted > 0
    assert llm.llm_engine.stats().num_used_blocks == 0


@pytest.mark.parametrize("kind", ["function", "method", "partial", "object"])
def test_an_exception_of_a_signal_handler_is_not_a_failed_step(
    llm: LLM, want: dict[str, str], kind: str
) -> None:
    class Handler:
        def raises(self, *_: object) -> None:
            raise TimeoutError("too late")

        def __call__(self, *_: object) -> None:
            self.raises()

    def function(*_: object) -> None:
        raise TimeoutError("too late")

    handlers: dict[str, Callable[..., None]] = {
        "function": function, "method": Handler().raises, "partial": partial(function, 1), "object": Handler()
    }  # fmt: skip
    before = signal.signal(signal.SIGALRM, handlers[kind])
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.003)
        with pytest.raises(TimeoutError, match="too late"):
            for _ in range(50):
                text(llm, PROMPTS[0])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert text(llm, PROMPTS[0]) == want[PROMPTS[0]]


def test_a_handler_cannot_generate_in_the_middle_of_generate(llm: LLM, want: dict[str, str]) -> None:
    errors: list[Exception] = []

    def generate() -> None:
        try:
            text(llm, PROMPTS[1])
        except EngineUseError as error:
            errors.append(error)

    with alarm(generate):
        for _ in range(50):
            assert text(llm, PROMPTS[0]) == want[PROMPTS[0]]
            if errors:
                break
    assert "signal handler or callback" in str(errors[0])


def test_a_handler_may_abort(llm: LLM) -> None:
    engine = llm.llm_engine
    endless = SamplingParams(max_tokens=100, ignore_eos=True)
    engine.add_request("endless", "Debian is", endless)
    engine.observer = lambda _given: engine.abort_request("endless")
    try:
        engine.step()
        engine.step()
    finally:
        engine.observer = None
    assert not engine.has_unfinished_requests()
    assert engine.stats().num_used_blocks == 0


def use_in_child(llm: LLM, asynchronous: AsyncLLM, results: multiprocessing.SimpleQueue[str]) -> None:
    async def stats() -> None:
        await asynchronous.stats()

    uses: list[Callable[[], object]] = [
        lambda: llm.generate(PROMPTS[0], GREEDY),
        lambda: llm.embed(PROMPTS[0]),
        lambda: llm.llm_engine.step(),
        lambda: llm.llm_engine.add_request("x", "y", GREEDY),
        lambda: asyncio.run(stats()),
    ]
    for use in uses:
        try:
            use()
            results.put("no error")
        except Exception as error:
            results.put(f"{type(error).__name__}: {error}")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_engine_of_the_parent_is_refused_in_a_forked_child(llm: LLM, want: dict[str, str]) -> None:
    context = multiprocessing.get_context("fork")
    asynchronous = AsyncLLM(EngineConfig(dtype="float32", max_model_len=128, device="cpu"))
    try:
        results = context.SimpleQueue()
        child = context.Process(target=use_in_child, args=(llm, asynchronous, results))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        for _ in range(5):
            found = results.get()
            assert found.startswith("EngineUseError: ") and "in the child" in found and "spawn" in found
        assert text(llm, PROMPTS[0]) == want[PROMPTS[0]]
    finally:
        asynchronous.shutdown()


def test_a_thread_waiting_for_its_turn_can_be_interrupted(llm: LLM) -> None:
    """A thread that waits for its turn can be interrupted; the thread whose turn it is goes on."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with llm.turns.lock:
            held.set()
            release.wait(600)

    def give_up() -> None:
        raise InterruptedError

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    held.wait(60)
    with pytest.raises(InterruptedError), alarm(give_up):
        text(llm, PROMPTS[0])
    assert thread.is_alive(), "it was interrupted while the other thread had the turn"
    release.set()
    thread.join(60)
    assert text(llm, PROMPTS[0])
