"""An interrupted call leaves the engine in the state before the call or in the state after it.

The tests interrupt at a random sample of points, the same in every run; tests marked slow use a larger sample. With
``VLLMLITE_ALL_INTERRUPTS=1`` in the environment, these interrupt at every fifth point and by 200 timer signals, which
takes a quarter of an hour."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
from fake_runner import EOS, VOCAB, FakeRunner, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import Interrupt, interrupt, tries

from vllmlite import LLM, EngineConfig, LLMEngine, SamplingParams
from vllmlite.engine.drafts import DraftPolicy
from vllmlite.engine.engine import Engine
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.scheduler import Limits
from vllmlite.hub import find_model
from vllmlite.outputs import RequestOutput
from vllmlite.runner.startup import Started
from vllmlite.sampling_params import RequestOutputKind
from vllmlite.tokenizers.tokenizer import Tokenizer

ALL_INTERRUPTS = os.environ.get("VLLMLITE_ALL_INTERRUPTS") == "1"


def make_engine(depth: int, num_blocks: int = 24, max_num_seqs: int = 4, drafts: int = 0) -> Engine:
    limits = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=16,
        max_mixed_prefill_tokens=8,
        max_model_len=64,
        block_size=4,
        num_blocks=num_blocks,
    )
    return Engine(
        limits,
        FakeRunner(limits, right=0.8),
        vocab_size=VOCAB,
        eos_ids=[EOS],
        steps_in_flight=depth,
        drafting=DraftPolicy(drafts),
    )


class Record:
    """A grammar that allows every id and is complete after ``length`` ids; the test checks that it is told of
    each id once, in order."""

    def __init__(self, length: int) -> None:
        self.ids: list[int] = []
        self._length = length

    def restart(self) -> None:
        self.ids = []

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        return [None] * (len(drafts) + 1)

    def accept(self, token_id: int) -> bool:
        self.ids.append(token_id)
        return len(self.ids) == self._length

    def fork(self) -> Record:
        return deepcopy(self)


prompts = st.builds(
    lambda common, rest: [7] * common + rest,
    st.integers(0, 16),
    st.lists(st.integers(1, 3), min_size=1, max_size=12),
)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(1, 16), st.booleans()), min_size=1, max_size=6),
    depth=st.integers(1, 3),
    numbers=st.lists(st.integers(1, 600), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
    drafts=st.sampled_from([0, 3]),
)
def test_interrupts_at_any_point_change_no_text(
    requests: list[tuple[list[int], int, bool]], depth: int, numbers: list[int], seed: int, drafts: int
) -> None:
    """Requests are added, run and aborted while calls are interrupted, including the engine's recovery."""
    engine = make_engine(depth, drafts=drafts)
    rng = random.Random(seed)
    outputs: list[EngineOutput] = []
    grammars: dict[str, Record] = {}
    aborted: set[str] = set()
    pending = {str(index): request for index, request in enumerate(requests)}
    left = list(numbers)

    def call(function: Any, *args: Any, **options: Any) -> bool:
        number = left.pop() if left and rng.random() < 0.5 else None
        done = tries(number, lambda: function(*args, **options))
        if done:
            engine.scheduler.check_integrity()
        return done

    for _ in range(2_000):
        if not pending and not engine.has_unfinished_requests():
            break
        name = str(rng.randrange(len(requests)))
        if name in pending:
            prompt, max_tokens, guided = pending[name]
            grammars[name] = Record(max_tokens)
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            options = {"grammar": grammars[name]} if guided else {}
            call(engine.add_request, name, prompt, params, **options)
            if name in engine._unfinished.by_id:
                del pending[name]
        elif rng.random() < 0.05:
            call(engine.finish, name)
            if engine.finish(name):
                aborted.add(name)
        elif rng.random() < 0.05:
            call(engine.reset_prefix_cache)
        call(engine.step, outputs)
    else:
        pytest.fail("starved")
    engine.step(outputs)
    ids: dict[str, list[int]] = {str(index): [] for index in range(len(requests))}
    ended = set()
    for output in outputs:
        assert output.request_id not in ended, "nothing comes after the end"
        ids[output.request_id] += output.new_token_ids
        if output.finish_reason is not None:
            ended.add(output.request_id)
    for index, (prompt, max_tokens, guided) in enumerate(requests):
        name = str(index)
        want = expected(prompt, max_tokens)
        if name in ended:
            assert ids[name] == want
        else:
            assert ids[name] == want[: len(ids[name])], "an aborted request has a beginning of its text"
        if guided and name in ended:
            assert grammars[name].ids == want
    assert engine.scheduler.pool.num_used == 0
    engine.scheduler.check_integrity()
    engine.add_request("again", requests[0][0], SamplingParams(temperature=0, max_tokens=8))
    again = [token_id for _ in range(40) for output in engine.step() for token_id in output.new_token_ids]
    assert again == expected(requests[0][0], 8)


