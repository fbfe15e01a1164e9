"""Requests with different adapters in one batch: however it is scheduled, each has the result that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, write_checkpoint
from native import needs_native_cpu
from peft_files import random_factors, write_peft

from vllmlite import LLM, SamplingParams
from vllmlite.lora.request import LoRARequest
from vllmlite.outputs import RequestOutput

HIDDEN, INNER = TINY["hidden_size"], TINY["intermediate_size"]
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "skip_tokenizer_init": True, "threads": 1, "max_num_seqs": 8, "enable_lora": True,
    "max_loras": 2, "num_gpu_blocks_override": 64, "max_model_len": 128, "block_size": 4,
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
ENGINES: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 8},
    "preempted": {"num_gpu_blocks_override": 32, "max_num_seqs": 7, "enable_prefix_caching": False},
    "two steps": {"async_scheduling": True, "enable_prefix_caching": False},
    "speculating": {"speculative_config": NGRAM},
    "eager": {"enforce_eager": True},
}
BACKENDS = [pytest.param("cpu", marks=needs_native_cpu), "cuda"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=1)
SEEDED = SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=1)
SHARED = [7, 8, 9, 10, 7, 8, 9, 11, 12, 7, 8, 9]
PROMPTS: list[Any] = [SHARED, [*SHARED, 40], [5, 17, 200], SHARED, [*SHARED, 41], [*range(20, 60)], SHARED]
NAMES = ["one", "two", "", "", "one", "two", "three"]
"""The adapter of each prompt."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint ``base`` and three adapters of different modules and ranks."""
    path = tmp_path_factory.mktemp("lora")
    write_checkpoint(path / "base")
    attention = {
        f"model.layers.{layer}.self_attn.{name}_proj": (out, HIDDEN)
        for layer in range(3)
        for name, out in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN))
    }
    mlp = {
        f"model.layers.{layer}.mlp.{name}_proj": shape
        for layer in range(3)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER)))
    }
    for seed, (name, modules) in enumerate((("one", attention | mlp), ("two", attention), ("three", mlp))):
        write_peft(path / name, random_factors(modules, 3 + 4 * seed, seed), lora_alpha=1)
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint ``base`` of a mixture of experts, and three adapters: of the embedding, the output
    layer and a router; of experts and attention; and one that replaces embedding and
    output layer, and changes attention with DoRA."""
    path = tmp_path_factory.mktemp("mixture")
    write_checkpoint(path / "base", "Mixtral", num_local_experts=4, num_experts_per_tok=2)
    size, layer = TINY["vocab_size"], "model.layers.1."
    rng = np.random.default_rng(0)
    q = {f"{layer}self_attn.q_proj": (HIDDEN, HIDDEN)}
    a, b = random_factors({"embed": (HIDDEN, size)}, 4)["embed"]
    write_peft(
        path / "one",
        random_factors({"lm_head": (size, HIDDEN), f"{layer}block_sparse_moe.gate": (4, HIDDEN)}, 4),
        more={"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b},
        target_modules=["embed_tokens", "lm_head", "1.block_sparse_moe.gate"],
        lora_alpha=1,
    )
    experts = random_factors({"up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}, 3 * 4)
    more = {
        f"{layer}mlp.experts.{wrapped}lora_{factor}.weight": values
        for wrapped, name in (("base_layer.", "up"), ("", "down"))
        for factor, values in zip("AB", experts[name], strict=True)
    }
    targets = [f"1.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    write_peft(
        path / "two",
        random_factors(q, 3),
        more=more,
        target_parameters=targets,
        target_modules=["1.self_attn.q_proj"],
    )
    vector = {
        f"{layer}self_attn.q_proj.lora_magnitude_vector": rng.uniform(0.5, 2, HIDDEN).astype(np.float32)
    }
    tables = {name: rng.standard_normal((size, HIDDEN)) for name in ("lm_head", "model.embed_tokens")}
    write_peft(
        path / "three",
        random_factors(q, 3),
        more=vector | {f"{name}.weight": (0.1 * table).astype(np.float32) for name, table in tables.items()},
        target_modules=["1.self_attn.q_proj"],
        use_dora=True,
        modules_to_save=["lm_head", "embed_tokens"],
    )
    return path


def make(path: Path, backend: str, **options: Any) -> LLM:
    if backend == "cuda":
        pytest.importorskip("vllmlite._cuda", reason="vllmlite._cuda is not built")
    return LLM(str(path / "base"), backend=backend, device=backend, **OPTIONS | options)


def request_of(path: Path, name: str) -> LoRARequest | None:
    return LoRARequest(name, 1 + NAMES.index(name), str(path / name)) if name else None


def seen(output: RequestOutput) -> list[Any]:
    return [(each.token_ids, each.logprobs) for each in output.outputs]


_ALONE: dict[tuple[Path, str, bool], list[list[Any]]] = {}


def alone(path: Path, backend: str, params: SamplingParams) -> list[list[Any]]:
    """What each request gets from an engine without a prefix cache that runs nothing else."""
    key = path, backend, params.temperature == 0
    if key not in _ALONE:
        llm = make(path, backend, enable_prefix_caching=False)
        _ALONE[key] = [
            seen(llm.generate([prompt], params, lora_request=request_of(path, name), use_tqdm=False)[0])
            for prompt, name in zip(PROMPTS, NAMES, strict=True)
        ]
    return _ALONE[key]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_batch_equals_each_request_alone(path: Path, backend: str, engine: str) -> None:
    """Bit for bit, also the second time, when prefixes are cached: by adapter."""
    compare(path, backend, engine)


@needs_native_cpu
@pytest.mark.parametrize("engine", ["chunked", "preempted", "speculating"])
def test_adapters_of_other_weights_depend_on_nothing_else_either(mixture: Path, engine: str) -> None:
    compare(mixture, "cpu", engine)


def compare(path: Path, backend: str, engine: str) -> None:
    llm = make(path, backend, **ENGINES[engine])
    requests = [request_of(path, name) for name in NAMES]
    for params in (GREEDY, SEEDED, GREEDY):
        expected = alone(path, backend, params)
        assert len({str(each[0][0]) for each in (expected[0], expected[3], expected[6])}) == 3
        found = llm.generate(PROMPTS, params, lora_request=requests, use_tqdm=False)
        assert [seen(output) for output in found] == expected
    engine_core = llm.llm_engine.engine
    assert (engine_core.scheduler.num_preemptions > 0) == (engine == "preempted")
    if engine == "speculating":
        assert engine_core.stats.num_accepted_tokens > 0
