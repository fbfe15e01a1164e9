"""Speculative decoding without a model: how many drafts a request asks for, and what becomes of them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import pytest
from engine_runs import assert_idle, make_engine, run
from fake_runner import EOS, VOCAB, FakeRunner, expected

from vllmlite.engine.drafts import (
    ASKED_AGAIN,
    LEAST_PRIOR,
    MOST_DRAFTS,
    PROBE_INTERVAL,
    PROBE_SHARE,
    Acceptance,
    DraftPolicy,
    StepCost,
    holds_back,
)
from vllmlite.engine.request import allows
from vllmlite.engine.runner_protocol import StepResult
from vllmlite.engine.schedule import Schedule
from vllmlite.engine.thinking import ReasoningMarks, ThinkingBudget
from vllmlite.sampling_params import SamplingParams

FREE = StepCost([(1, 1.0), (2, 1.0)])
"""Steps of any size cost the same."""
LINEAR = StepCost([(1, 1.0), (2, 2.0)])
"""A step costs as much as its tokens one by one."""


def long(**options: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, **options)  # type: ignore[arg-type]


def noted(runner: FakeRunner) -> list[Schedule]:
    """Return a list to which every schedule that ``runner`` launches from now on is added."""
    launch, schedules = runner.launch, []

    def note(schedule: Schedule) -> StepResult:
        schedules.append(schedule)
        return launch(schedule)

    runner.launch = note  # type: ignore[method-assign]
    return schedules


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prompts", [1, 3])
def test_right_drafts_divide_the_number_of_steps(depth: int, prompts: int) -> None:
    engine, runner = make_engine(num_blocks=400, budget=256, depth=depth, drafts=4, right=1.0, cost=FREE)
    for index in range(prompts):
        engine.add_request(str(index), [index + 1, 2], long())
    done = run(engine)
    for index in range(prompts):
        assert done[str(index)] == (expected([index + 1, 2], 200, eos=()), "length")
    assert runner.steps == 1 + 40  # the prompt's, then five tokens a step; the last has four
    stats = engine.current_stats()
    assert stats.num_generation_tokens == 200 * prompts
    assert stats.num_drafts == 40 * prompts
    assert stats.num_draft_tokens == stats.num_accepted_tokens == 159 * prompts
    assert stats.num_accepted_tokens_per_pos == (40 * prompts, 40 * prompts, 40 * prompts, 39 * prompts)
    assert_idle(engine)


def test_the_stages_of_a_pipeline_do_not_wait_for_drafts() -> None:
    """Each of two requests is in every second step; neither waits for the other's drafts."""
    engine, runner = make_engine(num_blocks=400, depth=2, stages=2, drafts=4, right=1.0, cost=FREE)
    schedules = noted(runner)
    prompts = [[1, 2, 3], [4, 5, 6]]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, long())
    done = run(engine)
    assert [done[str(number)][0] for number in range(2)] == [
        expected(prompt, 200, eos=()) for prompt in prompts
    ]
    assert [schedule.slots for schedule in schedules] == [[0], [1]] * 41


def test_acceptance_does_not_decay_over_a_long_text_with_prefix_caching() -> None:
    """The last quarter of a text takes as many steps as its first."""
    engine, runner = make_engine(num_blocks=1000, budget=256, drafts=4, right=0.8, cost=FREE)
    engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True))
    at: list[int] = []
    total = 0
    while engine.has_unfinished_requests():
        total += sum(len(output.new_token_ids) for output in engine.step())
        while total >= 500 * (len(at) + 1):
            at.append(runner.steps)
    quarters = [end - begin for begin, end in zip([0, *at], at, strict=False)]
    assert max(quarters) < 1.3 * min(quarters)
    assert sum(quarters) < 2000 / 1.5


def test_wrong_drafts_are_seldom_made() -> None:
    engine, _ = make_engine(num_blocks=1000, budget=256, drafts=4, right=0.0)
    engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True))
    run(engine)
    stats = engine.current_stats()
    assert stats.num_accepted_tokens < 50  # a random id is right once in 97
    assert stats.num_draft_tokens < 1000 * (1 / PROBE_INTERVAL + 0.05)