class Fake:
    """LLMEngine on the fake runner, whose ids are in the built-in tokenizer's vocabulary."""

    tokenizer = Tokenizer(find_model(None))

    @classmethod
    def make(cls, depth: int) -> LLMEngine:
        def start(_config: EngineConfig) -> Started[Engine]:
            return Started(make_engine(depth, drafts=3), cls.tokenizer, 8, SamplingParams(), "fake")

        return LLMEngine(EngineConfig(), start)


ASKED: list[tuple[list[int], SamplingParams]] = [
    ([5, 6, 7], SamplingParams(max_tokens=9, n=2, output_kind=RequestOutputKind.DELTA)),
    ([7] * 18, SamplingParams(max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.DELTA)),
    ([7] * 17 + [3], SamplingParams(max_tokens=7, ignore_eos=True)),
    ([9, 8], SamplingParams(max_tokens=20, stop=["3"], output_kind=RequestOutputKind.FINAL_ONLY)),
]


def final(whole: dict[str, RequestOutput]) -> list[Any]:
    return [
        [
            (c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason)
            for c in sorted(o.outputs, key=_index)
        ]
        for _, o in sorted(whole.items())
    ]


def _index(completion: Any) -> int:
    index: int = completion.index
    return index


def put(outputs: Sequence[RequestOutput], whole: dict[str, RequestOutput]) -> None:
    """Join deltas; outputs of other kinds replace the earlier ones."""
    for output in outputs:
        if (
            output.request_id in whole
            and ASKED[int(output.request_id)][1].output_kind is RequestOutputKind.DELTA
        ):
            whole[output.request_id].extend(output)
        else:
            whole[output.request_id] = output


def run_interrupted(depth: int, numbers: Sequence[int | None]) -> tuple[list[Any], list[int]]:
    """Run :data:`ASKED`, interrupting call i at point ``numbers[i]``. Returns the final outputs, and the number of
    points of each call."""
    engine = Fake.make(depth)
    whole: dict[str, RequestOutput] = {}
    counts: list[int] = []
    left = list(numbers)

    def call(function: Any, *args: Any) -> bool:
        try:
            with interrupt(left.pop(0) if left else None) as points:
                outputs = function(*args) or ()
        except Interrupt:
            return False
        finally:
            counts.append(points.count)
        put(outputs, whole)
        return True

    for index, (prompt, params) in enumerate(ASKED):
        if not call(engine.add_request, str(index), prompt, params):
            engine.abort_request(str(index))
            engine.add_request(str(index), prompt, params)
    while engine.has_unfinished_requests():
        call(engine.step)
        assert len(counts) < 500, "starved"
    core = engine.engine
    assert core.scheduler.pool.num_used == 0
    core.scheduler.check_integrity()
    assert not engine._undelivered and not engine._processor._groups and not engine._processor._completions
    return final(whole), counts


@pytest.mark.parametrize("depth", [1, 2])
def test_no_output_is_lost(depth: int) -> None:
    """Interrupts of LLMEngine's calls at random points, output processing included, change no output."""
    want, counts = run_interrupted(depth, [])
    assert sum(len(completion[2]) for output in want for completion in output) > 40
    rng = random.Random(depth)
    for _ in range(200 if ALL_INTERRUPTS else 10):
        numbers = [rng.randint(1, count) if rng.random() < 0.3 else None for count in counts]
        assert run_interrupted(depth, numbers)[0] == want, numbers


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2])
def test_no_output_is_lost_wherever_one_call_is_interrupted(depth: int) -> None:
    want, counts = run_interrupted(depth, [])
    points = [
        (call, number)
        for call, count in enumerate(counts[:14])
        for number in range(1 + call % 5, count + 1, 5)
    ]
    if not ALL_INTERRUPTS:
        points = random.Random(depth).sample(points, 120)
    for call, number in points:
        assert run_interrupted(depth, [None] * call + [number])[0] == want, (call, number)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_abort_drops_a_request_completely_after_an_interrupted_step(kind: RequestOutputKind) -> None:
    """A new request with the same id gets neither ids nor an error of the aborted one."""
    params = SamplingParams(temperature=0, max_tokens=2, output_kind=kind)
    point = 1
    while True:
        engine = Fake.make(1)
        engine.add_request("same", [5, 6, 7], params)
        engine.step()
        if tries(point, engine.step):
            break
        engine.abort_request("same")
        engine.add_request("same", [9, 8], params)
        ids: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                (completion,) = output.outputs
                ids = (
                    [*ids, *completion.token_ids] if kind is RequestOutputKind.DELTA else completion.token_ids
                )
        assert ids == expected([9, 8], 2), point
        assert engine.get_num_unfinished_requests() == 0
        assert engine.engine.scheduler.pool.num_used == 0
        point += 3
    assert point > 100


