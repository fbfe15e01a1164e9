"""EAGLE and Medusa heads: what they draft, against a computation without a cache, however sequences are scheduled."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from checkpoints import TINY, write_checkpoint
from eagle_heads import Floats, Head, Shape, write_head
from medusa_heads import Heads, write_medusa
from mtp_layers import MtpLayer, write_with_mtp
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.engine.drafts import StepCost
from vllmlite.errors import ModelError
from vllmlite.runner.propose import eagle
from vllmlite.runner.runner import ModelRunner
from vllmlite.weights.safetensors import read_safetensors, write_safetensors

DRAFTS = 3
SHAPE = Shape(TINY["vocab_size"], TINY["hidden_size"], TINY["num_hidden_layers"])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random target model: its directory, and transformers' model of it."""
    path = tmp_path_factory.mktemp("target")
    return path, write_checkpoint(path, eos_token_id=None)


def start(model: Path, head: Path | None, method: str, **options: Any) -> LLM:
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": DRAFTS}
    config |= {} if head is None else {"model": str(head)}
    llm = LLM(
        str(model), speculative_config=config, skip_tokenizer_init=True, device="cpu", dtype="float32",
        **{"max_model_len": 160, "block_size": 8, "num_gpu_blocks_override": 200, **options},
    )  # fmt: skip
    scheduler = llm.llm_engine.engine.scheduler
    free = StepCost([(1, 1.0), (2, 1.0)])
    scheduler.drafting = replace(scheduler.drafting, cost=free, draft_cost=None, _costs={})
    return llm


def proposed(llm: LLM, patch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Return a list to which all proposals are added from now on: the ids that were known, and the drafts."""
    proposer = cast(ModelRunner, llm.llm_engine.engine.runner).proposer
    assert proposer is not None
    collect, admit = proposer.collect, proposer.admit
    found: list[tuple[list[int], list[int]]] = []
    texts: dict[int, list[int]] = {}

    def begin(slot: int, token_ids: list[int], num_prompt: int) -> None:
        texts[slot] = list(token_ids)
        admit(slot, token_ids, num_prompt)

    def note(handle: Any, token_ids: Any, wanted: Sequence[int]) -> list[list[int]]:
        drafts = collect(handle, token_ids, wanted)
        for text, ids, guessed in zip(known.pop(0), token_ids, drafts, strict=True):
            text += ids
            if guessed:
                found.append((list(text), list(guessed)))
        return drafts

    launch = proposer.launch
    known: list[list[list[int]]] = []

    def keep(slots: Sequence[int]) -> Any:
        if slots:
            known.append([texts[slot] for slot in slots])
        return launch(slots)

    patch.setattr(proposer, "admit", begin)
    patch.setattr(proposer, "launch", keep)
    patch.setattr(proposer, "collect", note)
    return found


def check_drafts(found: list[tuple[list[int], list[int]]], model: Any, head: Head | Heads | MtpLayer) -> None:
    """Compare proposals with what the head drafts from transformers' hidden states."""
    torch = pytest.importorskip("torch")
    table = model.model.embed_tokens.weight.detach().numpy()

    def output(hidden: Floats) -> Floats:
        with torch.inference_mode():
            return cast(Floats, model.lm_head(torch.from_numpy(hidden)).numpy())

    assert found
    texts: list[tuple[list[int], list[Floats]]] = []
    for token_ids, drafts in sorted(found, key=lambda each: -len(each[0])):
        known = next((states for text, states in texts if text[: len(token_ids)] == token_ids), None)
        if known is None:
            with torch.inference_mode():
                every = model(input_ids=torch.tensor([token_ids]), output_hidden_states=True).hidden_states
            known = [every[layer][0].numpy() for layer in head.states]
            texts.append((token_ids, known))
        states = [state[: len(token_ids) - 1] for state in known]
        assert head.drafts(token_ids, states, table, len(drafts), output) == drafts


FORMS: dict[str, tuple[str, Shape, dict[str, Any]]] = {
    "EAGLE": ("eagle", SHAPE, {}),
    "EAGLE with a bias, speculators": ("eagle", SHAPE, {"bias": True, "form": "speculators"}),
    "EAGLE-3": ("eagle3", SHAPE, {}),
    "EAGLE-3, normed residual, speculators": ("eagle3", SHAPE, {"norm_before_residual": True, "form": "speculators"}),
    "EAGLE-3, two named layers, own size": (
        "eagle3", replace(SHAPE, own_hidden=32), {"layers": [1, 2], "bias": True}
    ),
    "Medusa": ("medusa", SHAPE, {"form": "authors"}),
    "Medusa, vLLM": ("medusa", SHAPE, {"form": "vllm"}),
}  # fmt: skip


@needs_native_cpu
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=[pytest.mark.slow] if form in ("EAGLE", "EAGLE-3", "Medusa, vLLM") else [])
        for form in FORMS
    ],
)
def test_drafts_are_those_of_the_head(form: str, target: tuple[Path, Any], tmp_path: Path) -> None:
    method, shape, options = FORMS[form]
    head: Head | Heads
    if method == "medusa":
        head = write_medusa(tmp_path / "head", shape, **options)
    else:
        head = write_head(tmp_path / "head", method, shape, **options)
    llm = start(target[0], tmp_path / "head", method)
    with pytest.MonkeyPatch.context() as patch:
        found = proposed(llm, patch)
        llm.generate(
            prompts(9, 30), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        )
    check_drafts(found, target[1], head)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