def test_nothing_is_drafted_where_a_step_costs_as_much_as_its_tokens() -> None:
    """A probe then costs a step, so that probes come as seldom as their part of the time demands."""
    policy = DraftPolicy(4, cost=LINEAR)
    acceptance = Acceptance(accepted=5.0, tried=5.0)
    tokens, probes = 0, 0
    while tokens < 10_000:
        probes += policy.wanted(acceptance, 1)
        tokens += acceptance.pause
    assert 0.9 * PROBE_SHARE < probes / 10_000 <= PROBE_SHARE


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("step", ["memory-bound", "compute-bound", "overlapped"])
def test_drafts_that_are_always_wrong_cost_at_most_two_percent(rows: int, step: str) -> None:
    """In modelled time, of which nothing is noise: steps take what the table says. Where rows that have drafts or want
    some hold back the next step, it takes longer; otherwise these rows are left out of it. Requests of 512 tokens come
    and go, four for each row."""
    points, wait = {
        "memory-bound": ([(1, 10.0), (8, 10.8), (16, 11.6), (64, 16.0), (128, 24.0)], 0.0),
        "compute-bound": ([(1, 10.0), (8, 20.0), (64, 80.0), (128, 150.0)], 0.0),
        "overlapped": ([(1, 5.0), (32, 5.3), (64, 5.8), (128, 7.5)], 1.0),
    }[step]
    cost = StepCost(points)
    policy = DraftPolicy(8, cost=cost, overlapped=wait > 0, wait=wait)
    acceptances, tokens = [policy.begin() for _ in range(rows)], [1 + 8 * row for row in range(rows)]
    asks, drafts = [0] * rows, [0] * rows
    plain = with_drafts = 0.0
    for _ in range(4 * 512):
        asked = [0] * rows
        for row, acceptance in enumerate(acceptances):
            if drafts[row] or tokens[row] >= asks[row]:
                asked[row] = policy.wanted(acceptance, rows)
                if not asked[row]:
                    asks[row] = tokens[row] + acceptance.pause
        waiting = sum(bool(wants or has) for wants, has in zip(asked, drafts, strict=True))
        plain += cost(rows) - wait
        with_drafts += cost(rows + sum(drafts)) - wait
        if waiting and wait:
            with_drafts += wait if holds_back(waiting, rows) else cost(rows) * waiting / rows
        for row in range(rows):
            if drafts[row]:
                policy.record(acceptances[row], drafts[row], 0)
            tokens[row] += 1
            if tokens[row] == 512:
                acceptances[row], tokens[row], asks[row], asked[row] = policy.begin(), 1, 0, 0
        drafts = asked
    assert with_drafts < 1.02 * plain


def test_requests_begin_with_the_acceptance_of_recent_ones() -> None:
    policy = DraftPolicy(8, cost=FREE)
    assert policy.begin().rate == pytest.approx(0.8)
    for _ in range(300):
        policy.record(Acceptance(), 2, 0)
    assert policy.begin().rate == pytest.approx(LEAST_PRIOR)
    for _ in range(300):
        policy.record(Acceptance(), 8, 8)
    assert policy.begin().rate > 0.95


def test_limits_of_drafts_by_rows_and_length() -> None:
    policy = DraftPolicy(8, by_rows=((1, 2, 5), (3, 4, 0)), cost=FREE)
    sure = Acceptance(accepted=5.0, tried=5.0)
    assert [policy.wanted(sure, rows) for rows in (1, 2, 3, 4, 5)] == [5, 5, 0, 0, 8]
    engine, runner = make_engine(num_blocks=400, budget=256, drafts=4, right=1.0, cost=FREE)
    engine.scheduler.drafting.max_len = 50
    schedules = noted(runner)
    engine.add_request("a", [1, 2], long())
    run(engine)
    assert max(s.starts[0] + s.counts[0] for s in schedules if s.drafts) <= 50
    assert len(schedules) > 150


def test_the_number_of_drafts_follows_acceptance_cost_and_rows() -> None:
    def wanted(rate: float, rows: int) -> int:
        return policy.wanted(Acceptance(accepted=rate, tried=1.0), rows)

    policy = DraftPolicy(8, cost=StepCost([(1, 1.0), (16, 1.6), (32, 4.0)]))
    assert [wanted(rate, 1) for rate in (0.0, 0.03, 0.3, 0.6, 0.9, 1.0)] == [0, 0, 2, 4, 8, 8]
    assert [wanted(0.9, rows) for rows in (1, 4, 8, 16, 64)] == [8, 3, 1, 0, 0]
    assert DraftPolicy(8, max_rows=3, cost=FREE).wanted(Acceptance(), 3) == 8
    assert DraftPolicy(8, max_rows=3, cost=FREE).wanted(Acceptance(), 4) == 0
    assert DraftPolicy(0, cost=FREE).wanted(Acceptance(), 1) == 0


def test_a_request_that_waits_for_drafts_in_vain_asks_less_often() -> None:
    for overlapped in (False, True):
        engine, runner = make_engine(
            num_blocks=400, budget=256, depth=2 if overlapped else 1, drafts=4, right=1.0
        )
        runner._propose = lambda context, count: []  # type: ignore[method-assign]
        schedules = noted(runner)
        engine.add_request("a", [1, 2], long())
        run(engine)
        assert (sum(len(schedule.wanted) for schedule in schedules) < 60) == overlapped


