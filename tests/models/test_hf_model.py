"""Models run by transformers' own code over the paged cache: the same results as transformers', or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from architectures import tiny_model
from checkpoints import TINY, write_checkpoint
from model_runs import chunked, edit_config, expected_logits, greedy, prompts
from paged import PagedModel

from vllmlite import LLM, SamplingParams
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.torch import TorchBackend
from vllmlite.cli import env, probe
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.models import load_planned, plan_model
from vllmlite.weights.packing import Packing

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "starcoder2": ("Starcoder2", {"sliding_window": 11}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 11}),
    "gptj": ("GPTJ", {"rotary_dim": 8}),
}


def hf_model(path: Path) -> PagedModel:
    plan, backend = plan_model(path, "transformers"), TorchBackend()
    assert (plan.implementation, plan.backends) == ("transformers", ("torch",))
    model = load_planned(plan, backend, max_model_len=128, packing=Packing(backend), block_size=4, seed=0)
    return PagedModel(model, num_blocks=320)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    if not getattr(transformers, f"{family}ForCausalLM")._supports_attention_backend:
        pytest.skip(f"transformers {transformers.__version__} has {family}'s attention built in")
    reference = write_checkpoint(tmp_path, family, **changes)
    sequences = prompts()
    expected = [expected_logits(reference, sequence, False) for sequence in sequences]
    scale = max(float(np.abs(logits).max()) for logits in expected)
    paged = hf_model(tmp_path)
    for how in ("whole", "ragged"):
        for row, (found, wanted) in enumerate(zip(chunked(paged, sequences, how), expected, strict=True)):
            assert float(np.abs(found - wanted).max()) <= 1e-4 * scale, f"{how}, row {row}"
    ours, theirs = greedy(paged, reference, sequences)
    assert ours == theirs


def test_both_kinds_of_engine_generate_the_same_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Llama", eos_token_id=None)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "num_gpu_blocks_override": 40}
    texts = []
    for implementation in ("native", "transformers"):
        llm = LLM(str(tmp_path), model_impl=implementation, device="cpu", **options)
        outputs = llm.generate(
            [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": list(range(40))}],
            SamplingParams(temperature=0, max_tokens=12, detokenize=False),
        )
        texts.append([output.outputs[0].token_ids for output in outputs])
        choice = llm.llm_engine.backend_choice
        assert choice.startswith("LlamaForCausalLM through ")
        assert ("transformers" in choice.partition(";")[0]) == (implementation == "transformers")
    assert texts[0] == texts[1]
    with pytest.raises(BackendError, match=r"cpu on cpu declined: LlamaForCausalLM runs on torch only"):
        LLM(str(tmp_path), model_impl="transformers", backend="cpu", **options)


def test_the_implementation_is_chosen_by_architecture(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Starcoder2")
    assert plan_model(tmp_path).implementation == "transformers"
    with pytest.raises(ModelError, match=r"Starcoder2ForCausalLM.*--model-impl transformers"):
        plan_model(tmp_path, "native")
    with pytest.raises(ParameterError, match="model_impl"):
        plan_model(tmp_path, "vllm2")
    write_checkpoint(tmp_path, "Llama")
    assert plan_model(tmp_path).implementation == "native"
    assert plan_model(tmp_path, "transformers").implementation == "transformers"


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Mamba", {}, "cannot run over a paged cache|max_position_embeddings|cannot load"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type=dynamic",
        ),
    ],
)
def test_unsupported_models_are_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{family}Config")(**TINY | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        hf_model(tmp_path)


def test_other_backends_and_quantised_weights_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")
    write_checkpoint(tmp_path, "Starcoder2")
    plan = plan_model(tmp_path)
    for backend, quantization, words in (
        (TorchBackend(), "int8", "float weights only"),
        (CpuBackend(), None, "torch backend only"),
    ):
        packing = Packing(backend, quantization)
        with pytest.raises(BackendError, match=words):
            load_planned(plan, backend, max_model_len=64, packing=packing, block_size=4, seed=0)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path, "Starcoder2")
    state = {name: value for name, value in reference.state_dict().items() if "layers.1" not in name}
    reference.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="missing keys"):
        hf_model(tmp_path)


def test_a_checkpoints_own_code_is_not_needed_if_transformers_has_the_model(tmp_path: Path) -> None:
    """The code is never run: another architecture is refused, even if transformers knows the model type."""
    write_checkpoint(tmp_path, "Starcoder2")
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    hf_model(tmp_path)
    edit_config(tmp_path, architectures=["OwnForCausalLM"])
    with pytest.raises(
        ModelError, match=r"auto_map\), which is never run.*starcoder2 is Starcoder2ForCausalLM"
    ):
        hf_model(tmp_path)
    edit_config(tmp_path, model_type="own")
    with pytest.raises(ModelError, match=r"auto_map\), which is never run.*do not include model_type=own"):
        hf_model(tmp_path)
    edit_config(tmp_path, auto_map=None)
    with pytest.raises(ModelError, match="transformers cannot load it"):
        hf_model(tmp_path)
    write_checkpoint(tmp_path, "Llama")
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert plan_model(tmp_path).implementation == "native"


def test_env_loads_the_model_as_a_server_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so if the weights are there; otherwise it says that the model has not been tried."""
    answers = [{"backend": "torch", "kind": "cpu", "available": True, "reason": ""}]
    monkeypatch.setattr(probe, "probe", lambda: answers)
    monkeypatch.setattr(probe, "probe_model", lambda path: probe.load_model(str(path))[0])
    write_checkpoint(tmp_path, "Starcoder2")
    assert "runs on torch on cpu" in env.as_text(env.gather(model=str(tmp_path)))
    assert "has not been tried" in env.as_text(env.gather(ask_backends=False, model=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    assert "has not been tried" in env.as_text(env.gather(model=str(tmp_path)))
    tiny_model("diffllama").save_pretrained(tmp_path)
    refused = "DiffLlamaForCausalLM cannot run over a paged cache: "
    assert refused in env.as_text(env.gather(model=str(tmp_path)))


@pytest.mark.slow
def test_models_are_probed_in_a_separate_process(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "runs", "Starcoder2")
    assert not probe.probe_model(tmp_path / "runs")
    tiny_model("diffllama").save_pretrained(tmp_path / "refused")
    assert "DiffLlamaForCausalLM cannot run" in probe.probe_model(tmp_path / "refused")