def test_an_interrupted_add_request_leaves_no_trace() -> None:
    engine = Fake.make(1)
    point = 1
    while not tries(point, engine.add_request, "same", [5, 6, 7], SamplingParams(n=2)):
        engine.abort_request("same")
        assert not any(map(engine._processor.knows, ("same", "0_same", "1_same"))), point
        assert not engine.has_unfinished_requests()
        point += 1
    assert point > 50


def test_abort_drops_the_error_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Fake.make(1)
    engine.add_request("same", [5, 6, 7], SamplingParams())
    with monkeypatch.context() as patched:
        patched.setattr(FakeRunner, "launch", lambda *_: 1 / 0)
        engine.step()
    engine.abort_request("same")
    assert engine.take_error("same") is None


def test_abort_spares_a_request_with_the_id_of_a_finished_sequence() -> None:
    engine = Fake.make(1)
    engine.add_request("a", [9, 8], SamplingParams(temperature=0, max_tokens=20, n=2))
    engine.engine.finish("0_a")  # as if a step had ended it
    engine._processor._completions.pop("0_a")
    engine.add_request("0_a", [5, 6], SamplingParams(temperature=0, max_tokens=4))
    engine.abort_request("a")
    while engine.has_unfinished_requests():
        for output in engine.step():
            ids = output.outputs[0].token_ids
    assert ids == expected([5, 6], 4)


def test_the_tokenizer_passes_on_exceptions_of_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(*_: object) -> None:
        raise TimeoutError("time is up")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        monkeypatch.setattr(Tokenizer, "_encoded", lambda *_: signal.raise_signal(signal.SIGUSR1))
        with pytest.raises(TimeoutError, match="time is up"):
            Fake.tokenizer.encode("a text")
    finally:
        signal.signal(signal.SIGUSR1, before)


PROMPTS = ["The kernel " * 20, "Debian is", "The kernel " * 20 + "and", "A package manager"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class Timer:
    """A timer whose signal handler raises in the main thread, as that of Ctrl-C or of a time limit does."""

    def __enter__(self) -> Timer:
        self._before = signal.signal(signal.SIGALRM, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _raise(self, *_: object) -> None:
        raise Interrupt

    def interrupts(self, seconds: float, call: Callable[[], object]) -> bool:
        """Interrupt ``call`` after ``seconds``; returns False if it ended before."""
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            call()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            return True
        return False


def run_with_timer(times: int, **options: Any) -> None:
    """Interrupt ``generate`` ``times`` times at random; each call after that must return the right text."""
    llm = LLM(dtype="float32", max_model_len=128, device="cpu", **options)
    engine = llm.llm_engine.engine

    def texts() -> list[str]:
        return [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]

    want = texts()
    rng = random.Random(0)
    num_interrupted = attempts = 0
    with Timer() as timer:
        while num_interrupted < times:
            attempts += 1
            assert attempts < 20 * times, "calls end before they are interrupted"
            begin = time.perf_counter()
            assert texts() == want
            whole = time.perf_counter() - begin
            engine.scheduler.check_integrity()
            assert engine.scheduler.pool.num_used == 0
            assert not llm.llm_engine.has_unfinished_requests()
            num_interrupted += timer.interrupts(rng.random() * whole, texts)
            if rng.random() < 0.3:  # while the engine cleans up after the first
                num_interrupted += timer.interrupts(rng.random() * whole / 20, texts)
        assert texts() == want


@pytest.mark.parametrize("two_steps", [False, True], ids=["depth 1", "depth 2"])
def test_timer_signals_change_no_text(two_steps: bool) -> None:
    run_with_timer(4, async_scheduling=two_steps)


@pytest.mark.slow
@pytest.mark.parametrize("two_steps", [False, True], ids=["depth 1", "depth 2"])
def test_many_timer_signals_change_no_text(two_steps: bool) -> None:
    run_with_timer(200 if ALL_INTERRUPTS else 25, async_scheduling=two_steps)
