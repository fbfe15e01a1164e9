"""Which adapters are on the device when, and which requests wait: the engine's policy, without a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from random import Random
from typing import Any

import pytest
from engine_runs import assert_idle, run
from fake_runner import EOS, VOCAB, FakeRunner, expected

from vllmlite.engine.engine import ADAPTER_BYTES, Engine
from vllmlite.engine.engine_output import EngineOutput
from vllmlite.engine.request import AdapterKey
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.scheduler import Limits
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.lora.request import LoRARequest
from vllmlite.lora.store import AdapterStore
from vllmlite.sampling_params import SamplingParams
from vllmlite.weights.adapter import Adapter

PARTS = 3
"""Parts in which an adapter is put on the device, each of which takes a step while requests run."""


class Source:
    """Adapters that are numbers; reading one takes ``delay`` calls, and fails for those that are ``broken``."""

    def __init__(self, delay: int = 0, broken: tuple[int, ...] = ()) -> None:
        self.delay, self.broken = delay, broken
        self.calls: dict[int, int] = {}

    def knows(self, source: int) -> bool:
        return True

    def identify(self, source: int) -> AdapterKey:
        return AdapterKey(f"adapter {source}", source, f"digest of {source}")

    def take(self, key: AdapterKey, timeout: float) -> Any:
        source = key.source
        assert isinstance(source, int)
        if source in self.broken:
            raise ModelError(f"adapter {source} is broken")
        self.calls[source] = self.calls.get(source, 0) + 1
        return None if self.calls[source] % (self.delay + 1) else source

    def forget(self, source: int) -> bool:
        return True


class AdapterRunner(FakeRunner):
    """A fake runner that checks that the first id of each sequence is the number of its adapter, 0 for none."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.adapters: dict[int, int | None] = {}
        self.slots: dict[int, int] = {}
        """Slot → index of the adapter."""
        self.in_flight: list[Schedule] = []
        self.loads: list[int] = []
        self.refused: tuple[int, ...] = ()

    def load_adapter_parts(self, index: int, adapter: int) -> Iterator[int]:
        assert all(self.slots[slot] != index for step in self.in_flight for slot in step.slots)
        self.adapters[index] = None
        for _ in range(PARTS):
            yield ADAPTER_BYTES
        if adapter in self.refused:
            raise BackendError("no memory for the adapter")
        self.adapters[index] = adapter
        self.loads.append(adapter)

    def launch(self, schedule: Schedule) -> StepResult:
        for admission in schedule.admissions:
            self.slots[admission.slot] = admission.adapter
            number = admission.token_ids[0]
            assert (self.adapters[admission.adapter] if admission.adapter else 0) == number
        self.in_flight.append(schedule)
        return super().launch(schedule)

    def collect(self, handle: StepResult) -> StepResult:
        self.in_flight.pop(0)
        return super().collect(handle)


def make(
    max_adapters: int, source: Source | None = None, depth: int = 1, **limits: Any
) -> tuple[Engine, AdapterRunner]:
    sizes = {"max_num_seqs": 4, "num_blocks": 64} | limits
    found = Limits(
        max_num_batched_tokens=64, max_mixed_prefill_tokens=64, max_model_len=100, block_size=4,
        max_adapters=max_adapters, **sizes,
    )  # fmt: skip
    runner = AdapterRunner(found)
    engine = Engine(
        found, runner, vocab_size=VOCAB, eos_ids=[EOS], steps_in_flight=depth, adapters=source or Source()
    )
    return engine, runner


