"""Beam search finds the sequences that transformers' ``generate(num_beams=...)`` finds, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from op_backends import cuda

from vllmlite import LLM
from vllmlite.beam_params import BeamOptions, BeamSearchParams
from vllmlite.sampling_params import SamplingParams

ENDS = list(range(3, 300, 40))
"""Enough ids that end a sequence for random models to generate some."""
PROMPTS = [[3, 14, 15, 92, 65], [200, 100, 50, 25, 12, 6, 3, 1, 301, 150, 75, 37], [17]]
FAMILIES = ("Llama", "Qwen2", "Gemma2", "GPT2", "Mixtral", "Qwen3")
PENALTIES = (-1.0, 0.0, 0.6, 1.0, 2.0)


@dataclass
class Pair:
    """An engine, and transformers' model of the same checkpoint."""

    llm: LLM
    model: Any

    def check(self, width: int, penalty: float, early: Any, **options: Any) -> None:
        params = BeamSearchParams(
            beam_width=width, max_tokens=14, length_penalty=penalty, early_stopping=early, **options
        )
        found = self.llm.beam_search(PROMPTS, params)
        for prompt, output in zip(PROMPTS, found, strict=True):
            expected, scores = self.expected(prompt, params)
            included = [
                sequence.tokens + ([] if options.get("include_stop_str_in_output") else end)
                for sequence, end in zip(output.sequences, self.ends(prompt, expected, output), strict=True)
            ]
            assert included == expected, (width, penalty, early, prompt)
            for sequence, whole, score in zip(output.sequences, expected, scores, strict=True):
                length = len(whole) - len(prompt)
                assert sequence.cum_logprob / length**penalty == pytest.approx(score, rel=1e-4, abs=1e-4)

    @staticmethod
    def ends(prompt: list[int], expected: list[list[int]], output: Any) -> list[list[int]]:
        """The ids that ended the sequences, which are not among their tokens."""
        return [
            whole[-1:] if sequence.finish_reason == "stop" else []
            for whole, sequence in zip(expected, output.sequences, strict=True)
        ]

    @torch.inference_mode()
    def expected(
        self, prompt: list[int], params: BeamSearchParams, **options: Any
    ) -> tuple[list[list[int]], list[float]]:
        ids = torch.tensor([prompt])
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.beam_width,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            eos_token_id=None if params.ignore_eos else ENDS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        sequences = []
        for row in made.sequences.tolist():
            generated = row[len(prompt) :]
            if not params.ignore_eos:
                stops = [index for index, token_id in enumerate(generated) if token_id in ENDS]
                generated = generated[: stops[0] + 1] if stops else generated
            sequences.append(prompt + generated)
        return sequences, made.sequences_scores.tolist()


def pair_of(family: str, path: Path, backend: str) -> Pair:
    model = write_checkpoint(path, family, eos_token_id=ENDS, seed=1)
    device = "cuda" if backend == "cuda" else "cpu"
    llm = LLM(
        str(path), backend=backend, device=device, dtype="float32", skip_tokenizer_init=True, block_size=4,
        num_gpu_blocks_override=400, max_model_len=112, max_num_seqs=24,
    )  # fmt: skip
    return Pair(llm, model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of("Llama", tmp_path_factory.mktemp("llama"), "auto")


@pytest.mark.parametrize(("width", "penalty", "early"), [(3, -1.0, False), (8, 2.0, "never")])
def test_equals_transformers(llama: Pair, width: int, penalty: float, early: Any) -> None:
    llama.check(width, penalty, early)


@pytest.mark.slow
def test_equals_transformers_without_ends(llama: Pair) -> None:
    llama.check(4, 1.0, False, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "torch", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_transformers(family: str, backend: str, tmp_path: Path) -> None:
    if backend == "cuda":
        cuda("float32")  # skips the test without a GPU
    pair = pair_of(family, tmp_path, backend)
    families = [*FAMILIES]
    combinations = [*product((2, 4, 8), PENALTIES, (False, True, "never"))]
    # Each family has its share of the combinations; together they have all.
    for width, penalty, early in combinations[families.index(family) :: len(families)]:
        pair.check(width, penalty, early, include_stop_str_in_output=width == 4)


def test_penalties_and_bans_follow_each_beam(llama: Pair) -> None:
    """Counts of penalties and bans of ends fork with the beam; as in transformers, they edit log-probabilities."""
    params = SamplingParams(
        n=4, temperature=0, max_tokens=12, min_tokens=6, repetition_penalty=1.4, beams=BeamOptions(4)
    )
    found = llama.llm.generate(PROMPTS, [params] * len(PROMPTS))
    for prompt, output in zip(PROMPTS, found, strict=True):
        search = BeamSearchParams(beam_width=4, max_tokens=12)
        expected, _ = llama.expected(prompt, search, min_new_tokens=6, repetition_penalty=1.4)
        assert [prompt + completion.token_ids for completion in output.outputs] == expected


def test_load_chunks_and_preemption_change_no_beams(llama: Pair, tmp_path: Path) -> None:
    """Beams in a small cache, with chunked prompts and other requests, in a thread with two steps in flight."""
    params = [beams(4), SamplingParams(temperature=0, max_tokens=40), beams(2), beams(3)] * 2
    prompts = [prompt * (1 + index) for index, prompt in enumerate([*PROMPTS, *PROMPTS, *PROMPTS[:2]])]
    expected = llama.llm.generate(prompts, params)
    write_checkpoint(tmp_path, "Llama", eos_token_id=ENDS, seed=1)
    small = LLM(
        str(tmp_path), dtype="float32", device="cpu", skip_tokenizer_init=True, block_size=4,
        num_gpu_blocks_override=40, max_model_len=112, max_num_seqs=9, max_num_batched_tokens=24,
    )  # fmt: skip
    found = small.generate(prompts, params)
    for one, other in zip(found, expected, strict=True):
        assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]
    assert small.llm_engine.stats().num_preemptions > 0


def beams(width: int) -> SamplingParams:
    return SamplingParams(n=width, temperature=0, max_tokens=16, beams=BeamOptions(width))
