"""Adapters that PEFT itself has written give PEFT's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from native import HAS_NATIVE_CPU

from vllmlite import LLM, LoRARequest, SamplingParams

torch = pytest.importorskip("torch", reason="torch is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.slow

IDS = [5, 17, 200, 33, 90, 4, 250]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "some modules": {"target_modules": ["q_proj", "v_proj"]},
    "all linear modules": {"target_modules": "all-linear", "lora_alpha": 4},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 8, r".*\.1\.mlp\..*": 2, "layers.2.self_attn.o_proj": 3},
        "alpha_pattern": {"down_proj": 1, r"^model.layers.0.self_attn.k_proj": 32},
    },
    "an expression": {"target_modules": r".*\.layers\.[02]\.(self_attn|mlp)\.(q|down)_proj"},
    "excluded modules": {"target_modules": ALL, "exclude_modules": ["1.self_attn.q_proj", "up_proj"]},
    "an excluded expression": {"target_modules": ALL, "exclude_modules": r".*layers\.1\..*"},
    "layers": {"target_modules": ALL, "layers_to_transform": [0, 2]},
    "a named layer": {"target_modules": ["down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "a rank larger than the model": {"target_modules": ALL, "r": 70},
}
TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "output layer": {"target_modules": ["lm_head", "k_proj"]},
    "both, as one": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole, as one": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True
    },
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]
}  # fmt: skip
CASES = [
    *[("Llama", name, options) for name, options in OPTIONS.items()],
    ("Qwen2", "all linear modules", OPTIONS["all linear modules"]),
    ("Qwen2", "patterns", OPTIONS["patterns"]),
    ("Mixtral", "attention", {"target_modules": ATTENTION, "use_rslora": True}),
    ("Phi3", "fused modules", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    ("GPT2", "transposed modules", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("Llama", "embedding and output layer", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    ("Gemma3", "a scaled embedding", {"target_modules": ["embed_tokens", "o_proj"]}),
    ("Llama", "DoRA", {"target_modules": [*ALL, "embed_tokens", "lm_head"], "use_dora": True}),
    ("Qwen2", "DoRA with biases", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    ("Phi3", "DoRA of fused modules", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    (
        "GPT2",
        "DoRA of transposed modules",
        {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True},
    ),
    (
        "Llama",
        "whole modules",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    *[("tied Llama", name, options) for name, options in TIED.items()],
    ("Mixtral", "experts", EXPERTS | {"rank_pattern": {"experts.down_proj": 2}}),
    ("Mixtral", "experts of each layer", EXPERTS | {"target_parameters": ["mlp.experts.down_proj"]}),
    ("Qwen3Moe", "experts and routers", {"target_modules": "all-linear", "use_rslora": True}),
    ("GptOss", "interleaved experts", EXPERTS),
    ("Qwen2Moe", "shared experts", EXPERTS | {"target_modules": ["gate_proj", "down_proj"]}),
]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256, "n_inner": 96}),
    "GptOss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "tied Llama": ("Llama", {"tie_word_embeddings": True}),
    "Qwen3Moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}),
    "Qwen2Moe": ("Qwen2Moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 48
    }),
}  # fmt: skip
BACKENDS = ["torch", *["cpu"] * HAS_NATIVE_CPU]


@pytest.mark.parametrize(("family", "name", "options"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_an_adapter_gives_pefts_logits(
    tmp_path: Path, family: str, name: str, options: dict[str, Any]
) -> None:
    architecture, sizes = FAMILIES.get(family, (family, {}))
    model = write_checkpoint(tmp_path / "base", architecture, **sizes)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8} | options)
    adapted = peft.get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name or "modules_to_save" in parameter_name:
                change = 0.15 * torch.randn(parameter.shape, generator=draw)
                parameter.copy_(parameter * (1 + change) if "magnitude" in parameter_name else change)
        wanted = torch.log_softmax(adapted(torch.tensor([IDS])).logits[0].double(), -1).numpy()
        with adapted.disable_adapter():
            base = torch.log_softmax(adapted(torch.tensor([IDS])).logits[0].double(), -1).numpy()
    adapted.save_pretrained(tmp_path / "adapter")
    for backend in BACKENDS:
        found = logprobs(tmp_path, backend)
        assert np.abs(found - wanted[:-1]).max() < 1e-4
    assert np.abs(wanted - base).max() > 0.1


def logprobs(path: Path, backend: str) -> np.ndarray:
    """Return the log-probabilities after each of ``IDS`` but the last with the adapter in ``path``."""
    llm = LLM(
        str(path / "base"), backend=backend, dtype="float32", enable_lora=True, max_lora_rank=70, max_logprobs=-1,
        skip_tokenizer_init=True, num_gpu_blocks_override=32, max_num_seqs=4, threads=1,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    adapter = LoRARequest("adapter", 1, str(path / "adapter"))
    (output,) = llm.generate([IDS], params, lora_request=adapter, use_tqdm=False)
    assert output.prompt_logprobs is not None
    entries = [entry for entry in output.prompt_logprobs if entry is not None]
    return np.array([[entry[token].logprob for token in sorted(entry)] for entry in entries])
