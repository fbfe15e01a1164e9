"""Sampling on the device: exact distributions, the same random numbers everywhere, penalties and masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from op_backends import of_torch
from op_sampling import SPEC, Array, Sampler, read

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import SlotParams
from vllmlite.backends.sampling import uniform


@pytest.fixture
def backend(exact: Backend) -> Backend:
    return exact


def distribution(logits: Array, params: SlotParams) -> NDArray[np.float64]:
    """Step 5 of ``Backend.sample`` for one row, written as simply as possible."""
    x = np.asarray(logits, np.float64) / params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p * p.max()] = 0
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0
    if params.top_p < 1:
        aim, total = params.top_p * p.sum(), 0.0
        for value in np.sort(p)[::-1]:
            total += value
            if total >= aim:
                p[p < value] = 0
                break
    return np.asarray(p / p.sum())


def pick(logits: Array, params: SlotParams, position: int) -> int:
    total = np.cumsum(distribution(logits, params))
    return int(np.argmax(total > uniform(params.seed, position) * total[-1]))


ZERO, HALF, ALL_BUT_ONE = 7925055, 37045082, 26683238
"""Positions whose random numbers under seed 0 are the least, the middle and the greatest."""


LOGITS = np.array([2.0, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, 2.5, 0.25, -3.0, 1.5])


CASES = {
    "plain": SlotParams(temperature=1.0),
    "cold": SlotParams(temperature=0.4),
    "hot": SlotParams(temperature=5.0),
    "top-k": SlotParams(temperature=1.0, top_k=4),
    "top-k of equals": SlotParams(temperature=1.0, top_k=4, seed=9),
    "top-k of all": SlotParams(temperature=1.0, top_k=11),
    "top-k of more": SlotParams(temperature=1.0, top_k=1000),
    "top-p": SlotParams(temperature=1.0, top_p=0.7),
    "top-p, tiny": SlotParams(temperature=1.0, top_p=1e-6),
    "min-p": SlotParams(temperature=1.0, min_p=0.2),
    "min-p, all": SlotParams(temperature=1.0, min_p=1.0),
    "all": SlotParams(temperature=1.3, top_k=7, top_p=0.8, min_p=0.05),
    "top-k and top-p": SlotParams(temperature=0.8, top_k=5, top_p=0.75),
}


@pytest.mark.parametrize("case", CASES)
def test_distribution(backend: Backend, case: str) -> None:
    """Checks the frequencies with a chi-square test, and each id against the definition."""
    params, draws = CASES[case], 4000
    sampler = Sampler(
        backend, [replace(params, seed=params.seed + row % 7) for row in range(draws)], len(LOGITS)
    )
    ids = sampler.ids(LOGITS, np.arange(draws))
    wanted = distribution(LOGITS, params)
    counts = np.bincount(ids, minlength=len(LOGITS))
    assert not counts[wanted == 0].any()
    expected = draws * wanted[wanted > 0]
    chi_square = float(((counts[wanted > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # Wilson & Hilferty's normal approximation; 3.7 deviations are passed once in ten thousand.
    assert (
        freedom == 0
        or (chi_square / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 3.7 * (2 / (9 * freedom)) ** 0.5
    )
    for row in range(0, draws, 13):
        assert ids[row] == pick(LOGITS, sampler.params[row], row)


@pytest.mark.parametrize("vocab_size", [307, 5000])
def test_every_draw_equals_the_definition(backend: Backend, vocab_size: int) -> None:
    """Many rows with many parameters at once, some of them greedy, over flat and steep logits."""
    rng = np.random.default_rng(vocab_size)
    params = [
        SlotParams(
            temperature=float(rng.choice([0, 0.01, 0.7, 1, 3])),
            top_k=int(rng.choice([0, 0, 1, 3, 50, 2000])),
            top_p=float(rng.choice([1, 0.999, 0.9, 0.5, 0.01])),
            min_p=float(rng.choice([0, 0, 0.01, 0.5])),
            seed=int(rng.integers(2**63)) * 2 + 1,
        )
        for _ in range(200)
    ]
    logits = rng.standard_normal((200, vocab_size)) * rng.choice([0.1, 2, 8], (200, 1))
    logits = np.round(logits, 2).astype(np.float32)
    positions = rng.integers(0, 2**20, 200)
    wanted = [
        pick(row, one, position) if one.temperature else int(row.argmax())
        for row, one, position in zip(logits, params, positions.tolist(), strict=True)
    ]
    assert Sampler(backend, params, vocab_size).ids(logits, positions) == wanted


def test_probabilities_are_those_of_the_draws(backend: Backend) -> None:
    """Also after drafts, which count as output; where one id is certain, it has the probability 1."""
    if not backend.gives_probabilities:
        pytest.skip(f"the {backend.name} backend gives no probabilities")
    penalties = SlotParams(
        temperature=0.9, presence_penalty=1.5, frequency_penalty=0.7, top_k=6, output_ids=[3, 3, 9]
    )
    params = [
        *CASES.values(),
        SlotParams(),
        replace(CASES["all"], logit_bias=((2, 1.5),)),
        CASES["hot"],
        penalties,
    ]
    drafts: list[list[int]] = [[]] * (len(params) - 1) + [[5, 3]]
    logits = np.tile(LOGITS.astype(np.float32), (len(params) + 2, 1))
    logits[len(params) - 2, [1, 4, 6]] = np.nan, np.inf, -np.inf
    sampler = Sampler(backend, params, len(LOGITS))
    batch = backend.upload(sampler.upload(range(len(params)), 1, drafts), sampler.slots, SPEC)
    given = backend.tensor(logits.copy())
    found = backend.to_host(backend.probabilities(given, sampler.slots, batch))
    np.testing.assert_array_equal(backend.to_host(given), logits)
    biased = LOGITS + 1.5 * (np.arange(len(LOGITS)) == 2)
    certain = np.eye(len(LOGITS))
    expected = [
        *(distribution(LOGITS, each) for each in CASES.values()),
        certain[LOGITS.argmax()],
        distribution(biased, CASES["all"]),
        certain[4],
        *(
            distribution(penalised(LOGITS, penalties, [3, 3, 9, *drafts[-1][:count]]), penalties)
            for count in range(3)
        ),
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)


def test_a_row_does_not_depend_on_the_others(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    params = [replace(one, seed=row) for row, one in enumerate(CASES.values())]
    logits = rng.standard_normal((len(params), 3000))
    sampler = Sampler(backend, params, 3000)
    together = sampler.ids(logits, 77)
    for row in range(len(params)):
        assert sampler.ids(logits[row : row + 1], 77, rows=[row]) == together[row : row + 1]
    assert sampler.ids(logits[::-1], 77, rows=range(len(params))[::-1]) == together[::-1]


@of_torch
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1)), min_size=1, max_size=50))
def test_random_numbers_equal_the_definition_bit_for_bit(pairs: list[tuple[int, int]]) -> None:
    from vllmlite.backends.torch_sampling import uniforms

    seeds, positions = zip(*pairs, strict=True)
    found = uniforms(np.array(seeds, np.uint64), np.array(positions, np.int64))
    assert found.tolist() == [uniform(seed, position) for seed, position in pairs]


def test_the_edges_of_the_random_numbers(backend: Backend) -> None:
    """The number 0 does not pick an id of probability 0, and a number on a border picks the id after it."""
    assert (uniform(0, ZERO), uniform(0, HALF), uniform(0, ALL_BUT_ONE)) == (0, 0.5, 1 - 2**-24)
    sampler = Sampler(backend, [SlotParams(temperature=1.0)], 4)
    masks = {0: np.array([False, True, True, False])}
    found = [sampler.ids(np.zeros(4), position, masks=masks)[0] for position in (ZERO, HALF, ALL_BUT_ONE)]
    assert found == [1, 2, 2]


def test_greedy_takes_the_lowest_of_equals(backend: Backend) -> None:
    logits = np.array([[0, 3, 3, 1], [5, 5, 5, 5], [-np.inf, -np.inf, -2, -2]])
    assert Sampler(backend, [SlotParams()] * 3, 4).ids(logits) == [1, 0, 2]


def test_extreme_temperatures(backend: Backend) -> None:
    logits = LOGITS * 1e4
    cold = Sampler(backend, [SlotParams(temperature=1e-30, seed=row) for row in range(50)], 11)
    assert set(cold.ids(logits)) == {7}
    hot = Sampler(backend, [SlotParams(temperature=1e30, seed=row) for row in range(500)], 11)
    assert set(hot.ids(logits)) == set(range(11))


def test_bias(backend: Backend) -> None:
    logits = np.zeros((4, 40))
    logits[:, 9] = 1
    params = [
        SlotParams(logit_bias=((3, 0.5), (4, 2.0))),
        SlotParams(logit_bias=((9, -2.0),)),
        SlotParams(),
        SlotParams(logit_bias=((39, 100.0), (9, 100.0)), temperature=1.0),
    ]
    assert Sampler(backend, params, 40).ids(logits) == [4, 0, 9, 9 if uniform(0, 1) < 0.7311 else 39]


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 95, 307])
def test_bitmask(backend: Backend, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = rng.standard_normal((40, vocab_size))
    masks = {row: rng.random(vocab_size) < 0.1 for row in range(1, 40, 3)}
    for row, allowed in masks.items():
        allowed[(31, vocab_size - 1)[row % 2] % vocab_size] = True
    wanted = [
        int(np.where(masks[row], logits[row], -9e9).argmax()) if row in masks else int(logits[row].argmax())
        for row in range(40)
    ]
    assert Sampler(backend, [SlotParams()] * 40, vocab_size).ids(logits, masks=masks) == wanted
    warm = Sampler(backend, [SlotParams(temperature=50.0, seed=row) for row in range(40)], vocab_size)
    for position in range(5):
        ids = warm.ids(logits, position, masks=masks)
        assert all(masks[row][ids[row]] for row in masks)


def penalised(logits: Array, params: SlotParams, output: list[int]) -> Array:
    """Step 3 of ``Backend.sample`` for one row, one id at a time."""
    edited = np.array(logits, np.float64)
    for token in set(params.prompt_ids) | set(output):
        edited[token] *= params.repetition_penalty if edited[token] <= 0 else 1 / params.repetition_penalty
    for token in set(output):
        edited[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return edited


def test_penalties_follow_the_output(backend: Backend) -> None:
    """Rows with penalties of every kind, and without, generate step by step as the formula does."""
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.7, "prompt_ids": [1, 2, 3, 2]},
        {"repetition_penalty": 0.6, "prompt_ids": [5]},
        {"frequency_penalty": 0.4, "output_ids": [3, 3, 4]},
        {"presence_penalty": 1.1},
        {"presence_penalty": -0.3, "frequency_penalty": -0.2},
        {
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.3,
            "presence_penalty": 0.1,
            "prompt_ids": [0],
            "output_ids": [7],
        },
        {"repetition_penalty": 1.5, "temperature": 0.9, "top_k": 5, "seed": 3},
    ]
    params = [SlotParams(**kind) for kind in kinds]
    sampler = Sampler(backend, params, 30)
    outputs = [list(one.output_ids) for one in params]
    for step in range(25):
        rows = sorted(rng.permutation(len(params))[: rng.integers(1, len(params) + 1)].tolist())
        logits = np.sort(rng.standard_normal(30))[::-1].astype(np.float32)
        wanted = []
        for row in rows:
            edited = penalised(logits, params[row], outputs[row])
            wanted.append(
                pick(edited, params[row], step) if params[row].temperature else int(edited.argmax())
            )
        assert sampler.ids(logits, step, rows=rows) == wanted
        for row, token in zip(rows, wanted, strict=True):
            outputs[row].append(token)


def test_penalties_are_reset_for_a_new_sequence(backend: Backend) -> None:
    params = SlotParams(presence_penalty=10.0)
    sampler = Sampler(backend, [params, params], 4)
    logits = np.array([3.0, 2.0, 1.0, 0.0])
    assert [sampler.ids(logits) for _ in range(3)] == [[0, 0], [1, 1], [2, 2]]
    backend.set_slot(sampler.slots, 0, params)
    assert sampler.ids(logits) == [0, 3]
    backend.set_slot(sampler.slots, 0, SlotParams())
    sampler.params[0] = SlotParams()
    assert [sampler.ids(logits)[0] for _ in range(2)] == [0, 0]
    backend.set_slot(sampler.slots, 0, replace(params, output_ids=[0, 1]))
    assert sampler.ids(logits)[0] == 2


def test_bias_mask_and_penalties_come_in_order(backend: Backend) -> None:
    """The bias is added before the repetition penalty, and no penalty lifts a mask."""
    params = SlotParams(
        logit_bias=((1, 4.0),),
        repetition_penalty=4.0,
        prompt_ids=[1, 2],
        presence_penalty=-9.0,
        output_ids=[2],
    )
    logits = np.array([1.5, 1.0, 0.5, 1.0])
    sampler = Sampler(backend, [params], 4)
    # Id 1: (1 + 4) / 4 = 1.25, below id 0. Id 2 would gain 9, were it not masked.
    assert sampler.ids(logits, masks={0: np.array([True, True, False, True])}) == [0]


def test_a_nan_counts_as_minus_infinity(backend: Backend) -> None:
    """In any place and with any sign, for ids and for log-probabilities, and in a row of NaNs only."""
    rng = np.random.default_rng(2)
    params = [
        SlotParams(),
        SlotParams(temperature=1.0, seed=1),
        SlotParams(temperature=1.0, top_k=3, seed=2),
        SlotParams(temperature=1.0, top_p=0.8, seed=3),
        SlotParams(temperature=1.0, min_p=0.1, seed=4),
        SlotParams(repetition_penalty=2.0, prompt_ids=[0, 1, 2], temperature=1.0, top_k=2, top_p=0.5, seed=5),
        SlotParams(temperature=1.0, seed=6),
        SlotParams(),
    ]
    for size in (37, 4096):
        logits = rng.standard_normal((8, size)).astype(np.float32)
        holes = rng.random(logits.shape) < 0.4
        holes[:, 0], holes[6:] = True, True
        with_nan, without = logits.copy(), logits.copy()
        with_nan[holes] = np.where(rng.random(holes.sum()) < 0.5, np.float32(np.nan), -np.float32(np.nan))
        without[holes] = -np.inf
        for position in range(20):
            found, wanted = (
                Sampler(backend, params, size).sample(given, position, num_logprobs=size)[0]
                for given in (with_nan, without)
            )
            ids = backend.to_host(found.ids)
            assert ids.tolist() == backend.to_host(wanted.ids).tolist()
            assert not holes[np.arange(6), ids[:6]].any()
            assert ids[6:].tolist() == [0, 0]
            for one, other in zip(read(backend, found.logprobs), read(backend, wanted.logprobs), strict=True):
                np.testing.assert_array_equal(one, other)
        chosen, rank, top_ids, top = read(backend, found.logprobs)
        assert (chosen[6:] == -np.inf).all()
        assert rank[6:].tolist() == [1, 1]
        assert top_ids[7].tolist() == list(range(size))
        assert not np.isnan(top).any()


def test_an_infinite_logit_is_chosen(backend: Backend) -> None:
    logits = np.random.default_rng(3).standard_normal((4, 50)).astype(np.float32)
    logits[:, [20, 30]] = np.inf
    params = [SlotParams(temperature=2.0, top_k=top_k, top_p=top_p) for top_k, top_p in ((0, 1.0), (5, 0.9))]
    sampled, _ = Sampler(backend, [*params, SlotParams(), SlotParams(temperature=1.0, min_p=0.5)], 50).sample(
        logits, num_logprobs=4
    )
    assert backend.to_host(sampled.ids).tolist() == [20] * 4
    chosen, rank, top_ids, top = read(backend, sampled.logprobs)
    assert chosen.tolist() == [0] * 4
    assert rank.tolist() == [1] * 4
    assert top_ids[:, :2].tolist() == [[20, 30]] * 4
    assert top.tolist() == [[0, 0, -np.inf, -np.inf]] * 4