def test_drafts_take_no_blocks_and_no_budget_from_others() -> None:
    """A pool and a budget that just suffice without drafts suffice with them, with no preemption and as few steps."""
    counts = []
    for drafts in (0, 4):
        engine, runner = make_engine(
            num_blocks=12, block_size=4, budget=3, max_model_len=16, drafts=drafts, right=0.0, cost=FREE
        )
        for name in "abc":
            engine.add_request(name, [1, 2, 3], SamplingParams(temperature=0, max_tokens=13, ignore_eos=True))
        assert run(engine)["c"][0] == expected([1, 2, 3], 13, eos=())
        assert engine.current_stats().num_preemptions == 0
        counts.append(runner.steps)
    assert counts[0] == counts[1]


def test_models_that_draft_get_blocks_for_their_positions_and_take_none_from_others() -> None:
    for num_blocks in (12, 400):
        engine, runner = make_engine(
            num_blocks=num_blocks, block_size=4, budget=8, max_model_len=16, drafts=4, right=0.5, cost=FREE
        )
        engine.scheduler.drafting = replace(engine.scheduler.drafting, fills_cache=True)
        launch = runner.launch

        def check(schedule: Schedule, launch: Any = launch, runner: FakeRunner = runner) -> StepResult:
            result = launch(schedule)
            for row, count in schedule.wanted.items():
                slot, end = schedule.slots[row], schedule.starts[row] + schedule.counts[row]
                assert min(end + count, 16) <= 4 * len(runner.tables[slot])
            return cast(StepResult, result)

        runner.launch = check  # type: ignore[method-assign]
        for name in "abc":
            engine.add_request(name, [1, 2, 3], SamplingParams(temperature=0, max_tokens=13, ignore_eos=True))
        assert run(engine)["c"][0] == expected([1, 2, 3], 13, eos=())
        stats = engine.current_stats()
        assert stats.num_preemptions == 0
        assert stats.num_accepted_tokens > 0


def test_the_last_block_of_a_cached_prefix_is_computed_again_where_hidden_states_are_read() -> None:
    for reads, cached in ((False, 8), (True, 4)):
        engine, _ = make_engine(block_size=4, drafts=4, right=0.5, cost=FREE)
        engine.scheduler.drafting = replace(engine.scheduler.drafting, reads_states=reads)
        for name in "ab":
            request = engine.add_request(name, [*range(1, 11)], SamplingParams(temperature=0, max_tokens=3))
            assert run(engine)[name][0] == expected([*range(1, 11)], 3)
        assert request.num_cached_tokens == cached


def test_a_step_has_no_more_drafts_than_there_is_room_for_logits() -> None:
    engine, runner = make_engine(
        num_blocks=1000, budget=2048, max_num_seqs=100, max_model_len=64, drafts=4, right=1.0, cost=FREE
    )
    schedules = noted(runner)
    for index in range(90):
        engine.add_request(
            str(index), [index + 1], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        )
    run(engine)
    most = max(schedule.num_sampled - len(schedule.slots) for schedule in schedules)
    assert most == MOST_DRAFTS < 4 * 90


def test_prefix_reuse_is_that_of_a_run_without_drafts() -> None:
    """A long conversation, each turn of which repeats the ones before: as many prompt tokens come from the cache."""
    hits = []
    for drafts in (0, 4):
        engine, _ = make_engine(num_blocks=400, budget=256, drafts=drafts, right=0.7, cost=FREE)
        prompt = [1, 2, 3]
        cached = []
        for turn in range(10):
            request = engine.add_request(
                str(turn), prompt, SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)
            )
            prompt = [*prompt, *run(engine)[str(turn)][0], turn]
            cached.append(request.num_cached_tokens)
        hits.append(cached)
    assert hits[0] == hits[1]
    assert (hits[0][-1] or 0) > 100


class Counted(DraftPolicy):
    """A policy that counts how often it is asked."""

    num_asked = 0

    def wanted(self, acceptance: Acceptance, rows: int) -> int:
        self.num_asked += 1
        return super().wanted(acceptance, rows)


def test_a_request_whose_drafts_do_not_pay_asks_for_nothing_meanwhile() -> None:
    """Nothing is decided, looked up or waited for in the steps between: the work of a run without drafts."""
    engine, runner = make_engine(num_blocks=1000, budget=256, drafts=4, right=0.0, cost=LINEAR, depth=2)
    policy = engine.scheduler.drafting = Counted(4, overlapped=True, cost=LINEAR)
    schedules = noted(runner)
    engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True))
    run(engine)
    assert policy.num_asked < 1000 / ASKED_AGAIN + 20
    assert sum(bool(schedule.wanted or schedule.drafts) for schedule in schedules) < 30


