"""Every model family but the first four, in each of its layouts, against transformers on tiny random checkpoints."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from checkpoints import TINY, write_checkpoint
from model_runs import chunked, edit_config, expected_logits, greedy, paged_model, prompts
from native import needs_native_cpu
from paged import PagedModel, stored_data

from vllmlite import LLM, SamplingParams
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.cuda import CudaBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.cli import env
from vllmlite.errors import BackendError, ModelError
from vllmlite.models import load_model, open_model, plan_model, read_spec
from vllmlite.models.families import FAMILIES
from vllmlite.models.plan import declining
from vllmlite.quantize import quantize_checkpoint
from vllmlite.weights.packing import Packing

MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
    },
    "max_position_embeddings": 512,
}
TWO_ROPES: dict[str, Any] = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {}),
    "phi3-sliding-partial": (
        "Phi3",
        {"sliding_window": 9, "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope-short": ("Phi3", LONGROPE | {"original_max_position_embeddings": 256}),
    "phi3-longrope-long": ("Phi3", LONGROPE | {"original_max_position_embeddings": 8}),
    "gemma": ("Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 11, "layer_types": None} | TWO_ROPES),
    "gemma3-cap": (
        "Gemma3",
        {"head_dim": 16, "final_logit_softcapping": 3.0, "num_hidden_layers": 7},
    ),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-sliding": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [1, 0, 1]},
    ),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True}),
    "stablelm-12b": ("StableLm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 56}),
    "qwen2-moe-some": (
        "Qwen2Moe",
        MOE
        | {"shared_expert_intermediate_size": 56, "decoder_sparse_step": 2, "norm_topk_prob": True}
        | {"num_hidden_layers": 4, "mlp_only_layers": [3]},
    ),
    "qwen3-moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True}),
    "qwen2-moe-sliding": (
        "Qwen2Moe",
        MOE
        | {"shared_expert_intermediate_size": 56, "use_sliding_window": True, "sliding_window": 7}
        | {"num_hidden_layers": 4, "max_window_layers": 3},
    ),
    "qwen3-moe-sliding": ("Qwen3Moe", MOE | {"use_sliding_window": True, "sliding_window": 7}),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9},
    ),
    "gpt2": ("GPT2", {"n_inner": None}),
    "gpt2-untied": ("GPT2", {"n_inner": 80, "tie_word_embeddings": False}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-350m": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 40, "do_layer_norm_before": False}),
    "opt-no-bias": ("OPT", {"ffn_dim": 96, "enable_bias": False, "activation_function": "gelu"}),
    "neox": ("GPTNeoX", {}),
    "neox-sequential": (
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "falcon-7b": ("Falcon", {}),
    "falcon-40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-11b": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "bloom": ("Bloom", {}),
    "bloom-six-heads": ("Bloom", {"n_head": 6, "hidden_size": 48}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path, device: str) -> None:
    """Compares logits of prompts fed whole, token by token, and in ragged chunks among others, and 64 greedy tokens. On
    the native backends the logits are also the same bits however the prompt is split."""
    family, changes = CASES[case]
    reference = write_checkpoint(tmp_path, family, **changes)
    if device == "native-cuda" and (reason := declining(plan_model(tmp_path)).get("cuda")):
        pytest.skip(reason)
    sequences = prompts()
    if case == "phi3-longrope-long":
        sequences = [sequence for sequence in sequences if len(sequence) > 8]
    expected = [expected_logits(reference, sequence, False) for sequence in sequences]
    scale = max(float(np.abs(logits).max()) for logits in expected)
    paged = paged_model(tmp_path, device)
    single = [chunked(paged, [sequence], "whole")[0] for sequence in sequences]
    for how in ("whole", "ragged"):
        for row, (found, wanted) in enumerate(zip(chunked(paged, sequences, how), expected, strict=True)):
            assert float(np.abs(found - wanted).max()) <= 1e-4 * scale, f"{how}, row {row}"
            if device.startswith("native"):
                assert found.tobytes() == single[row].tobytes(), f"{how}, row {row}"
    ours, theirs = greedy(paged, reference, sequences)
    assert ours == theirs


def need_gpu() -> None:
    try:
        CudaBackend()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", ["gemma2", "olmo2", "qwen2-moe", "opt-350m", "neox", "falcon-rw"])
@pytest.mark.parametrize("backend", ["cpu", "cuda", "torch"])
def test_preemption_and_graphs_do_not_change_the_text(case: str, backend: str, tmp_path: Path) -> None:
    """The text of an engine whose cache is too small for all requests equals that of one with enough blocks, and that
    of one that runs eagerly."""
    if backend == "cpu":
        pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")
    if backend == "cuda":
        need_gpu()
    family, changes = CASES[case]
    write_checkpoint(tmp_path, family, **changes | {"eos_token_id": None})
    texts = []
    for blocks, eager in ((200, False), (14, False), (200, True)):
        llm = LLM(
            str(tmp_path),
            backend=backend,
            device="cuda" if backend == "cuda" else "cpu",
            dtype="float32",
            enforce_eager=eager,
            skip_tokenizer_init=True,
            num_gpu_blocks_override=blocks,
            block_size=8,
            max_model_len=100,
            max_num_batched_tokens=24,
        )
        outputs = llm.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts()[:6]],
            SamplingParams(temperature=0, max_tokens=24, detokenize=False),
        )
        texts.append([output.outputs[0].token_ids for output in outputs])
        preemptions = llm.llm_engine.stats().num_preemptions
        assert (preemptions > 0) == (blocks == 14)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "qwen2-moe", "gpt2", "falcon-rw", "olmo2"])
def test_batch_invariant_text(case: str, tmp_path: Path) -> None:
    """In bfloat16 on a GPU, the text is the same with and without captured steps, and with requests one by one."""
    need_gpu()
    family, changes = CASES[case]
    write_checkpoint(tmp_path, family, dtype="bfloat16", **changes | {"eos_token_id": None})
    texts = []
    for rows, eager in ((8, False), (8, True), (1, False)):
        llm = LLM(
            str(tmp_path),
            backend="cuda",
            dtype="bfloat16",
            batch_invariant=True,
            enforce_eager=eager,
            skip_tokenizer_init=True,
            num_gpu_blocks_override=200,
            block_size=8,
            max_model_len=100,
            max_num_seqs=rows,
        )
        outputs = llm.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts()],
            SamplingParams(temperature=0, max_tokens=24, detokenize=False),
        )
        texts.append([output.outputs[0].token_ids for output in outputs])
    assert texts[0] == texts[1] == texts[2]


SIXTEEN = ["gemma", "gemma2", "qwen3-moe", "neox", "granite"]


@pytest.mark.parametrize("case", SIXTEEN)
def test_bfloat16_is_as_exact_as_transformers(case: str, tmp_path: Path, device: str) -> None:
    family, changes = CASES[case]
    exact = write_checkpoint(tmp_path, family, dtype="bfloat16", **changes)
    peer = copy.deepcopy(exact).to(torch.bfloat16)
    sequences = prompts()
    wanted = np.concatenate([expected_logits(exact, sequence, False) for sequence in sequences])
    theirs = np.concatenate([expected_logits(peer, sequence, False) for sequence in sequences])
    ours = np.concatenate(chunked(paged_model(tmp_path, device, "bfloat16"), sequences, "ragged"))
    assert np.sqrt(np.mean((ours - wanted) ** 2)) <= 1.1 * np.sqrt(np.mean((theirs - wanted) ** 2))


@pytest.mark.parametrize("case", ["gpt2", "opt-350m", "neox", "falcon-40b", "phi3", "mixtral", "qwen2-moe"])
def test_a_quantised_copy_equals_quantising_at_load(case: str, tmp_path: Path) -> None:
    """This includes fused, transposed and expert weights; the reference backend gives roughly the same logits."""
    pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")
    family, changes = CASES[case]
    write_checkpoint(tmp_path / "source", family, **changes)
    quantize_checkpoint(tmp_path / "source", tmp_path / "saved", "int8")
    found = []
    for path, backend in (
        (tmp_path / "source", CpuBackend(packed=True)),
        (tmp_path / "saved", CpuBackend(packed=True)),
        (tmp_path / "saved", TorchBackend()),
    ):
        packing = Packing(backend, "int8")
        paged = PagedModel(
            load_model(backend, path, max_model_len=64, block_size=16, packing=packing), max_context=64
        )
        found.append(np.concatenate(chunked(paged, prompts()[:5], "ragged")))
    assert found[0].tobytes() == found[1].tobytes()
    assert np.abs(found[0] - found[2]).max() <= 0.02 * np.abs(found[2]).max()


def _without_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value.clone() for name, value in state.items()}


OTHER_NAMES: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "gpt2": (
        "GPT2",
        {},
        lambda state: {
            **_without_prefix(state, "transformer."),
            "h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "h.1.attn.masked_bias": torch.tensor(-1e4),
        },
    ),
    "gpt2-without-head": (
        "GPT2",
        {},
        lambda state: {
            name: value
            for name, value in _without_prefix(state, "transformer.").items()
            if name != "lm_head.weight"
        },
    ),
    "gpt2-untied": (
        "GPT2",
        {"tie_word_embeddings": False},
        lambda state: _without_prefix(state, "transformer."),
    ),
    "bloom": ("Bloom", {}, lambda state: _without_prefix(state, "transformer.")),
    "opt": (
        "OPT",
        {"ffn_dim": 96, "word_embed_proj_dim": 64},
        lambda state: _without_prefix(state, "model.") | {"decoder.version": torch.tensor([3.0])},
    ),
    "opt-version": (
        "OPT",
        {"ffn_dim": 96, "word_embed_proj_dim": 64},
        lambda state: {**state, "model.decoder.version": torch.tensor([3.0])},
    ),
    "tied-with-a-head-of-its-own": (
        "Llama",
        {"tie_word_embeddings": True},
        lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"].flip(0) * 2},
    ),
    "tied-with-the-head-alone": (
        "Llama",
        {"tie_word_embeddings": True},
        lambda state: {
            name.replace("model.embed_tokens", "lm_head"): value
            for name, value in state.items()
            if name != "lm_head.weight"
        },
    ),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_renamed_tensors_load_as_in_transformers(case: str, tmp_path: Path) -> None:
    """Checkpoints saved from the base model, with tables that are computed anyway, or with an output layer that should
    be tied."""
    family, changes, change = OTHER_NAMES[case]
    state = write_checkpoint(tmp_path, family, **changes).state_dict()
    tensors = {name: value.clone().contiguous() for name, value in change(state).items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    (found,) = chunked(paged_model(tmp_path, "cpu"), prompts()[5:6], "whole")
    wanted = expected_logits(reference.eval(), prompts()[5], False)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_whole_tensors_are_not_copied(tmp_path: Path) -> None:
    """Slices of a fused projection are views of the mapped file, as whole tensors are."""
    write_checkpoint(tmp_path, "Phi3")
    weights = open_model(tmp_path, read_spec(tmp_path), Packing(TorchBackend()))
    fused = stored_data(weights.stored.tensor("model.layers.1.self_attn.qkv_proj.weight"))
    for name in ("1.q.weight", "1.k.weight", "1.v.weight"):
        assert np.shares_memory(weights.floats(name).data, fused)


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("OPT", {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine=False"]),
    ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    ("Gemma3", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("Gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0", "null"]),
    ("Bloom", {"apply_residual_connection_post_layernorm": True}, ["apply_residual_connection"]),
    ("Mixtral", {"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "from 1 to 8"]),
    ("Phi3", {"rope_parameters": {"rope_type": "longrope"}}, ["short_factor", "absent"]),
    ("SmolLM3", {"no_rope_layers": [2, 1, 1]}, ["no_rope_layers", "0 or 1"]),
    ("Falcon", {"num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn=2"]),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_options_that_would_change_results_are_refused(
    family: str, changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    named = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    named(**TINY).save_pretrained(tmp_path)
    edit_config(
        tmp_path, architectures=[next(name for name in FAMILIES if name.startswith(family))], **changes
    )
    with pytest.raises(ModelError) as caught:
        read_spec(tmp_path)
    for word in words:
        assert word in str(caught.value)


@needs_native_cpu
def test_unsupported_backends_of_a_model_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "floats", "Mixtral", num_local_experts=2)
    assert declining(plan_model(tmp_path / "floats")) == {}
    quantize_checkpoint(tmp_path / "floats", tmp_path / "int8", "int8")
    assert declining(plan_model(tmp_path / "int8")) == {}
    write_checkpoint(tmp_path / "12b", "StableLm", qk_layernorm=True)
    lacks = "StableLmForCausalLM runs on cpu, torch only"
    assert declining(plan_model(tmp_path / "12b")) == {"cuda": lacks}
    report = env.gather(ask_backends=False, model=str(tmp_path / "12b"))
    assert report["model"]["declines"] == {"cuda": lacks}
    assert lacks in env.as_text(report)
    edit_config(tmp_path / "floats", num_local_experts=4096, num_hidden_layers=1)
    assert declining(plan_model(tmp_path / "floats")) == {}
    edit_config(tmp_path / "floats", num_local_experts=4097)
    assert declining(plan_model(tmp_path / "floats")) == {
        "cuda": "MixtralForCausalLM runs on cpu, torch only"
    }
    plan = plan_model(tmp_path / "floats", "transformers")
    alone = "MixtralForCausalLM runs on torch only"
    assert declining(plan) == {"cpu": alone, "cuda": alone}
    assert "does not run" in env.as_text(env.gather(ask_backends=False, model=str(tmp_path / "none")))


def test_the_readme_table_matches_the_code() -> None:
    root = Path(__file__).resolve().parents[2]
    table = runpy.run_path(str(root / "scripts/model_table.py"))["table"]
    assert "\n".join(table()) in (root / "README.md").read_text(encoding="utf-8")
