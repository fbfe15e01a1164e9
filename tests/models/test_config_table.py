"""Keys of config.json: read, refused, neutral or logged; absent keys have transformers' defaults."""

from __future__ import annotations

import json
import logging
import runpy
from pathlib import Path
from typing import Any

import pytest

from vllmlite.errors import ModelError
from vllmlite.models import read_spec
from vllmlite.models.config_table import FILE, NEUTRAL
from vllmlite.models.families import FAMILIES
from vllmlite.models.spec import DecoderSpec


def spec(path: Path, architecture: str, **values: Any) -> DecoderSpec:
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **values}))
    return read_spec(path)


def test_the_documented_table_equals_the_scripts_output() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    table = json.loads(FILE.read_text())
    if transformers.__version__ != table["transformers"]:
        pytest.skip(f"the table is of transformers {table['transformers']}, not {transformers.__version__}")
    script = Path(__file__).resolve().parents[2] / "scripts/config_table.py"
    made = runpy.run_path(str(script))["table"]()
    assert made == table, "run PYTHONPATH=. scripts/config_table.py > vllmlite/models/config_keys.json"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_transformers(architecture: str, tmp_path: Path) -> None:
    """An empty configuration, the default one that transformers saves, and the table agree."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.for_model(FAMILIES[architecture].model_type)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    saved = read_spec(tmp_path)
    if config.tie_word_embeddings is not None:
        assert saved.tie_word_embeddings == config.tie_word_embeddings
    assert saved == spec(tmp_path, architecture)
    assert (saved.hidden_size, saved.num_layers) == (config.hidden_size, config.num_hidden_layers)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_model_that_is_not_causal_is_refused(architecture: str, tmp_path: Path) -> None:
    spec(tmp_path, architecture, is_causal=True)
    with pytest.raises(ModelError, match=r"config\.json: is_causal=False; accepted: true"):
        spec(tmp_path, architecture, is_causal=False)
    with pytest.raises(ModelError, match="use_bidirectional_attention=True"):
        spec(tmp_path, architecture, use_bidirectional_attention=True)


def test_keys_that_the_family_does_not_read_must_have_their_default(tmp_path: Path) -> None:
    """Every key of every family is read or neutral, or refused if its value is not the default."""
    neutral = " ".join(NEUTRAL.values()).split()
    for architecture, family in FAMILIES.items():
        keys = json.loads(FILE.read_text())["families"][family.model_type]["keys"]
        plain = spec(tmp_path, architecture)
        for key, default in keys.items():
            other = {bool: not default, str: "other", float: 0.7}.get(type(default), 2 * (default or 3))
            try:
                changed = spec(tmp_path, architecture, **{key: other})
            except ModelError:
                continue
            harmless = key in neutral or key in WITHOUT_EFFECT.get(architecture, ())
            assert changed != plain or harmless, (architecture, key)


WITHOUT_EFFECT = {
    "Qwen2ForCausalLM": ("sliding_window", "max_window_layers"),
    "Qwen2MoeForCausalLM": ("sliding_window", "max_window_layers"),
    "Qwen3ForCausalLM": ("sliding_window", "max_window_layers", "use_sliding_window"),
    "Qwen3MoeForCausalLM": ("sliding_window", "use_sliding_window"),
    "SmolLM3ForCausalLM": ("sliding_window", "use_sliding_window"),
    "Phi3ForCausalLM": ("original_max_position_embeddings",),
    "FalconForCausalLM": ("num_kv_heads",),
}
"""Keys that matter only beside others."""


def test_unknown_keys_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllmlite"):
        spec(tmp_path, "LlamaForCausalLM", unsloth_fixed=True, another=1, attention_dropout=0.5)
    (record,) = caplog.records
    assert record.getMessage().endswith("config.json: unknown keys without effect: another, unsloth_fixed")


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "activation_function": "gelu_new",
            "attn_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "n_ctx": 1024,
            "n_embd": 768,
        }
        | {"n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_type": "cls_index"}
        | {"summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}}},
    ),
    "qwen2.5-7b": (
        "Qwen2ForCausalLM",
        {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6}
        | {
            "sliding_window": 131072,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "use_mrope": False,
        },
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeForCausalLM",
        {"decoder_sparse_step": 1, "head_dim": 128, "max_window_layers": 48, "mlp_only_layers": []}
        | {
            "norm_topk_prob": True,
            "rope_scaling": None,
            "sliding_window": None,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "llama-3.2-1b": (
        "LlamaForCausalLM",
        {"head_dim": 64, "hidden_size": 2048, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 5e5}
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "tie_word_embeddings": True}
        | {
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
            | {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
        },
    ),
    "phi-3-mini": (
        "Phi3ForCausalLM",
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "embd_pdrop": 0.0, "rope_scaling": None}
        | {"original_max_position_embeddings": 4096, "attention_bias": False, "sliding_window": 2047},
    ),
    "gemma-2-2b": (
        "Gemma2ForCausalLM",
        {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
        }
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0},
    ),
    "falcon-7b": (
        "FalconForCausalLM",
        {
            "alibi": False,
            "apply_residual_connection_post_layernorm": False,
            "multi_query": True,
            "num_kv_heads": 71,
        }
        | {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True},
    ),
    "opt-125m": (
        "OPTForCausalLM",
        {"activation_dropout": 0.0, "_remove_final_layer_norm": False, "layerdrop": 0.0, "prefix": "</s>"}
        | {"word_embed_proj_dim": 768, "init_std": 0.02, "do_layer_norm_before": True},
    ),
    "bloom-560m": (
        "BloomForCausalLM",
        {"attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "masked_softmax_fusion": True}
        | {"n_inner": None, "n_layer": 24, "n_embed": 1024, "num_attention_heads": 16, "offset_alibi": 100}
        | {"pretraining_tp": 1, "skip_bias_add": True, "slow_but_exact": False, "seq_length": 2048},
    ),
    "bloom, saved again": ("BloomForCausalLM", {"hidden_size": 1024, "n_embed": 1024, "n_head": 16}),
    "pythia-70m": (
        "GPTNeoXForCausalLM",
        {
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
            "classifier_dropout": 0.1,
        },
    ),
    "stablelm-2": (
        "StableLmForCausalLM",
        {
            "rope_theta": 10000,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": True,
            "rotary_scaling_factor": 1.0,
        },
    ),
}
"""Configurations as they are on the hub, in part."""


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_are_read(name: str, tmp_path: Path) -> None:
    architecture, values = REAL[name]
    spec(
        tmp_path,
        architecture,
        **values,
        torch_dtype="bfloat16",
        transformers_version="4.40.0",
        use_cache=True,
    )


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_has_older_names_of_longrope(name: str, tmp_path: Path) -> None:
    """The first Phi-3 checkpoints with 128k positions call longrope ``su``."""
    scaling = {"type": name, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    found = spec(
        tmp_path,
        "Phi3ForCausalLM",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling=scaling,
    )
    rope = found.layers[0].rope
    assert rope is not None and (rope.kind, rope.long_factors) == ("longrope", (2.0,) * 48)


def test_two_sets_of_rotary_parameters_must_agree(tmp_path: Path) -> None:
    """transformers 5 writes ``rope_parameters``, and model cards tell users to add ``rope_scaling`` for YaRN."""
    newer = {"rope_type": "default", "rope_theta": 1e6}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    with pytest.raises(
        ModelError, match=r"rope_scaling=.*accepted: the same as rope_parameters; change that instead"
    ):
        spec(tmp_path, "Qwen2ForCausalLM", rope_parameters=newer, rope_scaling=yarn)
    both = {"rope_type": "yarn", **yarn, "rope_theta": 1e6}
    rope = spec(tmp_path, "Qwen2ForCausalLM", rope_parameters=both, rope_scaling=yarn).layers[0].rope
    assert rope is not None and (rope.kind, rope.factor, rope.theta) == ("yarn", 4.0, 1e6)
    kinds = {"sliding_attention": newer, "full_attention": {"rope_type": "linear", "factor": 8.0}}
    spec(
        tmp_path,
        "Gemma3ForCausalLM",
        rope_parameters=kinds,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
