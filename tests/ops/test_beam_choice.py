"""The ops of beam search: the choice of continuations, and copies of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from op_backends import Array, numbers, put
from op_sampling import SPEC, Sampler, bits
from paged import Paged

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import SlotParams
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.backends.sampling import BeamRows


def beam_rows(
    groups: Sequence[Sequence[int]], scores: Sequence[float], temperatures: Sequence[float] | float = 1.0
) -> BeamRows:
    rows = np.array([row for group in groups for row in group], np.int32)
    ends = np.cumsum([0, *map(len, groups)]).astype(np.int32)
    every = np.broadcast_to(np.asarray(temperatures, np.float32), len(rows)).copy()
    return BeamRows(rows, ends, np.asarray(scores, np.float32), every)


def choose(
    sampler: Sampler, logits: Array, beams: BeamRows, k: int, masks: dict[int, Array] | None = None
) -> tuple[Array, ...]:
    backend, count = sampler.backend, len(sampler.params)
    batch = sampler.upload(range(count), 1)
    if masks:
        batch.mask_rows = np.array(list(masks), np.int32)
        batch.bitmask = np.stack([bits(allowed) for allowed in masks.values()])
    given = backend.tensor(np.ascontiguousarray(logits, np.float32))
    found = backend.choose_beams(given, sampler.slots, backend.upload(batch, sampler.slots, SPEC), beams, k)
    arrays = tuple(backend.to_host(tensor) for tensor in (found.rows, found.ids, found.scores))
    np.testing.assert_array_equal(backend.to_host(given), np.asarray(logits, np.float32))
    assert [array.dtype.name for array in arrays] == ["int32", "int32", "float32"]
    return arrays


def log_softmax(logits: Array, temperatures: Array | float = 1.0) -> Array:
    x = logits.astype(np.float64) / np.reshape(temperatures, (-1, 1))
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def check_choice(found: tuple[Array, ...], values: Array, beams: BeamRows, k: int) -> None:
    """Compare with the best of ``values [N, V]``, the edited log-probabilities, in float64."""
    for group, (first, last) in enumerate(zip(beams.groups, beams.groups[1:], strict=False)):
        sums = values[beams.rows[first:last]] + beams.scores[first:last, None]
        best = np.argsort(-sums, axis=None, kind="stable")[:k]
        assert found[0][group].tolist() == (best // values.shape[1]).tolist()
        assert found[1][group].tolist() == (best % values.shape[1]).tolist()
        np.testing.assert_allclose(found[2][group], sums.reshape(-1)[best], rtol=1e-5)


@pytest.mark.parametrize("size", [33, 20_004])
def test_the_best_continuations_of_groups(exact: Backend, size: int) -> None:
    logits = numbers((6, size), 3, scale=4.0)
    beams = beam_rows([[1, 2, 3], [5], [0, 4]], [-1.0, -2.5, -1.7, -40.0, -3.0, -3.1], [1, 1, 1, 0.5, 2, 1])
    sampler = Sampler(exact, [SlotParams()] * 6, size)
    temperatures = np.ones(6)
    temperatures[beams.rows] = beams.temperatures
    for k in (1, 7, 24):
        check_choice(choose(sampler, logits, beams, k), log_softmax(logits, temperatures), beams, k)


def test_continuations_of_edited_rows(exact: Backend) -> None:
    """Bias, mask and penalties change log-probabilities, which are not normalised again."""
    params = [
        SlotParams(logit_bias=((3, -2.0), (5, 1.5))),
        SlotParams(repetition_penalty=1.5, prompt_ids=[1, 4], output_ids=[7, 7]),
        SlotParams(presence_penalty=1.0, frequency_penalty=0.5, output_ids=[2, 2, 9]),
        SlotParams(),
    ]
    logits, rng = numbers((4, 40), 5, scale=2.0), np.random.default_rng(2)
    allowed = rng.random(40) < 0.3
    values = log_softmax(logits)
    values[0, [3, 5]] += [-2.0, 1.5]
    values[1, [1, 4, 7]] *= 1.5
    values[2, [2, 9]] -= [2.0, 1.5]
    values[3, ~allowed] = -np.inf
    beams = beam_rows([[0, 1], [2, 3]], [-1.0, -1.5, -2.0, -0.5])
    found = choose(Sampler(exact, params, 40), logits, beams, 12, masks={3: allowed})
    check_choice(found, values, beams, 12)


def test_equal_scores_take_the_lower_row_then_the_lower_id(exact: Backend) -> None:
    beams = beam_rows([[2, 0]], [-1.0, -1.0])
    rows, ids, _ = choose(Sampler(exact, [SlotParams()] * 3, 50), np.zeros((3, 50)), beams, 53)
    assert rows.tolist() == [[0] * 50 + [1] * 3]
    assert ids.tolist() == [[*range(50), 0, 1, 2]]


def test_fewer_continuations_than_wanted(exact: Backend) -> None:
    """NaN, -inf and forbidden ids are no continuations; +inf is certain."""
    logits = np.zeros((3, 9))
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, 4] = np.inf
    allowed = np.zeros(9, np.bool_)
    allowed[[1, 6]] = True
    beams = beam_rows([[0, 1], [2]], [-1.0, -1.0, -2.0])
    sampler = Sampler(exact, [SlotParams()] * 3, 9)
    rows, ids, scores = choose(sampler, logits, beams, 4)
    assert rows.tolist() == [[-1] * 4, [0, -1, -1, -1]]
    assert ids.tolist() == [[-1] * 4, [4, -1, -1, -1]]
    assert scores[1].tolist() == [-2.0, *[-np.inf] * 3]
    beams = beam_rows([[0]], [-1.0])
    rows, ids, scores = choose(sampler, np.zeros((3, 9)), beams, 12, masks={0: allowed})
    assert ids.tolist() == [[1, 6, *[-1] * 10]]
    np.testing.assert_allclose(scores[0, :2], -1.0 - np.log(9.0), rtol=1e-6)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_copies_of_blocks_attend_alike(exact: Backend, kv_dtype: str) -> None:
    """A sequence whose blocks are copies, of the same pool or another, attends to the same keys and values."""
    spec = KVSpec(2, 2, 24, 4, kv_dtype)
    here, there = Paged(exact, spec, max_slots=2), Paged(exact, spec, max_slots=2)
    for paged in (here, there):
        for slot in range(2):
            paged.admit(slot)
    states = [numbers((9, 6 * 24), seed) for seed in range(2)]

    def step(paged: Paged, slot: int, count: int, layer_states: list[Array]) -> list[Array]:
        batch = paged.upload(paged.batch([slot], [count]))
        found = []
        for layer, state in enumerate(layer_states):
            q = exact.attn_prep(put(exact, state), 2, None, paged.kv, layer, batch)
            found.append(exact.to_host(exact.paged_attention(q, paged.kv, layer, batch, 0.2)))
        return found

    step(here, 0, 9, states)
    for target, slot in ((here, 1), (there, 0)):
        step(target, slot, 9, [np.zeros_like(state) for state in states])  # allocates other blocks
        sources, targets = (np.array(blocks[:3], np.int32) for blocks in (here.owned[0], target.owned[slot]))
        exact.copy_blocks(here.kv, sources, target.kv, targets)
    last = [numbers((1, 6 * 24), 9 + layer) for layer in range(2)]
    expected = step(here, 0, 1, last)
    for found in (step(here, 1, 1, last), step(there, 0, 1, last)):
        for layer in range(2):
            np.testing.assert_array_equal(found[layer], expected[layer])


@pytest.mark.parametrize(
    ("sources", "targets", "error"),
    [
        ([0], [4], IndexError), ([-1], [1], IndexError), ([0, 1], [2, 2], ValueError), ([0, 1], [1, 2], ValueError),
        ([0, 1], [2], ValueError),
    ],
)  # fmt: skip
def test_wrong_copies_are_refused(exact: Backend, sources: list[int], targets: list[int], error: Any) -> None:
    kv = exact.alloc_kv(SPEC, 4)
    with pytest.raises(error):
        exact.copy_blocks(kv, np.array(sources, np.int32), kv, np.array(targets, np.int32))
    with pytest.raises(ValueError, match="different forms"):
        exact.copy_blocks(
            kv,
            np.zeros(1, np.int32),
            exact.alloc_kv(KVSpec(2, 1, 16, 16, "float32"), 4),
            np.zeros(1, np.int32),
        )
