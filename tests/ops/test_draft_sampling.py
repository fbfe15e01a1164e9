"""Several sampled positions of a slot: drafts count as output, and are accepted up to the first that differs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from op_sampling import SPEC, Sampler, read

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import SlotParams


@pytest.fixture
def backend(exact: Backend) -> Backend:
    return exact


@pytest.mark.parametrize("num_logprobs", [-1, 3])
def test_several_positions_of_a_slot_sample_as_in_separate_steps(backend: Backend, num_logprobs: int) -> None:
    """Ids and log-probabilities of a position equal those of a step whose output already holds the drafts before it."""
    rng = np.random.default_rng(5)
    params = [
        SlotParams(),
        SlotParams(presence_penalty=1.5, frequency_penalty=0.7, output_ids=[3, 3, 9]),
        SlotParams(repetition_penalty=1.8, prompt_ids=[1, 4], temperature=0.9, seed=3),
        SlotParams(temperature=1.2, top_k=6, top_p=0.9, seed=8, logit_bias=((2, 1.5),)),
        SlotParams(frequency_penalty=-0.4, temperature=0.7, min_p=0.05, seed=1),
    ]
    drafts = [[5, 5, 2], [7, 3, 7, 7], [], [0], [6, 6, 6, 1, 6, 2, 2, 6]]
    counts = [1 + len(draft) for draft in drafts]
    logits = rng.standard_normal((sum(counts), 12)).astype(np.float32)
    positions = np.concatenate([40 + row + np.arange(count) for row, count in enumerate(counts)])
    masks = {index: rng.random(12) < 0.5 for index in range(0, sum(counts), 4)}
    for allowed in masks.values():
        allowed[11] = True
    sampled, _ = Sampler(backend, params, 12).sample(
        logits, positions, drafts=drafts, masks=masks, num_logprobs=num_logprobs
    )
    ids, index = backend.to_host(sampled.ids).tolist(), 0
    together = read(backend, sampled.logprobs) if num_logprobs >= 0 else ()
    for one, draft in zip(params, drafts, strict=True):
        for before in range(len(draft) + 1):
            alone = replace(one, output_ids=[*one.output_ids, *draft[:before]])
            mask = {0: masks[index]} if index in masks else None
            found, _ = Sampler(backend, [alone], 12).sample(
                logits[index : index + 1], positions[index], masks=mask, num_logprobs=num_logprobs
            )
            assert backend.to_host(found.ids).tolist() == [ids[index]]
            if num_logprobs >= 0:
                for whole, part in zip(together, read(backend, found.logprobs), strict=True):
                    np.testing.assert_array_equal(whole[index], part[0])
            index += 1


def test_drafts_are_accepted_up_to_the_first_that_differs(backend: Backend) -> None:
    params = SlotParams(presence_penalty=100.0)
    sampler = Sampler(backend, [params] * 5, 20)
    drafts = [[1, 2, 3], [1, 9, 3], [], [9, 2], [1, 1, 1]]
    wanted = [[1, 2, 3, 4], [1, 2, 3, 4], [7], [1, 2, 3], [1, 1, 1, 5]]
    chosen = [token for row in wanted for token in row]
    logits = np.full((len(chosen), 20), -500.0)
    logits[np.arange(len(chosen)), chosen] = 500
    sampled, accepted = sampler.sample(logits, drafts=drafts)
    assert backend.to_host(sampled.ids).tolist() == chosen
    assert accepted.tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert sampler.last_ids() == [4, 2, 7, 1, 5]
    # What was accepted is now penalised, and nothing else.
    found = sampler.ids(-np.arange(20.0))
    assert found == [0, 0, 0, 0, 0]
    allowed = np.arange(20) != 0
    assert sampler.ids(-np.arange(20.0), masks=dict.fromkeys(range(5), allowed)) == [5, 3, 1, 2, 2]


def test_sampling_does_not_change_the_slots(backend: Backend) -> None:
    sampler = Sampler(backend, [SlotParams(presence_penalty=9.0), SlotParams()], 6)
    assert sampler.ids(np.eye(6)[[4, 2]]) == [4, 2]
    batch = sampler.upload([0, 1], 1)
    logits = np.array([[0, 1, 0, 0, 9.5, 0], [0, 3, 0, 0, 0, 0]], np.float32)
    for _ in range(3):
        device = backend.upload(batch, sampler.slots, SPEC)
        sampled = backend.sample(backend.tensor(logits.copy()), sampler.slots, device)
        assert backend.to_host(sampled.ids).tolist() == [1, 1]
        assert sampler.last_ids() == [4, 2]


def test_sampled_positions_of_a_slot_must_be_in_a_row(backend: Backend) -> None:
    if backend.name == "torch":
        pytest.skip("the reference trusts its caller")
    sampler = Sampler(backend, [SlotParams()] * 2, 6)
    batch = sampler.upload([0, 1], 1, [[1], [2]])
    batch.sample_slots = np.array([0, 1, 0, 1], np.int32)
    with pytest.raises(ValueError, match="sampled positions of slot 0 are not in a row"):
        backend.upload(batch, sampler.slots, SPEC)