def test_rejected_drafts_name_no_block() -> None:
    """Every cached block holds ids of the text: a prompt with the ids of rejected drafts finds only what is its own."""
    engine, _ = make_engine(num_blocks=400, budget=256, drafts=4, right=0.5, cost=FREE, block_size=1)
    request = engine.add_request("a", [1, 2, 3], long())
    hashes = set()
    while engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        assert len(request.block_hashes) <= known
        hashes |= set(engine.scheduler.pool._by_hash)
    assert hashes == set(request.block_hashes)
    prompt = [1, 2, 3, *request.output_token_ids]
    again = engine.add_request("b", prompt, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert run(engine)["b"][0] == expected(prompt, 5, eos=())
    assert again.num_cached_tokens == len(prompt) - 1


@pytest.mark.parametrize("depth", [1, 2])
def test_an_end_inside_an_accepted_run_ends_the_request(depth: int) -> None:
    """Stop ids, ends of text and max_tokens, in ids, reason and statistics."""
    for prompt in ([1, 2], [5, 6], [9], [3, 3, 4]):
        text = expected(prompt, 60)
        for length, stop in ((60, None), (7, None), (60, text[min(10, len(text) - 1)])):
            engine, _ = make_engine(num_blocks=100, depth=depth, drafts=4, right=1.0, cost=FREE)
            stops = [] if stop is None else [stop]
            params = SamplingParams(temperature=0, max_tokens=length, stop_token_ids=stops)
            request = engine.add_request("a", prompt, params)
            want = expected(prompt, length, eos=(EOS, *stops))
            assert run(engine)["a"] == (want, "stop" if want[-1] in (EOS, stop) else "length")
            assert engine.current_stats().num_generation_tokens == len(want)
            assert request.metrics.num_generation_tokens == len(want)


class Alternating:
    """A grammar: ids of one parity, then of the other, ``length`` of them."""

    def __init__(self, length: int) -> None:
        self.ids: list[int] = []
        self.num_asked = 0
        self._length = length

    def restart(self) -> None:
        self.ids = []

    def masks(self, drafts: object = ()) -> list[bytes | None]:
        assert isinstance(drafts, (list, tuple))
        self.num_asked += 1
        masks: list[bytes | None] = []
        for count in range(len(self.ids), len(self.ids) + len(drafts) + 1):
            mask = bytes([0x55 if count % 2 else 0xAA] * (4 * -(-VOCAB // 32)))
            masks.append(mask)
            index = count - len(self.ids)
            if index == len(drafts) or not allows(mask, drafts[index]) or count + 1 == self._length:
                break
        return masks

    def accept(self, token_id: int) -> bool:
        self.ids.append(token_id)
        return len(self.ids) == self._length

    def fork(self) -> Alternating:
        return deepcopy(self)


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_end_at_the_first_id_that_the_grammar_forbids(depth: int) -> None:
    engine, runner = make_engine(num_blocks=100, depth=depth, drafts=4, right=0.9, cost=FREE)
    schedules = noted(runner)
    grammar = Alternating(40)
    engine.add_request("a", [1, 2], long(), grammar=grammar)
    ids, reason = run(engine)["a"]
    assert reason == "stop"
    assert grammar.ids == ids
    assert len(ids) == 40
    assert grammar.num_asked == len(schedules)  # once for each row, with drafts or without
    drafted = [schedule for schedule in schedules if schedule.drafts]
    assert drafted
    for schedule in drafted:
        (drafts,) = schedule.drafts.values()
        assert len(schedule.masks) == len(drafts) + 1
        assert all(allows(schedule.masks[index], token_id) for index, token_id in enumerate(drafts))


def test_a_thinking_budget_forces_its_mark_at_the_right_draft() -> None:
    marks = ReasoningMarks((1,), (2, 3))
    budget = ThinkingBudget(marks, 2, [1], VOCAB)
    masks = budget.masks([7, 8, 2, 3, 9])
    assert [mask is None for mask in masks] == [True, True, False, False, True, True]
    assert allows(masks[2], 2) and allows(masks[3], 3) and not allows(masks[2], 3)
    assert len(budget.masks([7, 8, 9, 9])) == 3
    assert budget.masks() == [None]


def test_a_request_is_preempted_and_goes_on_with_drafts() -> None:
    texts = []
    for drafts in (0, 4):
        engine, _ = make_engine(num_blocks=12, max_model_len=48, drafts=drafts, right=0.9, cost=FREE, depth=2)
        for name in "abcd":
            engine.add_request(
                name, [ord(name) - 90], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            )
        texts.append(run(engine))
        assert engine.current_stats().num_preemptions > 0
    assert texts[0] == texts[1]
