"""The built-in model's own EAGLE-3 head: it guesses most of the model's answers, and never changes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from drafting import let_drafts_pay
from native import needs_native_cpu

import vllmlite
from vllmlite import LLM, SamplingParams
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.hub import BUILT_IN, built_in_draft

DRAFTS = 4
LEAST_TOKENS = 3.0
"""Least tokens a verification, the bonus token included; 4.0 were measured."""
QUESTIONS = (
    "What is Debian?",
    "How do I install a package?",
    "What is systemd?",
    "What does the command ls do?",
    "What is a mirror?",
)
PROMPTS = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
HEAD = built_in_draft("eagle3")
MANIFEST: dict[str, Any] = json.loads((HEAD / "manifest.json").read_text("utf-8"))


def answers(llm: LLM, **options: Any) -> list[list[int]]:
    params = SamplingParams(max_tokens=64, **options)
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def engines() -> tuple[LLM, LLM]:
    """The built-in model without drafts, and with those of its own head."""
    drafting = LLM(
        device="cpu",
        max_model_len=256,
        speculative_config={"method": "eagle3", "num_speculative_tokens": DRAFTS},
    )
    let_drafts_pay(drafting)
    return LLM(device="cpu", max_model_len=256), drafting


@needs_native_cpu
def test_most_drafts_are_accepted_and_the_answers_are_the_same(engines: tuple[LLM, LLM]) -> None:
    plain, drafting = engines
    assert answers(drafting, temperature=0) == answers(plain, temperature=0)
    stats = drafting.llm_engine.engine.stats
    assert 1 + stats.num_accepted_tokens / stats.num_drafts >= LEAST_TOKENS


@needs_native_cpu
def test_sampled_answers_are_the_same(engines: tuple[LLM, LLM]) -> None:
    plain, drafting = engines
    assert answers(drafting, temperature=0.8, seed=3) == answers(plain, temperature=0.8, seed=3)


def test_other_models_need_a_named_head() -> None:
    with pytest.raises(ParameterError, match="needs a checkpoint"):
        EngineConfig(model="other", speculative_config={"method": "eagle3"})


def test_the_files_match_the_manifest() -> None:
    assert {path.name for path in HEAD.iterdir()} == {*MANIFEST["files"], "manifest.json"}
    for name, digest in MANIFEST["files"].items():
        assert hashlib.sha256((HEAD / name).read_bytes()).hexdigest() == digest, name
    assert hashlib.sha256((BUILT_IN / "model.safetensors").read_bytes()).hexdigest() == MANIFEST["model"]
    drafts = Path(vllmlite.__file__).parent / "data" / "drafts"
    assert sum(path.stat().st_size for path in drafts.rglob("*")) <= 4 * 2**20
