"""Unseeded sampling with drafts follows the model's exact distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from drafting import KnownText, let_drafts_pay
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.backends.batch import SlotParams
from vllmlite.hub import BUILT_IN
from vllmlite.runner.propose.rejection import RejectionSampler
from vllmlite.runner.runner import ModelRunner

PROMPT = "The Debian Project is a"
EACH, REQUESTS = 125, 12
LENGTH = 3
"""Tokens of a sequence that are compared; all but the first are drafted."""
MOST = 4
"""Ids of each position that can be sampled: ``top_k``."""
Context = tuple[int, ...]


class Likely(KnownText):
    """Proposes the most likely ids, one after the other."""

    def __init__(self, best: dict[Context, int]) -> None:
        super().__init__()
        self._best = best

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        super().admit(slot, token_ids[num_prompt:], 0)

    def drafts(self, known: Sequence[int], count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count and (context := (*known, *found)) in self._best:
            found.append(self._best[context])
        return found


def probabilities(
    logprobs: np.ndarray[Any, Any], params: SamplingParams, output: Sequence[int]
) -> dict[int, float]:
    """Return the exact distribution of the id after ``output`` by the definitions of the parameters."""
    logits = logprobs.astype(np.float64)
    for token_id, count in Counter(output).items():
        logits[token_id] -= params.frequency_penalty * count + params.presence_penalty
    logits /= params.temperature
    kept = np.argsort(-logits, kind="stable")[: params.top_k]
    weights = np.exp(logits[kept] - logits[kept].max())
    weights /= weights.sum()
    nucleus = np.cumsum(weights) - weights < params.top_p
    return dict(
        zip(kept[nucleus].tolist(), (weights[nucleus] / weights[nucleus].sum()).tolist(), strict=True)
    )


DRAWN = {
    "method": "draft_model", "model": str(BUILT_IN), "quantization": "int4", "draft_sample_method": "probabilistic"
}  # fmt: skip


@cache
def start(drawn: bool) -> LLM:
    options = DRAWN if drawn else {"method": "ngram"}
    made = LLM(
        seed=1, device="cpu", dtype="float32", max_model_len=64, max_num_seqs=64, max_logprobs=-1,
        speculative_config={**options, "num_speculative_tokens": LENGTH},
    )  # fmt: skip
    let_drafts_pay(made)
    return made


@needs_native_cpu
@pytest.mark.parametrize(
    "drawn", [pytest.param(False, id="likely"), pytest.param(True, id="drawn", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"temperature": 1.0}, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.7, "top_p": 0.85}, marks=pytest.mark.slow),
        {"temperature": 1.2, "presence_penalty": 0.8, "frequency_penalty": 0.6},
    ],
    ids=["temperature", "top_p", "penalties"],
)
def test_drafts_do_not_change_the_distribution(
    options: dict[str, Any], drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a chi-square test of all sequences of three ids; random numbers follow from the engine's seed, so that the
    test always ends in the same way. Drafts are the most likely ids, or drawn from a distribution that is unlike the
    model's, and verified by rejection sampling. The repetition penalty depends on the signs of logits, which
    log-probabilities do not have, and is left out."""
    llm = start(drawn)
    runner = cast(ModelRunner, llm.llm_engine.engine.runner)
    params = SamplingParams(top_k=MOST, max_tokens=LENGTH + 1, n=EACH, ignore_eos=True, **options)
    prompt = llm.get_tokenizer().encode(PROMPT)
    expected, best = distribution(llm, prompt, params)
    if drawn:
        draft_params = RejectionSampler.draft_params

        def flatter(self: RejectionSampler, slot: int) -> SlotParams:
            own = draft_params(self, slot)
            return replace(own, temperature=3 * own.temperature, top_k=2 * MOST, top_p=1.0)

        monkeypatch.setattr(RejectionSampler, "draft_params", flatter)
    else:
        monkeypatch.setattr(runner, "proposer", Likely(best))
    before = replace(llm.llm_engine.stats())
    outputs = llm.generate([{"prompt_token_ids": prompt}] * REQUESTS, params, use_tqdm=False)
    drafts = llm.llm_engine.stats().drafts_since(before)
    assert drafts is not None and 300 < drafts.accepted < drafts.drafted - 300
    check_frequencies(Counter(tuple(c.token_ids[:LENGTH]) for o in outputs for c in o.outputs), expected)


