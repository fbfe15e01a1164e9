"""Drafts that are looked up in texts: the native index against the reference, and the reference against examples."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from native import HAS_NATIVE_CPU, needs_native_cpu

from vllmlite.backends.native import load_extension
from vllmlite.runner.propose import reference
from vllmlite.runner.propose.lookup import LookupProposer
from vllmlite.runner.propose.reference import DraftLimits, frequent_draft

MODULES = [reference, *([load_extension("_cpu")] if HAS_NATIVE_CPU else [])]
KINDS: dict[str, Callable[[Any, random.Random], Any]] = {
    "ngram": lambda module, draw: module.NgramSequences(3, *sorted((draw.randint(1, 2), draw.randint(1, 5)))),
    "suffix": lambda module, draw: module.SuffixSequences(
        3,
        draw.randint(3, 12),
        draw.choice([0.5, 1.0, 2.0]),
        draw.choice([0.0, 0.1, 0.4]),
        draw.choice([0, 1, 2, 5]),
    ),
}


@needs_native_cpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_the_native_index_proposes_what_the_reference_does(kind: str, seed: int) -> None:
    """With sequences that change slots, results of steps that began before, and texts that repeat themselves."""
    native, python = (
        KINDS[kind](module, random.Random(seed)) for module in (load_extension("_cpu"), reference)
    )
    draw = random.Random(seed)
    vocabulary = draw.choice([1, 2, 3, 8])
    proposed = 0

    def ids(most: int, least: int = 0) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(least, most))]

    launched = [0, 0]
    for _ in range(100):
        for slot in range(3):
            if not launched[-1] or draw.random() < 0.05:
                text = ids(30, 1)
                num_prompt = draw.randint(1, len(text))
                for sequences in (native, python):
                    sequences.admit(slot, text, num_prompt)
        assert native.num_admissions == python.num_admissions
        launched.append(native.num_admissions)
        step = launched[-1 if draw.random() < 0.8 else -2], [ids(4, 1) for _ in range(3)]
        wanted = [draw.randint(0, 6) for _ in range(3)]
        found = [sequences.propose([0, 1, 2], *step, wanted) for sequences in (native, python)]
        assert found[0] == found[1]
        proposed += sum(map(len, found[0]))
    assert proposed


@needs_native_cpu
def test_the_native_index_checks_what_it_is_given() -> None:
    sequences = load_extension("_cpu").NgramSequences(1, 1, 2)
    with pytest.raises(IndexError, match="no slot 1"):
        sequences.admit(1, [5], 1)
    with pytest.raises(ValueError, match="not of one length"):
        sequences.propose([0], 1, [[5]], [])
    assert sequences.propose([0], 1, [[5]], [3]) == [[]]  # nothing was admitted


def test_a_draft_continues_the_first_occurrence_of_the_longest_ngram() -> None:
    def drafts(ids: list[int], shortest: int = 1, longest: int = 3) -> list[int]:
        return ids[reference.after_first_match(ids, shortest, longest) :][:3]

    assert drafts([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]) == [4, 9, 2]
    assert drafts([3, 8, 1, 2, 3, 5, 9, 2, 3]) == [5, 9, 2]
    assert drafts([3, 8, 1, 2, 3]) == [8, 1, 2]
    assert drafts([3, 8, 1, 2, 3], shortest=2) == []
    assert drafts([1, 1, 1, 1]) == [1]
    assert drafts([1]) == []


def test_a_draft_is_as_long_as_its_counts_justify() -> None:
    def draft(text: list[int], **limits: Any) -> tuple[list[int], float]:
        given = {"count": 8, "depth": 24, "factor": 1.0, "least_probability": 0.1, **limits}
        return frequent_draft(text, text, DraftLimits(**given))

    often = [1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3, 7, 5, 1, 2]
    drafts, score = draft(often, factor=9.0, count=4)
    assert drafts == [3, 7, 1, 2]  # 1 followed the 7 once, as did 5, but earlier
    assert score == pytest.approx(1 + 2 / 3 + 1 / 3 + 1 / 3)
    assert draft(often, factor=9.0, least_probability=0.5)[0] == [3, 7]
    assert draft(often, factor=9.0, least_probability=0.7)[0] == [3]
    assert draft(often)[0] == [3, 7]  # after a match of two ids
    assert draft(often, depth=3)[0] == [3]
    assert draft([5, 6]) == ([], 0.0)


@pytest.mark.parametrize("earlier", [0, 4])
def test_a_draft_may_come_from_an_earlier_output_but_not_from_its_prompt(earlier: int) -> None:
    for module in MODULES:
        proposer = LookupProposer(module.SuffixSequences(1, 24, 1.0, 0.1, earlier))
        proposer.admit(0, [50, 51, 52], 2)
        proposer.collect(proposer.launch([0]), [[53, 54, 55]], [0])
        proposer.admit(0, [9], 1)
        assert proposer.collect(proposer.launch([0]), [[50]], [3]) == [[]]
        assert proposer.collect(proposer.launch([0]), [[52, 53]], [3]) == [[54, 55] if earlier else []]
        for prompt in range(earlier + 1):  # each of these has an output
            proposer.admit(0, [prompt, 99], 1)
        proposer.admit(0, [9], 1)
        assert proposer.collect(proposer.launch([0]), [[52, 53]], [3]) == [[]]


def test_a_step_that_was_launched_before_a_slot_changed_hands_is_ignored() -> None:
    for module in MODULES:
        proposer = LookupProposer(module.NgramSequences(1, 1, 1))
        proposer.admit(0, [1, 2, 1], 3)
        step = proposer.launch([0])
        proposer.admit(0, [5, 6, 5], 3)
        assert proposer.collect(step, [[2]], [2]) == [[]]
        assert proposer.collect(proposer.launch([0]), [[6]], [1]) == [[5]]