MTP: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3": ("qwen", "Qwen3", {}),
    "Qwen3-MoE": ("qwen", "Qwen3Moe", MOE),
    "MiMo": ("mimo", "Qwen2", {}),
}


@needs_native_cpu
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] if form == "Qwen3-MoE" else []) for form in MTP]
)
def test_drafts_are_those_of_the_mtp_layer(form: str, tmp_path: Path) -> None:
    """The text is that of the model without the layer, which is not read where no drafts are made."""
    layout, family, changes = MTP[form]
    model, layer = write_with_mtp(tmp_path, layout, family, **changes, eos_token_id=None)
    greedy, seeded = (
        SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False, **options)
        for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 5})
    )
    plain = LLM(str(tmp_path), skip_tokenizer_init=True, device="cpu", dtype="float32", max_model_len=160)
    llm = start(tmp_path, None, "qwen3_next_mtp")
    with pytest.MonkeyPatch.context() as patch:
        found = proposed(llm, patch)
        for params in (greedy, seeded):
            wanted, got = (each.generate(prompts(9, 30), params) for each in (plain, llm))
            assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in wanted]
    check_drafts(found, model, layer)


@needs_native_cpu
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_nextn_predict_layers": 2}, "several MTP layers"),
        (
            {},
            r"holds no MTP layer, whose tensors include mtp.fc.weight or model.mtp_layers.0.input_proj.weight",
        ),
    ],
)
def test_a_model_without_an_mtp_layer_that_can_draft_is_refused(
    config: dict[str, Any], says: str, target: tuple[Path, Any], tmp_path: Path
) -> None:
    path = target[0]
    if config:
        path = tmp_path
        write_with_mtp(path, "qwen", "Qwen3")
        spoilt(config)(path)
    with pytest.raises(ModelError, match=says):
        start(path, None, "mtp")


def prompts(*lengths: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(len(lengths))
    return [{"prompt_token_ids": rng.integers(3, SHAPE.vocab, length).tolist()} for length in lengths]


ENGINES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 13},
    "preempted": {"num_gpu_blocks_override": 12, "max_model_len": 96},
    "two steps": {"async_scheduling": True},
    "uncached": {"enable_prefix_caching": False},
}