def distribution(
    llm: LLM, prompt: list[int], params: SamplingParams
) -> tuple[dict[Context, float], dict[Context, int]]:
    """Return the exact probabilities of all sequences of :data:`LENGTH` ids after ``prompt``, and the most likely id
    after each shorter one."""
    expected: dict[Context, float] = {(): 1.0}
    best: dict[Context, int] = {}
    for _ in range(LENGTH):
        contexts = list(expected)
        asked = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)
        answers = llm.generate([{"prompt_token_ids": [*prompt, *c]} for c in contexts], asked, use_tqdm=False)
        longer: dict[Context, float] = {}
        for context, answer in zip(contexts, answers, strict=True):
            (found,) = cast(Any, answer.outputs[0].logprobs)
            logprobs = np.array([found[token_id].logprob for token_id in range(len(found))])
            chances = probabilities(logprobs, params, context)
            best[context] = max(chances, key=lambda token_id: chances[token_id])
            for token_id, chance in chances.items():
                longer[(*context, token_id)] = expected[context] * chance
        expected = longer
    return expected, best


def check_frequencies(counts: Counter[Context], expected: dict[Context, float]) -> None:
    """Compare the numbers of sequences with their probabilities."""
    total = counts.total()
    assert set(counts) <= set(expected)
    frequent = [key for key, chance in expected.items() if chance * total >= 5]
    observed = np.array([*(counts[key] for key in frequent), total - sum(counts[key] for key in frequent)])
    likely = np.array([expected[key] for key in frequent])
    wanted = total * np.append(likely, 1 - likely.sum())
    chi_square = float(((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum())
    freedom = len(frequent)
    # Wilson and Hilferty's approximation: one in 10,000 is larger.
    assert (chi_square / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 3.7 * (2 / (9 * freedom)) ** 0.5


def test_a_draft_that_is_left_out_of_the_step_is_verified() -> None:
    """A grammar leaves out drafts that it forbids, whose positions would else follow p too often where q is higher."""
    target = np.array([0.5, 0.2, 0.3, 0.0], np.float32)
    other = np.array([0.1, 0.3, 0.2, 0.4], np.float32)
    counts: Counter[Context] = Counter()
    draw = np.random.default_rng(5)
    for seed in range(3000):
        sampler = RejectionSampler(cast(Any, SimpleNamespace(gives_probabilities=True)))
        sampler.admit(0, SlotParams(temperature=1.0, seed=seed))
        sampler.begin([0])
        place = int(other.cumsum().searchsorted(draw.random() * other.sum()))
        sampler.add(0, 7, place, place, other)
        (found,) = sampler._verified(0, [], 7, target[None])
        counts[(found,)] += 1
    check_frequencies(counts, {(token_id,): float(p) for token_id, p in enumerate(target) if p})


@pytest.mark.parametrize("similar", [False, True])
def test_rejection_sampling_follows_the_target(similar: bool) -> None:
    """For random distributions of the model and the drafter, of which each has ids that the other has not."""
    draw, samples = np.random.default_rng(3), 3000
    targets = draw.dirichlet(np.ones(5), 3).astype(np.float32)
    targets[1, 2] = 0.0
    targets /= targets.sum(1, keepdims=True)
    others = draw.dirichlet(np.ones(4), 2).astype(np.float32)
    if similar:
        others = (targets[:2, :4] + np.float32(0.02)) / (targets[:2, :4] + np.float32(0.02)).sum(
            1, keepdims=True
        )
    ids = np.array([0, 1, 2, 4], np.int32)
    counts: Counter[Context] = Counter()
    for seed in range(samples):
        sampler = RejectionSampler(cast(Any, SimpleNamespace(gives_probabilities=True)))
        sampler.admit(0, SlotParams(temperature=1.0, seed=seed))
        sampler.begin([0])
        drafts = []
        for number, other in zip(draw.random(2), others, strict=True):
            place = int(other.cumsum().searchsorted(number * other.sum()))
            drafts.append(int(ids[place]))
            sampler.add(0, 6 + len(drafts), drafts[-1], place, other, ids)
        found = sampler._verified(0, drafts, 7, targets)
        counts[(found[0], found[1] if len(found) > 1 else -1)] += 1
    first, second = (
        Counter([found[:1] for found in counts.elements()]),
        Counter([found[1:] for found in counts.elements() if found[1:] != (-1,)]),
    )
    for seen, target in ((first, targets[0]), (second, targets[1])):
        check_frequencies(seen, {(token_id,): float(p) for token_id, p in enumerate(target)})
    overlap = float(np.minimum(targets[0][ids], others[0]).sum())
    assert abs(second.total() / samples - overlap) < 0.04  # the highest possible rate of acceptance
