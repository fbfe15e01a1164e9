"""Training what drafts for the built-in model: what comes out runs, and drafts as it was trained."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from native import needs_native_cpu

from vllmlite import LLM, SamplingParams
from vllmlite.hub import BUILT_IN
from vllmlite.runner.runner import ModelRunner

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

pytestmark = [pytest.mark.slow, needs_native_cpu]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A directory with both checkpoints after few steps, the model in torch, and the recipe."""
    pytest.importorskip("torch")
    from demo_model import drafts, release
    from demo_model.model import Shape

    target = tmp_path_factory.mktemp("drafts")
    recipe = drafts.DraftRecipe(answers=16, draft_vocab=256, drafts=2, steps=12, tokens=256)
    texts = drafts.answers(recipe, at_once=32)
    model = release.load_weights(Shape(), BUILT_IN / "model.safetensors")
    data = drafts.Conversations(model, texts, recipe, target / "states")
    drafts.train_head(model, data, recipe, target / "eagle3")
    drafts.train_small(model, data, replace(recipe, steps=2), target / "draft", BUILT_IN / "tokenizer.json")
    return target, model, recipe


def start(method: str, path: Path) -> LLM:
    config = {"method": method, "model": str(path), "num_speculative_tokens": 3}
    return LLM(device="cpu", dtype="float32", max_model_len=128, speculative_config=config)


def test_the_head_drafts_as_it_was_trained(trained: tuple[Path, Any, Any]) -> None:
    import torch
    from demo_model import drafts

    path, model, recipe = trained
    llm = start("eagle3", path / "eagle3")
    proposer = cast(Any, cast(ModelRunner, llm.llm_engine.engine.runner).proposer)
    text = list(llm.get_tokenizer().encode("Debian is a free operating system"))
    llm.llm_engine.engine.scheduler.drafting.draft_cost = None
    found: list[tuple[list[int], list[int]]] = []
    draft = proposer._draft

    def note(asked: Any, counts: Any) -> None:
        draft(asked, counts)
        found.extend((list(each.token_ids), each.drafts) for each in asked.values())

    proposer._draft = note
    llm.generate([{"prompt_token_ids": text}], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    from safetensors.torch import load_file

    head = drafts.Head(recipe, model.shape)
    weights = load_file(path / "eagle3" / "model.safetensors")
    vocabulary = weights.pop("d2t") + torch.arange(recipe.draft_vocab)
    head.load_state_dict({name: weight.float() for name, weight in weights.items()})
    assert found
    for token_ids, guessed in found:
        with torch.inference_mode():
            ids, count = torch.tensor([token_ids + guessed]), len(token_ids) - 1
            hidden = head.fc(drafts.states(model, ids[:, :count], recipe.states)[0])
            rope, want = model.rope(count + len(guessed), ids.device), []
            earlier: list[Any] = []
            for number in range(len(guessed)):
                embedded = model.model.embed_tokens(ids[:, number + 1 : number + 1 + count])
                turned = tuple(part[number : number + count] for part in rope)
                hidden = head(embedded, hidden, turned, earlier)
                want.append(int(vocabulary[head.logits(hidden[0, -1]).argmax()]))
        assert guessed == want


def test_the_draft_model_runs(trained: tuple[Path, Any, Any]) -> None:
    path, _, _ = trained
    params = SamplingParams(temperature=0, max_tokens=8)
    (want,) = LLM(device="cpu", dtype="float32", max_model_len=128).generate(["Debian is"], params)
    (found,) = start("draft_model", path / "draft").generate(["Debian is"], params)
    assert found.outputs[0].token_ids == want.outputs[0].token_ids
