"""Sleep mode on the fake runner: no request is lost, and no block is read that was lost."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from engine_runs import assert_idle, make_engine, run
from fake_disk import FakeDisk
from fake_runner import FakeRunner, expected

from vllmlite.engine.engine import Engine
from vllmlite.engine.sleeping import SleepMode
from vllmlite.errors import BackendError, EngineSleepingError, ParameterError
from vllmlite.sampling_params import SamplingParams

PROMPT = list(range(1, 34))
"""Eight blocks of four tokens, and one token."""


class FakeMemory:
    """The memory of a fake runner, whose cache is lost; at level 2 also what is in host memory."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.failures = 0
        self.levels: list[int] = []

    def release(self, level: int) -> None:
        self.runner.cache[:] = [-3] * len(self.runner.cache)
        if level == 2:
            self.runner.host.clear()
        self.levels.append(level)

    def restore(self) -> FakeRunner:
        if self.failures:
            self.failures -= 1
            raise BackendError("the memory is in use")
        return self.runner


def sleeper(**options: object) -> tuple[Engine, FakeMemory]:
    engine, runner = make_engine(16, 4, **options)  # type: ignore[arg-type]
    memory = FakeMemory(runner)
    engine.sleep_mode = SleepMode(memory)
    return engine, memory


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def cached_tokens(engine: Engine) -> int:
    request = engine.add_request("again", PROMPT, greedy(1))
    assert run(engine)["again"][0] == expected(PROMPT, 1, eos=())
    assert request.num_cached_tokens is not None
    return request.num_cached_tokens


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("places", [0, 12])
@pytest.mark.parametrize("depth", [1, 2])
def test_requests_go_on_after_the_engine_slept(depth: int, places: int, level: int) -> None:
    draw = Random(depth + places + level)
    engine, _ = sleeper(depth=depth, places=places, drafts=2, max_num_seqs=4)
    wanted = {}
    for number in range(12):
        prompt = [draw.randrange(1, 97) for _ in range(draw.randrange(1, 30))]
        wanted[str(number)] = expected(prompt, 20, eos=())
        engine.add_request(str(number), prompt, greedy(20))
    found: dict[str, list[int]] = {name: [] for name in wanted}
    while engine.can_step():
        for output in engine.step():
            found[output.request_id] += output.new_token_ids
        engine.scheduler.check_integrity()
        if draw.random() < 0.1:
            engine.sleep(level)
            assert not engine.can_step() and engine.has_unfinished_requests()
            engine.scheduler.check_integrity()
            engine.wake_up()
    assert found == wanted
    assert_idle(engine)


def test_nothing_runs_while_the_engine_sleeps() -> None:
    engine, _ = sleeper()
    engine.add_request("kept", PROMPT, greedy(4))
    engine.step()
    engine.sleep()
    assert engine.is_sleeping() and engine.current_stats().sleep_level == 1
    for call in (engine.step, lambda: engine.add_request("new", PROMPT, greedy(4))):
        with pytest.raises(EngineSleepingError, match="wake_up"):
            call()
    engine.wake_up()
    assert not engine.is_sleeping() and engine.current_stats().sleep_level == 0
    assert run(engine)["kept"][1] == "length"


def test_an_aborted_request_does_not_come_back() -> None:
    engine, _ = sleeper(depth=2)
    engine.add_request("gone", PROMPT, greedy(4))
    engine.step()
    engine.sleep()
    assert engine.finish("gone")
    engine.wake_up()
    assert_idle(engine)


@pytest.mark.parametrize(("level", "cached"), [(1, 32), (2, 0)])
def test_host_memory_keeps_the_prefix_cache_at_level_1(level: int, cached: int) -> None:
    engine, _ = sleeper(places=32)
    assert cached_tokens(engine) == 0
    engine.sleep(level)
    engine.wake_up()
    assert cached_tokens(engine) == cached
    engine.scheduler.check_integrity()


def test_a_disk_keeps_the_prefix_cache_at_level_2() -> None:
    disk = FakeDisk()
    engine, _ = sleeper(places=64, disk=disk)
    cached_tokens(engine)
    engine.sleep(2)
    assert len(disk.blocks) == 8
    engine.wake_up()
    assert engine.scheduler.tiers is not None
    engine.scheduler.tiers.cost.token_seconds = None  # the fake runner is faster than any disk
    assert cached_tokens(engine) == 32


def test_the_prefix_cache_is_lost_without_tiers() -> None:
    engine, _ = sleeper()
    cached_tokens(engine)
    assert cached_tokens(engine) == 32
    engine.sleep()
    engine.wake_up()
    assert cached_tokens(engine) == 0


def test_an_engine_wakes_up_once_all_tags_were_given() -> None:
    engine, memory = sleeper()
    engine.wake_up()
    engine.sleep(1)
    engine.wake_up(["weights"])
    assert engine.is_sleeping()
    engine.sleep(1)
    assert memory.levels == [1]
    engine.sleep(2)
    assert memory.levels == [1, 2] and engine.current_stats().sleep_level == 2
    engine.wake_up(["kv_cache"])
    assert engine.is_sleeping()
    engine.wake_up(["weights"])
    assert not engine.is_sleeping()


def test_an_engine_that_cannot_wake_up_sleeps_on() -> None:
    engine, memory = sleeper()
    engine.sleep(2)
    memory.failures = 1
    with pytest.raises(BackendError, match="in use"):
        engine.wake_up()
    assert engine.is_sleeping()
    engine.wake_up()
    assert cached_tokens(engine) == 0


def test_an_engine_that_cannot_sleep_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, memory = sleeper()

    def refuse(level: int) -> None:
        raise BackendError("cannot")

    monkeypatch.setattr(memory, "release", refuse)
    engine.add_request("kept", PROMPT, greedy(4))
    [output] = engine.step()
    with pytest.raises(BackendError, match="cannot"):
        engine.sleep()
    assert output.new_token_ids + run(engine)["kept"][0] == expected(PROMPT, 4, eos=())


def test_wrong_values_are_refused() -> None:
    engine, memory = sleeper()
    for level in (0, 3, "1", True, None):
        with pytest.raises(ParameterError, match="level"):
            engine.sleep(level)  # type: ignore[arg-type]
    wrong: list[Any] = [["other"], "weights", [3]]
    for tags in wrong:
        with pytest.raises(ParameterError, match="tags"):
            engine.wake_up(tags)
    assert not memory.levels
    plain, _ = make_engine()
    for call in (plain.sleep, plain.wake_up):
        with pytest.raises(ParameterError, match="enable_sleep_mode"):
            call()
