"""Engine policy on the fake runner: the output of a request does not depend on what else is scheduled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import pytest
from engine_runs import assert_idle, engine_options, make_engine, run
from fake_disk import FakeDisk
from fake_runner import EOS, VOCAB, FakeRunner, expected
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmlite.config.engine_config import PREEMPTION_MODES
from vllmlite.engine.engine import Engine
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.errors import ParameterError
from vllmlite.sampling_params import SamplingParams


@dataclass
class Arrival:
    step: int
    prompt: list[int]
    max_tokens: int
    min_tokens: int
    priority: int
    abort_after: int | None


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 20),
    # few distinct ids and a common start, so that prefixes are shared
    prompt=st.builds(
        lambda common, rest: [7] * common + rest,
        st.integers(0, 20),
        st.lists(st.integers(1, 3), min_size=1, max_size=20),
    ),
    max_tokens=st.integers(1, 24),
    min_tokens=st.integers(0, 4),
    priority=st.integers(-1, 1),
    abort_after=st.none() | st.integers(0, 10),
)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(arrivals, min_size=1, max_size=14),
    spare_blocks=st.integers(0, 20),
    options=engine_options(
        block_size=st.sampled_from([1, 2, 4, 16]),
        drafts=st.sampled_from([0, 1, 4]),
        right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        places=st.sampled_from([0, 0, 1, 4, 40]),
        preemption_mode=st.sampled_from(PREEMPTION_MODES),
        disk=st.none() | st.builds(FakeDisk, st.integers(0, 9), st.sampled_from([0.0, 0.3])),
    ),
)
def test_outputs_do_not_depend_on_other_requests(
    requests: list[Arrival], spare_blocks: int, options: dict[str, Any]
) -> None:
    max_model_len = 65
    num_blocks = -(-max_model_len // options["block_size"]) + spare_blocks
    engine, _ = make_engine(num_blocks, max_model_len=max_model_len, **options)
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(requests))}
    finished: dict[str, str | None] = {}
    pending = {str(i): arrival for i, arrival in enumerate(requests)}
    born: dict[str, int] = {}
    step = 0
    while pending or engine.has_unfinished_requests():
        for name in [n for n, a in pending.items() if a.step <= step]:
            arrival = pending.pop(name)
            params = SamplingParams(
                temperature=0,
                max_tokens=arrival.max_tokens,
                min_tokens=min(arrival.min_tokens, arrival.max_tokens),
            )
            engine.add_request(name, arrival.prompt, params, priority=arrival.priority)
            born[name] = step
        for name, at in born.items():
            abort_after = requests[int(name)].abort_after
            if abort_after is not None and step == at + abort_after and engine.finish(name):
                finished[name] = "abort"
        for output in engine.step():
            assert output.request_id not in finished, "nothing comes after the end"
            outputs[output.request_id] += output.new_token_ids
            if output.finish_reason:
                finished[output.request_id] = output.finish_reason
        engine.scheduler.check_integrity()
        step += 1
        assert step < 5_000, "starved"
    for index, arrival in enumerate(requests):
        name = str(index)
        want = expected(
            arrival.prompt, arrival.max_tokens, min_tokens=min(arrival.min_tokens, arrival.max_tokens)
        )
        got = outputs[name]
        if finished[name] == "abort":
            assert got == want[: len(got)]
        else:
            assert got == want
            assert finished[name] == ("stop" if want[-1] == EOS else "length")
    assert_idle(engine)


def test_first_come_first_served_under_preemption() -> None:
    """If the pool has blocks for little more than one sequence, the oldest request is never preempted."""
    engine, _ = make_engine(num_blocks=10, block_size=4, max_model_len=40, caching=False)
    for name in "abcd":
        engine.add_request(name, [1, 2, 3], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    order = []
    while engine.has_unfinished_requests():
        order += [o.request_id for o in engine.step() if o.finish_reason]
        engine.scheduler.check_integrity()
    assert order == ["a", "b", "c", "d"]
    assert engine.current_stats().num_preemptions > 0


def test_requests_of_higher_priority_run_first_and_are_not_preempted() -> None:
    engine, _ = make_engine(num_blocks=10, block_size=4, max_model_len=40, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine.add_request("first", [1], params, priority=5)
    engine.add_request("late but urgent", [2], params, priority=-1)
    order = []
    while engine.has_unfinished_requests():
        order += [o.request_id for o in engine.step() if o.finish_reason]
    assert order == ["late but urgent", "first"]


@pytest.mark.parametrize("depth", [1, 2])
def test_long_prompts_are_computed_in_chunks_while_others_decode(depth: int) -> None:
    engine, runner = make_engine(num_blocks=200, budget=64, mixed=10, depth=depth)
    sizes: list[tuple[int, ...]] = []
    launch = runner.launch

    def noted(schedule: Schedule) -> StepResult:
        sizes.append(tuple(sorted(schedule.counts)))
        return launch(schedule)

    runner.launch = noted  # type: ignore[method-assign]
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    engine.add_request("text", [5] * 64, greedy)
    engine.step()
    assert sizes[0] == (64,), "nothing to hold up"
    engine.add_request("prompt", [6] * 64, greedy)
    engine.add_request("other", [7] * 11, greedy)
    done = run(engine)
    mixed = [counts for counts in sizes if max(counts) > 1][1:]
    assert mixed == [*[(1, 10)] * 6, (1, 4, 6), (1, 1, 5)]
    assert {name: ids for name, (ids, _) in done.items()} == {
        "text": expected([5] * 64, 40, eos=())[1:],
        "prompt": expected([6] * 64, 40, eos=()),
        "other": expected([7] * 11, 40, eos=()),
    }


def test_a_request_whose_last_token_is_in_flight_finishes_in_the_next_step() -> None:
    engine, runner = make_engine(num_blocks=200, budget=64, mixed=10, depth=2)
    for name in "ab":
        engine.add_request(name, [ord(name) % VOCAB] * 64, SamplingParams(temperature=0, max_tokens=1))
    run(engine)
    assert runner.steps == 2


def test_prefix_is_computed_once() -> None:
    engine, runner = make_engine(num_blocks=64, block_size=4)
    prompt = list(range(1, 34))
    engine.add_request("cold", prompt, SamplingParams(temperature=0, max_tokens=1))
    run(engine)
    cold = runner.tokens_run
    request = engine.add_request("warm", prompt, SamplingParams(temperature=0, max_tokens=1))
    run(engine)
    assert cold == len(prompt)
    assert runner.tokens_run - cold == 1  # 32 tokens in 8 full blocks are cached
    assert request.num_cached_tokens == 32
    assert engine.current_stats().prefix_cache_hits == 32


def test_the_last_token_of_a_fully_cached_prompt_is_computed() -> None:
    engine, _ = make_engine(num_blocks=64, block_size=4)
    prompt = list(range(1, 33))
    for name in ("cold", "warm"):
        request = engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=1))
        run(engine)
    assert request.num_cached_tokens == 28


def test_requests_with_different_salts_share_no_blocks() -> None:
    engine, _ = make_engine()
    prompt = list(range(1, 34))
    found = []
    for name, salt in (("a", "alice"), ("b", "bob"), ("c", "alice"), ("d", None)):
        request = engine.add_request(
            name, prompt, SamplingParams(temperature=0, max_tokens=1), cache_salt=salt
        )
        run(engine)
        found.append(request.num_cached_tokens)
    assert found == [0, 0, 32, 0]


def test_block_hashes_depend_on_the_format_of_the_cache() -> None:
    limits = make_engine()[0].scheduler.limits
    roots = {
        Engine(limits, FakeRunner(limits), vocab_size=VOCAB, cache_format=form)
        .add_request("a", [1, 2, 3], SamplingParams())
        .root
        for form in ("fp8_e4m3 ((1.0, 1.0),)", "fp8_e4m3 ((0.5, 1.0),)", "int8 ()")
    }
    assert len(roots) == 3


def test_blocks_of_generated_tokens_are_cached() -> None:
    engine, _ = make_engine(num_blocks=64, block_size=4)
    prompt = list(range(1, 10))
    engine.add_request("turn 1", prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    answer = run(engine)["turn 1"][0]
    request = engine.add_request(
        "turn 2", prompt + answer + [5, 6], SamplingParams(temperature=0, max_tokens=1)
    )
    run(engine)
    assert request.num_cached_tokens == 28  # 29 tokens, of which the last answer id's block is not full


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    engine, _ = make_engine(num_blocks=16, block_size=4, max_model_len=33)
    one = SamplingParams(temperature=0, max_tokens=1)
    for name, first in (("a", 1), ("b", 2), ("a again", 1), ("c", 3)):
        engine.add_request(name, [first] * 25, one)
        run(engine)
    again = engine.add_request("a once more", [1] * 25, one)
    run(engine)
    assert again.num_cached_tokens == 24
    lost = engine.add_request("b once more", [2] * 25, one)
    run(engine)
    assert (lost.num_cached_tokens or 0) < 24


def test_less_than_4_percent_of_the_pool_is_wasted() -> None:
    """Only the last block of a sequence is partly filled: under 4 % of the slots at the lengths of the nano workload
    (100 to 1024 tokens in and out)."""
    rng = random.Random(0)
    engine, _ = make_engine(
        num_blocks=40_000, block_size=16, max_num_seqs=256, budget=2**20, max_model_len=2048
    )
    total = 0
    for index in range(256):
        length = rng.randint(100, 1024)
        total += length
        engine.add_request(
            str(index), [index % 89 + 1] * length, SamplingParams(temperature=0, max_tokens=1024)
        )
    engine.step()
    held = engine.scheduler.pool.num_used * 16
    assert 1 - (total + len(engine.scheduler.running)) / held < 0.04


@pytest.mark.parametrize("depth", [1, 2])
def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(depth: int) -> None:
    engine, _ = make_engine(depth=depth, fail_at=3, max_num_seqs=2)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for name in "abc":
        engine.add_request(name, [1, 2, 3, 4, 5], params)
    done = run(engine)
    assert done["a"][1] == done["b"][1] == "error"
    assert done["c"] == (expected([1, 2, 3, 4, 5], 8, eos=()), "length")
    assert_idle(engine)


class Broken:
    """A grammar that raises at its third id."""

    def __init__(self) -> None:
        self.num_ids = 0

    def restart(self) -> None:
        self.num_ids = 0

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        return [None] * (len(drafts) + 1)

    def accept(self, _token_id: int) -> bool:
        self.num_ids += 1
        if self.num_ids == 3:
            raise RuntimeError("broken")
        return False

    def fork(self) -> Broken:
        return copy(self)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_failing_grammar_does_not_end_requests_that_have_their_output_of_the_step(depth: int) -> None:
    """A request gets one output from a step, either an id or an error."""
    engine, _ = make_engine(depth=depth)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = {"before": [1, 2, 3], "broken": [4, 5], "after": [6, 7, 8]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params, grammar=Broken() if name == "broken" else None)
    ids: dict[str, list[int]] = {name: [] for name in prompts}
    reasons = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            ids[output.request_id] += output.new_token_ids
            reasons[output.request_id] = output.finish_reason
        engine.scheduler.check_integrity()
    assert reasons == {"before": "length", "broken": "error", "after": "error"}
    assert ids["before"] == expected(prompts["before"], 8, eos=())
    assert ids["broken"] == expected(prompts["broken"], 2, eos=())
    assert_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], {}, "prompt"),
        ([1] * 40, {}, "prompt"),
        ([VOCAB], {}, "prompt_token_ids"),
        ([-1], {}, "prompt_token_ids"),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ([1], {"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids"),
    ],
)
def test_an_impossible_request_is_refused_and_the_next_one_served(
    prompt: list[int], params: dict[str, object], field: str
) -> None:
    engine, _ = make_engine(num_blocks=10, block_size=4, max_model_len=40)
    with pytest.raises(ParameterError) as error:
        engine.add_request("bad", prompt, SamplingParams(temperature=0, **params))  # type: ignore[arg-type]
    assert error.value.field == field
    engine.add_request("good", [1, 2], SamplingParams(temperature=0, max_tokens=4))
    assert run(engine)["good"][0] == expected([1, 2], 4)
    assert_idle(engine)


def test_the_id_of_a_running_request_is_refused_and_that_of_a_finished_one_accepted() -> None:
    engine, _ = make_engine()
    engine.add_request("x", [1], SamplingParams(temperature=0, max_tokens=2))
    with pytest.raises(ParameterError, match="in use"):
        engine.add_request("x", [1], SamplingParams())
    run(engine)
    engine.add_request("x", [1], SamplingParams(temperature=0, max_tokens=2))
    run(engine)


def test_a_request_without_max_tokens_ends_when_the_context_is_full() -> None:
    engine, _ = make_engine(num_blocks=10, block_size=4, max_model_len=40)
    engine.add_request("x", [1] * 30, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    ids, reason = run(engine)["x"]
    assert (len(ids), reason) == (10, "length")


def test_prompt_truncation_keeps_the_end() -> None:
    engine, _ = make_engine(num_blocks=10, block_size=4, max_model_len=40)
    prompt = [i % 90 + 1 for i in range(100)]
    cut = engine.add_request("cut", prompt, SamplingParams(temperature=0, truncate_prompt_tokens=5))
    assert cut.prompt_token_ids == prompt[-5:]
    fit = engine.add_request(
        "fit", prompt, SamplingParams(temperature=0, truncate_prompt_tokens=-1, max_tokens=8)
    )
    assert fit.prompt_token_ids == prompt[-32:]
    run(engine)


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_token_reason(depth: int) -> None:
    engine, _ = make_engine(depth=depth)
    want = expected([1, 2, 3], 8, eos=())
    stop = want[4]
    engine.add_request("x", [1, 2, 3], SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[stop]))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [o.new_token_ids[0] for o in outputs] == want[: want.index(stop) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
    assert_idle(engine)


def test_a_bad_word_is_banned_after_its_beginning() -> None:
    engine, _ = make_engine(depth=2)
    want = expected([1, 2, 3], 6, eos=())
    word = want[2:4]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine.add_request("x", [1, 2, 3], params, bad_words=[word])
    got, _ = run(engine)["x"]
    assert got[:3] == want[:3]
    assert got[3] != want[3]


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="do not hold"):
        make_engine(num_blocks=2, block_size=4, max_model_len=9)
