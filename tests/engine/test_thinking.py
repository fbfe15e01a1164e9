"""thinking_token_budget, the most tokens in a section of reasoning."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.engine.thinking import ReasoningMarks, ThinkingBudget
from vllmlite.errors import ParameterError

PROMPT = "The Debian Project is"
MARKS = {"reasoning_start_str": " Project", "reasoning_end_str": " kernel"}
BUDGETS = (None, 0, 1, 7)


def forced(budget: ThinkingBudget) -> int | None:
    mask = budget.masks()[0]
    if mask is None:
        return None
    bits = int.from_bytes(mask, "little")
    assert bits.bit_count() == 1
    return bits.bit_length() - 1


@given(
    opening=st.lists(st.integers(1, 2), min_size=1, max_size=2),
    closing=st.lists(st.integers(2, 3), min_size=1, max_size=3),
    limit=st.integers(0, 4),
    prompt=st.lists(st.integers(1, 4), max_size=6),
    wishes=st.lists(st.integers(1, 4), max_size=30),
)
def test_no_section_is_longer_than_its_budget(
    opening: list[int], closing: list[int], limit: int, prompt: list[int], wishes: list[int]
) -> None:
    """``wishes`` are the ids that the model samples where no id is forced."""
    marks = ReasoningMarks(tuple(opening), tuple(closing))
    budget = ThinkingBudget(marks, limit, prompt, 100)
    written: list[int] = []
    run = 0  # forced ids in a row
    for wish in wishes:
        wanted = forced(budget)
        run = run + 1 if wanted is not None else 0
        assert run <= len(closing)
        written.append(wish if wanted is None else wanted)
        budget.accept(written[-1])
        if run == len(closing):
            assert written[-run:] == closing
            run = 0
    again = ThinkingBudget(marks, limit, prompt, 100)
    for token_id in [9, 9, 9]:
        again.accept(token_id)
    again.restart()
    for token_id in written:
        again.accept(token_id)
    assert forced(again) == forced(budget)


def test_reasoning_in_the_prompt_counts() -> None:
    marks = ReasoningMarks((1,), (2,))
    assert forced(ThinkingBudget(marks, 2, [5, 1, 6, 7], 40)) == 2
    assert forced(ThinkingBudget(marks, 3, [5, 1, 6, 7], 40)) is None
    assert forced(ThinkingBudget(marks, 0, [5, 1, 6, 2, 7], 40)) is None


def texts(llm: LLM, **options: Any) -> list[list[int]]:
    params = [
        SamplingParams(
            temperature=1.0, seed=5, max_tokens=30, thinking_token_budget=budget, ignore_eos=True, **options
        )
        for budget in BUDGETS
    ]
    outputs = llm.generate([PROMPT + " a" * index for index in range(len(BUDGETS))], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@needs_native_cpu
def test_outputs_are_the_same_alone_in_batches_in_chunks_and_after_preemption() -> None:
    options: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "reasoning_config": MARKS,
    }
    llm = LLM(**options)
    tokenizer = llm.get_tokenizer()
    (closing,) = tokenizer.encode(MARKS["reasoning_end_str"], False)
    expected = texts(llm)
    for index, budget in enumerate(BUDGETS):
        if budget is not None:
            prompt = tokenizer.encode(PROMPT + " a" * index, False)
            (opening,) = tokenizer.encode(MARKS["reasoning_start_str"], False)
            thought = len(prompt) - 1 - prompt.index(opening)
            assert closing in expected[index][: max(budget - thought, 0) + 1]
    others: tuple[dict[str, Any], ...] = (
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 4, "max_num_seqs": 4},
        {"num_gpu_blocks_override": 9},
    )
    for other in others:
        assert texts(LLM(**options, **other)) == expected


def test_a_budget_can_be_combined_with_structured_output() -> None:
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar)")
    from vllmlite import StructuredOutputsParams
    from vllmlite.sampling_params import ThinkingMarks

    llm = LLM(dtype="float32", device="cpu", max_model_len=128, reasoning_config=MARKS)
    (closing,) = llm.get_tokenizer().encode(MARKS["reasoning_end_str"], False)
    structure = StructuredOutputsParams(regex="[0-9]{3}", after=ThinkingMarks(closing, None))
    params = SamplingParams(
        temperature=1, seed=2, max_tokens=40, structured_outputs=structure, thinking_token_budget=6,
        logit_bias={closing: -100.0},
    )  # fmt: skip
    (completion,) = llm.generate("The Project", params, use_tqdm=False)[0].outputs
    ids = list(completion.token_ids)
    assert ids.index(closing) == 6 and completion.finish_reason == "stop"
    assert llm.get_tokenizer().decode(ids[7:]).isdigit()


@pytest.mark.parametrize("prompt", ["The Project", "The thing"])
def test_no_mark_is_forced_into_structured_output(prompt: str) -> None:
    pytest.importorskip("xgrammar", reason="needs xgrammar (Debian: python3-xgrammar)")
    from vllmlite import StructuredOutputsParams

    llm = LLM(dtype="float32", device="cpu", max_model_len=64, reasoning_config=MARKS)
    (opening,) = llm.get_tokenizer().encode(MARKS["reasoning_start_str"], False)
    for regex in ("[0-9]{12}", " Project[0-9]{12}"):
        structure = StructuredOutputsParams(regex=regex)
        params = SamplingParams(
            temperature=1, seed=2, max_tokens=40, structured_outputs=structure, thinking_token_budget=6,
            logit_bias={opening: 100.0},
        )  # fmt: skip
        (completion,) = llm.generate(prompt, params, use_tqdm=False)[0].outputs
        assert re.fullmatch(regex, completion.text) and completion.finish_reason == "stop"


def test_a_budget_that_cannot_be_enforced_is_refused() -> None:
    plain = LLM(dtype="float32", device="cpu", max_model_len=64)
    with pytest.raises(ParameterError, match="reasoning_config"):
        plain.generate(PROMPT, SamplingParams(thinking_token_budget=3), use_tqdm=False)
    assert plain.generate(PROMPT, SamplingParams(thinking_token_budget=-1, max_tokens=2), use_tqdm=False)
    with pytest.raises(ParameterError, match="thinking_token_budget"):
        SamplingParams(thinking_token_budget=-2)
    with pytest.raises(ParameterError, match="reasoning_start_str"):
        LLM(reasoning_config={"start": "<think>"})
    llm = LLM(dtype="float32", device="cpu", max_model_len=64, reasoning_config=MARKS)
    with pytest.raises(ParameterError, match="closing mark"):
        llm.generate(PROMPT, SamplingParams(thinking_token_budget=3, allowed_token_ids=[5]), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
