"""Beam search on the fake runner: its outputs do not depend on what else is scheduled, and nothing leaks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from engine_runs import assert_idle, engine_options, make_engine
from fake_runner import EOS, VOCAB
from hypothesis import event, given, settings
from hypothesis import strategies as st

from vllmlite.beam_params import BeamOptions
from vllmlite.engine import bounds
from vllmlite.engine.beams import BeamSearch, Hypothesis
from vllmlite.engine.bounds import most_blocks
from vllmlite.engine.engine import Engine
from vllmlite.errors import ParameterError
from vllmlite.sampling_params import SamplingParams


def beam_params(width: int, max_tokens: int = 8, **options: object) -> SamplingParams:
    named = {name: options.pop(name) for name in ("length_penalty", "early_stopping") if name in options}
    return SamplingParams(
        n=width,
        max_tokens=max_tokens,
        beams=BeamOptions(width, **named),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )


def run_beams(engine: Engine, limit: int = 10_000) -> dict[str, list[Hypothesis]]:
    done: dict[str, list[Hypothesis]] = {}
    for _ in range(limit):
        if not engine.has_unfinished_requests():
            return done
        for output in engine.step():
            if output.beams is not None:
                assert not output.new_token_ids and output.finish_reason == output.beams[0].finish_reason
                done[output.request_id] = output.beams
        engine.scheduler.check_integrity()
    raise AssertionError("starved")


def alone(prompt: list[int], params: SamplingParams, grammar: Alternating | None = None) -> list[Hypothesis]:
    """The outputs of a request that has an engine for itself."""
    engine, _ = make_engine(512, 4)
    engine.add_request("0", prompt, params, grammar=grammar)
    return run_beams(engine)["0"]


prompts = st.builds(
    lambda common, rest: [7] * common + rest,
    st.integers(0, 12),
    st.lists(st.integers(1, 3), min_size=1, max_size=9),
)
requests = st.lists(
    st.tuples(
        st.integers(0, 6),  # step of arrival
        prompts,
        st.integers(1, 10),  # max_tokens
        st.integers(0, 4),  # beams; 0: an ordinary request
        st.none() | st.integers(1, 9),  # steps until it is aborted
        st.sampled_from([0.0, 1.5]),  # presence penalty
    ),
    min_size=4,
    max_size=10,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    arrivals=requests,
    spare_blocks=st.integers(0, 4),
    options=engine_options(
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(4, 16),
        budget=st.integers(4, 40),
        drafts=st.sampled_from([0, 2]),
    ),
)
def test_beams_do_not_depend_on_other_requests(
    arrivals: list[tuple[int, list[int], int, int, int | None, float]],
    spare_blocks: int,
    options: dict[str, Any],
) -> None:
    """Random load, in a pool that is hardly larger than the largest request, with preemptions and aborts."""
    block_size = options["block_size"]
    needed = [
        most_blocks(max(width, 1), len(prompt), len(prompt) + max_tokens, block_size)
        for _, prompt, max_tokens, width, _, _ in arrivals
    ]
    num_blocks = max(*needed, -(-32 // block_size)) + spare_blocks
    engine, _ = make_engine(num_blocks, max_model_len=32, **options)
    pending = dict(enumerate(arrivals))
    aborts: dict[int, int] = {}
    found: dict[int, list[Hypothesis]] = {}
    step = 0
    while pending or engine.has_unfinished_requests():
        for index in [i for i, arrival in pending.items() if arrival[0] <= step]:
            _, prompt, max_tokens, width, abort_after, penalty = pending.pop(index)
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            if width:
                params = beam_params(width, max_tokens, presence_penalty=penalty)
            engine.add_request(str(index), prompt, params)
            if abort_after is not None:
                aborts[index] = step + abort_after
        for index, when in aborts.items():
            if when == step:
                engine.finish(str(index))
        for output in engine.step():
            if output.beams is not None:
                found[int(output.request_id)] = output.beams
        engine.scheduler.check_integrity()
        step += 1
        assert step < 5000, "starved"
    assert_idle(engine)
    event("preempted" if engine.scheduler.num_preemptions else "not preempted")
    for index, beams in found.items():
        _, prompt, max_tokens, width, _, penalty = arrivals[index]
        assert beams == alone(prompt, beam_params(width, max_tokens, presence_penalty=penalty))
    expected = {i for i, arrival in enumerate(arrivals) if arrival[3] and arrival[4] is None}
    assert expected <= found.keys()


def test_beams_share_the_blocks_of_their_common_prefix() -> None:
    engine, runner = make_engine(64, 4)
    engine.add_request("0", [5] * 40, beam_params(4, 3, ignore_eos=True))
    for _ in range(3):
        engine.step()
        engine.scheduler.check_integrity()
    assert runner.tokens_run == 40 + 2 * 4
    assert engine.scheduler.pool.peak_used <= 10 + 4


@pytest.mark.parametrize("caching", [False, True])
def test_a_preempted_search_goes_on_where_it_was(caching: bool) -> None:
    """The prompt is computed once more, and then the outputs of all beams."""
    params = beam_params(3, 12, ignore_eos=True)
    engine, runner = make_engine(14, 4, max_model_len=40, caching=caching)
    engine.add_request("first", [1] * 21, SamplingParams(temperature=0, max_tokens=19, ignore_eos=True))
    engine.add_request("second", [2] * 11, params)
    found = run_beams(engine)
    assert engine.scheduler.num_preemptions > 0
    assert found["second"] == alone([2] * 11, params)
    if not caching:
        assert runner.tokens_run <= 40 + 2 * (11 + 3 * 12)


@pytest.mark.parametrize("depth", [1, 2])
def test_an_interrupted_search_is_rebuilt_from_its_hypotheses(depth: int) -> None:
    params = beam_params(3, 10, ignore_eos=True)
    engine, _ = make_engine(64, 4, depth=depth)
    engine.add_request("0", [2] * 11, params, grammar=Alternating(10))
    for _ in range(4):
        engine.step()
    engine._restore()
    engine.scheduler.check_integrity()
    assert run_beams(engine)["0"] == alone([2] * 11, params, Alternating(10))


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupt_amid_the_choice_of_beams_changes_nothing(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hypotheses of the step are kept, but the sequences do not follow them any more."""
    params = beam_params(3, 10, ignore_eos=True)
    engine, _ = make_engine(64, 4)
    engine.add_request("0", [2] * 8, params)
    for _ in range(step - 1):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(BeamSearch, "_place", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert run_beams(engine)["0"] == alone([2] * 8, params)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Alternating:
    """A grammar that allows odd and even ids in turn, up to ``length`` ids."""

    def __init__(self, length: int) -> None:
        self.ids: list[int] = []
        self._length = length

    def restart(self) -> None:
        self.ids = []

    def masks(self, drafts: object = ()) -> list[bytes | None]:
        return [bytes([0x55 if len(self.ids) % 2 else 0xAA] * (4 * -(-VOCAB // 32)))]

    def accept(self, token_id: int) -> bool:
        self.ids.append(token_id)
        return len(self.ids) == self._length

    def fork(self) -> Alternating:
        return deepcopy(self)


def test_a_grammar_forks_with_its_beam_and_completes_it() -> None:
    """Each beam's grammar has seen that beam's ids alone; a completed output ends with its last id in the text."""
    for beam in alone([3, 4], beam_params(4, 12), Alternating(6)):
        if beam.token_ids[-1] != EOS:
            assert (len(beam.token_ids), beam.finish_reason, beam.ends_in_text) == (6, "stop", True)


def test_a_failed_step_ends_the_search_once() -> None:
    engine, _ = make_engine(64, 4, fail_at=3)
    engine.add_request("0", [2] * 5, beam_params(3, 10, ignore_eos=True))
    ended = []
    while engine.has_unfinished_requests():
        ended += [(o.request_id, o.finish_reason) for o in engine.step() if o.finish_reason]
        engine.scheduler.check_integrity()
    assert ended == [("0", "error")]
    assert_idle(engine)


def test_ends_and_limits() -> None:
    """A stop id ends a hypothesis with its reason, a length with none; both are among the outputs of a search."""
    for beam in alone([9, 9], beam_params(4, 6, stop_token_ids=[11, 12, 13])):
        last = beam.token_ids[-1]
        if last in (11, 12, 13):
            assert (beam.finish_reason, beam.stop_reason) == ("stop", last)
        elif last == EOS:
            assert (beam.finish_reason, beam.stop_reason) == ("stop", None)
        else:
            assert (beam.finish_reason, len(beam.token_ids)) == ("length", 6)
        assert beam.score == beam.cumulative_logprob / len(beam.token_ids)


@pytest.mark.parametrize(
    ("width", "max_tokens", "message"),
    [(9, 4, "must be at most 8"), (8, 60, "may need 121 blocks of key/value cache for 64 tokens")],
)
def test_beams_that_never_fit_are_refused(width: int, max_tokens: int, message: str) -> None:
    engine, _ = make_engine(64, 4, max_model_len=64)
    with pytest.raises(ParameterError, match=message):
        engine.add_request("0", [1] * 4, beam_params(width, max_tokens))
    assert_idle(engine)


def test_the_continuations_that_a_step_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ENDS", 12)
    engine, _ = make_engine(64, 4)
    with pytest.raises(ParameterError, match=r"stop_token_ids=5: .* at most 4 with 3 beams"):
        engine.add_request("0", [1], beam_params(3, 2, stop_token_ids=[1, 2, 3, 4]))  # and EOS
    engine.add_request("1", [1], beam_params(3, 2, stop_token_ids=[1, 2, 3]))
    assert run_beams(engine)["1"]


def test_the_context_ends_all_beams() -> None:
    engine, _ = make_engine(64, 4, max_model_len=12)
    engine.add_request("0", [1] * 8, beam_params(3, 100, ignore_eos=True))
    assert [len(beam.token_ids) for beam in run_beams(engine)["0"]] == [4, 4, 4]