@needs_native_cpu
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "stretch"), list(product(ENGINES, (0, 6, 128))))
def test_schedules_do_not_change_the_drafts(
    engine: str, stretch: int, target: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts that are computed at once or caught up with later, and prefixes that are found again."""
    monkeypatch.setattr(eagle, "STRETCH", stretch)
    head = write_head(tmp_path / "head", "eagle3", SHAPE)
    llm = start(target[0], tmp_path / "head", "eagle3", **ENGINES[engine])
    found = proposed(llm, monkeypatch)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=16, ignore_eos=True, detokenize=False)
    for _ in range(2):
        llm.generate([*prompts(40, 7, 21), *prompts(40)], params)
    check_drafts(found, target[1], head)
    stats = llm.llm_engine.stats()
    assert (stats.num_preemptions > 0) == (engine == "preempted")
    assert (stats.prefix_cache_hits > 0) == (engine in ("chunked", "two steps"))


@needs_native_cpu
def test_pauses_do_not_change_the_drafts(
    target: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence that is asked for drafts only now and then catches up from the hidden states that were kept."""
    monkeypatch.setattr(eagle, "STRETCH", 5)
    head = write_head(tmp_path / "head", "eagle3", SHAPE)
    llm = start(target[0], tmp_path / "head", "eagle3")
    found = proposed(llm, monkeypatch)
    turns = iter(range(1000))
    drafting = type(llm.llm_engine.engine.scheduler.drafting)
    monkeypatch.setattr(drafting, "wanted", lambda *_: DRAFTS if next(turns) % 4 == 0 else 0)
    llm.generate(
        prompts(9, 20, 3), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    )
    check_drafts(found, target[1], head)


@needs_native_cpu
@pytest.mark.parametrize("most", [1024, 15])
def test_a_prefix_that_only_the_model_knows_may_cost_drafts_and_changes_nothing_else(
    most: int, target: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eagle, "MOST_UNKNOWN", most)
    write_head(tmp_path / "head", "eagle3", SHAPE)
    llm = start(target[0], tmp_path / "head", "eagle3")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (before,) = llm.generate(prompts(40), params)
    drafted = llm.llm_engine.stats().num_draft_tokens
    cast(Any, cast(ModelRunner, llm.llm_engine.engine.runner).proposer)._marks.clear()
    (after,) = llm.generate(prompts(40), params)
    assert after.num_cached_tokens
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
    assert (llm.llm_engine.stats().num_draft_tokens > drafted) == (most == 1024)


def spoilt(config: dict[str, Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))

    return spoil


@needs_native_cpu
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 2}, "heads of several layers"),
        ({"norm_before_fc": True}, "norm_before_fc"),
        ({"target_hidden_size": 128}, "made for hidden states of 128; the model's have 64"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3]}, "from 0 to 2"),
        ({"draft_vocab_size": 80}, "lm_head.weight"),
        ({"rope_scaling": {"rope_type": "odd"}}, "rope_type"),
    ],
)
def test_heads_that_would_draft_otherwise_are_refused(
    config: dict[str, Any], says: str, target: tuple[Path, Any], tmp_path: Path
) -> None:
    write_head(tmp_path / "head", "eagle3", SHAPE)
    spoilt(config)(tmp_path / "head")
    with pytest.raises(ModelError, match=says):
        start(target[0], tmp_path / "head", "eagle3")


@needs_native_cpu
@pytest.mark.parametrize(
    ("config", "says"),
    [({"hidden_size": 128}, "the model's"), ({"truncated_vocab_size": 40}, "a part of the vocabulary")],
)
def test_medusa_heads_of_other_sizes_are_refused(
    config: dict[str, Any], says: str, target: tuple[Path, Any], tmp_path: Path
) -> None:
    write_medusa(tmp_path / "head", SHAPE, "vllm")
    spoilt(config)(tmp_path / "head")
    with pytest.raises(ModelError, match=says):
        start(target[0], tmp_path / "head", "medusa")


@needs_native_cpu
def test_medusa_heads_need_all_their_tensors(target: tuple[Path, Any], tmp_path: Path) -> None:
    write_medusa(tmp_path / "head", SHAPE, "vllm")
    file = tmp_path / "head" / "model.safetensors"
    tensors = read_safetensors(file)
    del tensors["blocks.1.layers.0.weight"]
    file.unlink()
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(file, tensors.values(), layout)
    with pytest.raises(ModelError, match="block 0 of head 1 has no weight"):
        start(target[0], tmp_path / "head", "medusa")