def add(engine: Engine, name: str, adapter: int, max_tokens: int = 8, **options: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(name, [adapter, 5, 6], params, adapter=adapter or None, **options)


def steps(engine: Engine, count: int) -> list[EngineOutput]:
    return [output for _ in range(count) for output in engine.step()]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_runs_with_its_adapter(depth: int, seed: int) -> None:
    """Few slots and blocks, adapters that take time to read, and requests that come and go at random."""
    draw = Random(seed)
    engine, _ = make(2, Source(delay=2), depth, num_blocks=26)
    wanted: dict[str, list[int]] = {}
    done: dict[str, list[int]] = {}
    for number in range(60):
        name, adapter, length = str(number), draw.choice([0, 1, 1, 2, 3, 4]), draw.randint(1, 30)
        add(engine, name, adapter, length)
        wanted[name] = expected([adapter, 5, 6], length, eos=())
        for output in steps(engine, draw.randint(0, 6)):
            done.setdefault(output.request_id, []).extend(output.new_token_ids)
        engine.scheduler.check_integrity()
        if draw.random() < 0.1 and engine.finish(gone := str(draw.randint(0, number))):
            wanted.pop(gone)
    for name, (ids, _) in run(engine).items():
        done.setdefault(name, []).extend(ids)
    assert {name: done[name] for name in wanted} == wanted
    assert_idle(engine)


def test_requests_behind_one_that_waits_for_its_adapter_run() -> None:
    engine, _ = make(1, Source(delay=5))
    add(engine, "slow", 1)
    add(engine, "base", 0)
    assert {output.request_id for output in steps(engine, 4)} == {"base"}
    assert run(engine).keys() >= {"slow"}


def test_a_request_is_not_overtaken_for_ever() -> None:
    """One slot, whose adapter always has users and further requests: another adapter's request gets it next."""
    engine, runner = make(1)
    add(engine, "first", 1, 20)
    steps(engine, 2)
    add(engine, "other", 2, 4)
    finished: list[str] = []
    for number in range(60):
        add(engine, f"later {number}", 1, 20)
        finished += [output.request_id for output in steps(engine, 2) if output.finish_reason]
        engine.scheduler.check_integrity()
        if "other" in finished:
            break
    assert finished[-1] == "other"
    assert len(finished) <= 3, "only requests of the step before were admitted before it"
    assert runner.loads[:2] == [1, 2]


def test_the_adapter_that_was_used_longest_ago_is_replaced() -> None:
    engine, runner = make(2)
    for adapter in (1, 2, 1, 3, 1, 2):
        add(engine, "x", adapter, 2)
        run(engine)
    assert runner.loads == [1, 2, 3, 2]


def test_loading_takes_turns_with_steps() -> None:
    """While requests run, a step puts one part of an adapter on the device, and every request gets its tokens."""
    engine, runner = make(1)
    add(engine, "base", 0, 20)
    steps(engine, 1)
    add(engine, "adapted", 1, 2)
    for _ in range(PARTS):
        assert [output.request_id for output in engine.step()] == ["base"]
    assert not runner.loads
    assert {output.request_id for output in steps(engine, 3)} == {"base", "adapted"}
    run(engine)


def test_a_bad_adapter_ends_its_own_requests_only() -> None:
    engine, runner = make(1, Source(broken=(2,)))
    runner.refused = (3,)
    for number, adapter in enumerate((0, 1, 2, 3, 2, 1)):
        add(engine, f"{number}", adapter)
    found = run(engine)
    assert {name for name, (_, reason) in found.items() if reason == "error"} == {"2", "3", "4"}
    assert all(len(found[name][0]) == 8 for name in ("0", "1", "5"))
    assert engine.stats.num_failed_steps == 0
    assert_idle(engine)


def test_aborted_requests_do_not_keep_a_slot() -> None:
    engine, runner = make(1, Source(delay=3))
    add(engine, "running", 1, 50)
    steps(engine, 8)
    add(engine, "waiting", 2)
    steps(engine, 2)
    engine.finish("waiting")
    add(engine, "also", 1, 3)
    assert "also" in {output.request_id for output in steps(engine, 3)}
    engine.finish("running")
    add(engine, "third", 3, 3)
    assert run(engine)["third"][1] == "length"
    assert runner.loads == [1, 3]


def test_prefixes_are_shared_among_requests_with_equal_adapters_only() -> None:
    engine, _ = make(2)
    prompt = [1, *range(10, 22)]
    params = SamplingParams(temperature=0, max_tokens=2)
    for name, adapter in (("a", 1), ("b", 1)):
        engine.add_request(name, prompt, params, adapter=adapter)
        run(engine)
    assert engine.scheduler.prefix_hits == 12
    engine.add_request("c", [2, *prompt[1:]], params, adapter=2)
    run(engine)
    assert engine.scheduler.prefix_hits == 12


def test_an_interrupted_load_starts_again() -> None:
    engine, runner = make(1)
    add(engine, "base", 0, 30)
    steps(engine, 1)
    add(engine, "adapted", 1, 2)
    steps(engine, 2)
    engine._changing = True  # as an exception of a signal handler leaves it
    assert run(engine)["adapted"][1] == "length"
    assert runner.loads == [1]
    assert_idle(engine)


def test_without_slots_no_request_can_have_an_adapter() -> None:
    engine = Engine(make(0)[0].scheduler.limits, FakeRunner(make(0)[0].scheduler.limits), vocab_size=VOCAB)
    with pytest.raises(ParameterError, match="enable_lora"):
        add(engine, "x", 1)
    assert not engine.has_unfinished_requests()


def test_an_adapter_that_is_forgotten_while_it_is_read_is_read_again() -> None:
    """Its files may have been replaced since; requests after that must not get the old contents."""
    gates = {name: threading.Event() for name in ("old", "new")}
    begun: SimpleQueue[str] = SimpleQueue()
    contents = iter(gates)

    class Reader:
        def read(self, *_: object) -> Adapter:
            name = next(contents)
            begun.put(name)
            assert gates[name].wait(60)
            return Adapter(name, {})

    store = AdapterStore(Reader(), 2, 100)  # type: ignore[arg-type]
    source = LoRARequest("mine", 1, "somewhere")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.identify, source)
        assert begun.get(timeout=20) == "old"
        store.forget(source)
        second = pool.submit(store.identify, source)
        gates["old"].set()
        assert first.result().digest == "old"
        assert begun.get(timeout=20) == "new"
        assert not store.knows(source)
        gates["new"].set()
        assert second.result().digest == "new"
    assert store.identify(source).digest == "new"
