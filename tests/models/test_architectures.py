"""Every causal language model of transformers, run by its own code over the paged cache, gives transformers' logits and
text, or is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import MODEL_TYPES, Unshrinkable, tiny_model
from model_runs import chunked, prompts
from numpy.typing import NDArray
from paged import PagedModel
from transformers import masking_utils

from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import ModelError
from vllmlite.models import load_planned, plan_model
from vllmlite.models.hf_attention import Refusal, sliding_window_of
from vllmlite.weights.packing import Packing

RUN = """
    afmoe apertus arcee biogpt bitnet cohere cohere2 cohere2_moe cwm ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo
    gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium
    hyperclovax jetmoe llama minimax_m2 ministral3 mistral mixtral modernbert-decoder nanochat olmo olmo2 olmo3 olmoe
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma
""".split()
"""Model types that must run, where transformers has them."""


def hf_model(path: Path, dtype: str = "float32") -> PagedModel:
    plan, backend = plan_model(path, "transformers"), TorchBackend("cpu", dtype)
    model = load_planned(plan, backend, max_model_len=128, packing=Packing(backend), block_size=4, seed=0)
    return PagedModel(model, num_blocks=320)


@torch.inference_mode()
def own_logits(model: Any, sequence: NDArray[np.int32]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model(_ids(sequence), use_cache=False).logits[0].float().numpy()
    return logits


def own_text(model: Any, prompt: NDArray[np.int32], count: int) -> list[int]:
    """Greedy tokens that transformers generates with its own cache."""
    ids = _ids(prompt)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **options
    )
    tokens: list[int] = written[0, len(prompt) :].tolist()
    return tokens


def paged_text(paged: PagedModel, prompt: NDArray[np.int32], count: int) -> list[int]:
    paged.admit(0)
    tokens: list[int] = []
    step = prompt
    for _ in range(count):
        tokens.append(int(paged.logits([0], [step])[0][-1].argmax()))
        step = np.array(tokens[-1:], np.int32)
    return tokens


def _ids(sequence: NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(sequence[None].astype(np.int64))


def check(model_type: str, path: Path, **changes: Any) -> str:
    """Make a tiny model, run it and compare; return the reason if it is refused, else an empty string."""
    try:
        model = tiny_model(model_type, **changes)
    except Unshrinkable as error:
        assert model_type not in RUN, error
        pytest.skip(f"no tiny model can be made: {error}"[:200])
    model.save_pretrained(path)
    try:
        paged = hf_model(path)
    except ModelError as error:
        return str(error)
    sequences = prompts()
    expected = [own_logits(model, sequence) for sequence in sequences]
    scale = max(float(np.abs(logits).max()) for logits in expected)
    for how in ("whole", "ragged"):
        for row, (found, wanted) in enumerate(zip(chunked(paged, sequences, how), expected, strict=True)):
            assert float(np.abs(found - wanted).max()) <= 1e-4 * scale, f"{how}, row {row}"
    for sequence in sequences[3:6]:
        assert paged_text(paged, sequence, 12) == own_text(model, sequence, 12)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_equals_transformers_or_is_refused(model_type: str, tmp_path: Path) -> None:
    reason = check(model_type, tmp_path)
    if model_type in RUN:
        assert not reason


VARIANTS: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"is_decoder": False}, "attention mask is not causal"),
    ("bert", {"is_decoder": True}, ""),
    ("diffllama", {}, "layer 0 attends more than once|0 of its 4 layers attend through"),
    ("deepseek_v3", {}, r"its queries, keys and values differ in size \(24, 24, 16\)"),
    ("gpt_bigcode", {}, ""),
    ("gpt_oss", {}, "its attention needs s_aux"),
    ("llama", {"is_causal": False}, "attention mask is not causal"),
    ("llama4_text", {"attention_chunk_size": 5, "attn_temperature_tuning": False}, "not causal, or has gaps"),
    ("llama4_text", {"attention_chunk_size": None}, "attn_temperature_tuning"),
    ("moshi", {}, "caches 5 tokens where its mask shows 256|0 of its 4 layers attend through"),
    ("mpt", {}, "0 of its 4 layers attend through"),
    ("olmoe", {}, ""),
    ("roberta", {"is_decoder": True}, "positions do not start at 0"),
    ("zaya", {}, "logits differ from transformers' own"),
]


@pytest.mark.parametrize(("model_type", "changes", "reason"), VARIANTS)
def test_a_model_runs_or_is_refused_with_the_reason(
    model_type: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    found = check(model_type, tmp_path, **changes)
    assert re.search(reason, found) if reason else not found


def test_a_sliding_window_found_only_in_the_mask_is_kept(tmp_path: Path) -> None:
    """Phi-3.5-MoE does not tell attention about its sliding window."""
    tiny_model("phimoe").save_pretrained(tmp_path)
    asked: list[Any] = []
    model: Any = hf_model(tmp_path).model

    def attend(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments[5] if len(arguments) > 5 else options.get("window"))
        return TorchBackend.paged_attention(model.backend, *arguments, **options)

    model.backend.paged_attention = attend
    chunked(PagedModel(model, num_blocks=320), prompts()[:3], "whole")
    assert asked == [5] * 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_dtypes_pass_the_trial_run(dtype: str, tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    hf_model(tmp_path, dtype)


def test_sliding_windows_are_read_from_masks() -> None:
    device = torch.device("cpu")
    causal = masking_utils.causal_mask_function
    assert sliding_window_of(causal, 1000, device) is None
    for window in (1, 2, 500, 999):
        mask = masking_utils.sliding_window_causal_mask_function(window)
        assert sliding_window_of(mask, 1000, device) == window
    assert sliding_window_of(masking_utils.sliding_window_causal_mask_function(1000), 1000, device) is None
    no_padding = torch.zeros(1, dtype=torch.long)
    for mask in (
        masking_utils.bidirectional_mask_function,
        masking_utils.chunked_causal_mask_function(300, no_padding),
        masking_utils.or_masks(causal, lambda batch, head, q, k: k < 4),
    ):
        with pytest.raises(Refusal, match="not causal, or has gaps"):
            sliding_window_of(mask, 1000, device)
