"""Adapters from files through LLM, AsyncLLM and the command line, against checkpoints with the adapter merged."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, write_checkpoint
from drafting import let_drafts_pay
from eagle_heads import Shape, write_head
from gguf_files import contents, encode
from native import HAS_NATIVE_CPU, needs_native_cpu
from peft_files import Factors, merge_factors, random_factors, write_peft

from vllmlite import LLM, AsyncLLM, SamplingParams
from vllmlite.cli import main
from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine_process.client import EngineClient
from vllmlite.engine_process.host import EngineThread
from vllmlite.errors import ModelError, ParameterError, VllmliteError
from vllmlite.lora.reader import AdapterReader
from vllmlite.lora.request import LoRARequest
from vllmlite.lora.store import AdapterStore
from vllmlite.models import read_spec

pytest.importorskip("torch", reason="torch is not installed")  # writes the checkpoint

OPTIONS: dict[str, Any] = {
    "backend": "cpu" if HAS_NATIVE_CPU else "torch",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "num_gpu_blocks_override": 32,
    "threads": 1,
    "max_num_seqs": 4,
}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
PROMPTS: list[Any] = [[5, 17, 200, 33, 90, 4, 250], [9, 8, 7]]
HIDDEN, INNER = TINY["hidden_size"], TINY["intermediate_size"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint ``base``, adapters ``one`` and ``two``, and checkpoints with these merged."""
    path = tmp_path_factory.mktemp("lora")
    write_checkpoint(path / "base")
    for number, name in enumerate(("one", "two")):
        factors: Factors = random_factors(
            {
                f"model.layers.{number}.self_attn.q_proj": (HIDDEN, HIDDEN),
                f"model.layers.{number}.mlp.down_proj": (HIDDEN, INNER),
            },
            4,
            seed=number,
        )
        write_peft(path / name, factors, layers_to_transform=number)
        merge_factors(path / "base", path / f"merged {name}", factors, 8 / 4)
    return path


def adapter(path: Path, name: str) -> LoRARequest:
    return LoRARequest(name, 1 + ["one", "two"].index(name), str(path / name))


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(str(path / "base"), enable_lora=True, max_loras=1, **OPTIONS)


@pytest.fixture(scope="module")
def wanted(path: Path) -> dict[str, list[list[int]]]:
    """The ids of each prompt with the base model and with each adapter merged."""
    return {
        name: ids(LLM(str(path / place), **OPTIONS).generate(PROMPTS, GREEDY, use_tqdm=False))
        for name, place in {"": "base", "one": "merged one", "two": "merged two"}.items()
    }


def ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_an_adapter_equals_its_merged_checkpoint(
    path: Path, llm: LLM, wanted: dict[str, list[list[int]]]
) -> None:
    """Adapters take turns in one slot on the device, beside requests without any."""
    assert len({str(each) for each in wanted.values()}) == 3
    one, two = adapter(path, "one"), adapter(path, "two")
    mixed = llm.generate([*PROMPTS, *PROMPTS], GREEDY, lora_request=[one, two, None, one], use_tqdm=False)
    assert ids(mixed) == [wanted["one"][0], wanted["two"][1], wanted[""][0], wanted["one"][1]]
    assert ids(llm.generate(PROMPTS, GREEDY, lora_request=two, use_tqdm=False)) == wanted["two"]
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == wanted[""]
    assert llm.llm_engine.list_loras() == {1, 2}


@needs_native_cpu
@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_drafts_do_not_change_the_text_of_adapters(
    path: Path, wanted: dict[str, list[list[int]]], tmp_path: Path, method: str
) -> None:
    """Drafts are made without the adapters, which cost acceptance only; prefixes are cached for each adapter."""
    drafts: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method == "draft_model":
        drafts["model"] = str(path / "base")
    if method == "eagle3":
        write_head(tmp_path, method, Shape(TINY["vocab_size"], HIDDEN, TINY["num_hidden_layers"]))
        drafts["model"] = str(tmp_path)
    llm = LLM(
        str(path / "base"), enable_lora=True, speculative_config=drafts, block_size=4, enable_prefix_caching=True,
        **OPTIONS,
    )  # fmt: skip
    let_drafts_pay(llm)
    one, two = adapter(path, "one"), adapter(path, "two")
    for _ in range(2):
        mixed = llm.generate([*PROMPTS, *PROMPTS], GREEDY, lora_request=[one, two, None, one], use_tqdm=False)
        assert ids(mixed) == [wanted["one"][0], wanted["two"][1], wanted[""][0], wanted["one"][1]]
    assert llm.llm_engine.stats().num_draft_tokens


def test_embeddings_use_the_adapter(path: Path, llm: LLM) -> None:
    merged = LLM(str(path / "merged one"), **OPTIONS)
    expected = merged.embed(PROMPTS, use_tqdm=False)
    found = llm.embed(PROMPTS, use_tqdm=False, lora_request=adapter(path, "one"))
    for got, want in zip(found, expected, strict=True):
        assert got.outputs.embedding == pytest.approx(want.outputs.embedding, abs=1e-5)


def test_bad_adapters_raise_errors_and_harm_nothing(
    path: Path, llm: LLM, tmp_path: Path, wanted: dict[str, list[list[int]]]
) -> None:
    factors = random_factors({"model.layers.0.self_attn.q_proj": (HIDDEN, 3)}, 4)
    broken = write_peft(tmp_path / "broken", factors, layers_to_transform=0)
    with pytest.raises(ModelError, match="expected"):
        llm.generate(PROMPTS, GREEDY, lora_request=LoRARequest("broken", 9, str(broken)))
    with pytest.raises(ModelError, match="cannot be read"):
        llm.generate(PROMPTS, GREEDY, lora_request=LoRARequest("absent", 9, str(tmp_path / "absent")))
    with pytest.raises(ParameterError, match="max_lora_rank"):
        factors = random_factors({"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)}, 17)
        wide = write_peft(tmp_path / "wide", factors, layers_to_transform=0)
        llm.generate(PROMPTS, GREEDY, lora_request=LoRARequest("wide", 9, str(wide)))
    with pytest.raises(ParameterError, match="list of one per prompt, 2"):
        llm.generate(PROMPTS, GREEDY, lora_request=[None])
    assert not llm.llm_engine.has_unfinished_requests()
    assert ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == wanted[""]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", 1, "x"), "lora_name"),
        (("a\n", 1, "x"), "lora_name"),
        (("a", 0, "x"), "lora_int_id"),
        (("a", 1, ""), "lora_path"),
        (("a", 1, "x\0y"), "lora_path"),
    ],
)
def test_a_request_for_an_adapter_is_checked(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        LoRARequest(*arguments)


def test_adapters_need_an_option(path: Path) -> None:
    llm = LLM(str(path / "base"), **OPTIONS)
    with pytest.raises(ParameterError, match="needs enable_lora=True"):
        llm.generate(PROMPTS, GREEDY, lora_request=adapter(path, "one"))


def test_files_are_read_again_if_asked(path: Path, llm: LLM, tmp_path: Path) -> None:
    """Later changes of the files have no effect until an adapter is loaded again or forgotten."""
    shape = {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)}
    place = write_peft(tmp_path / "changing", random_factors(shape, 4, 1), layers_to_transform=0)
    request = LoRARequest("changing", 7, str(place))

    def run(request: LoRARequest) -> list[list[int]]:
        return ids(llm.generate(PROMPTS, GREEDY, lora_request=request, use_tqdm=False))

    first = run(request)
    write_peft(place, random_factors(shape, 4, 2), layers_to_transform=0)
    assert run(request) == first
    second = run(LoRARequest("changing", 7, str(place), load_inplace=True))
    assert second != first
    assert run(request) == second
    write_peft(place, random_factors(shape, 4, 1), layers_to_transform=0)
    assert llm.llm_engine.remove_lora(7) and not llm.llm_engine.remove_lora(7)
    assert run(request) == first


def test_adapters_and_base_models_of_both_formats_fit(path: Path, tmp_path: Path) -> None:
    """An adapter of PEFT changes a GGUF file as it changes the checkpoint that the file was made from."""
    (tmp_path / "base.gguf").write_bytes(encode(*contents(path / "base")))
    wanted, found = (
        AdapterReader(base, read_spec(base), "float32", 16, 1 << 24).read(path / "one").weights
        for base in (path / "base", tmp_path / "base.gguf")
    )
    assert found.keys() == wanted.keys() == {"0.q", "0.down"}
    assert all(np.array_equal(found[name].b.data, wanted[name].b.data) for name in wanted)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["thread", "process"])
def engine(path: Path, request: pytest.FixtureRequest) -> Iterator[AsyncLLM]:
    config = EngineConfig(model=str(path / "base"), enable_lora=True, max_loras=1, **OPTIONS)
    engine = AsyncLLM(config, engine_process=request.param)
    yield engine
    engine.shutdown()


def test_adapters_in_an_engine_of_its_own(
    path: Path,
    engine: AsyncLLM,
    wanted: dict[str, list[list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bad adapter ends its request with an error; statistics are answered while adapters are read."""

    async def one(name: str, prompt: int, request: LoRARequest | None) -> list[int]:
        found: list[int] = []
        async for output in engine.generate(PROMPTS[prompt], GREEDY, name, lora_request=request):
            found = output.outputs[0].token_ids
        return found

    async def run() -> None:
        bad = LoRARequest("bad", 3, str(tmp_path / "absent"))
        results = await asyncio.gather(
            one("a", 0, adapter(path, "one")),
            one("b", 1, adapter(path, "two")),
            one("c", 0, None),
            one("d", 0, bad),
            engine.add_lora(adapter(path, "two")),
            engine.add_lora(bad),
            engine.stats(),
            return_exceptions=True,
        )
        assert results[:3] == [wanted["one"][0], wanted["two"][1], wanted[""][0]]
        assert isinstance(results[3], VllmliteError) and "cannot be read" in str(results[3])
        assert results[4] is True
        assert isinstance(results[5], ModelError)
        assert not isinstance(results[6], BaseException)
        assert await engine.remove_lora(2) and not await engine.remove_lora(2)
        assert await one("e", 0, adapter(path, "two")) == wanted["two"][0]
        # An adapter whose files are gone is removed while a request with it is on its way.
        gone = LoRARequest("gone", 4, str(shutil.copytree(path / "two", tmp_path / "gone")))
        assert await engine.add_lora(gone)
        shutil.rmtree(tmp_path / "gone")
        core = engine.llm_engine.engine_core
        assert isinstance(core, EngineClient)
        if isinstance(core.handle, EngineThread):  # as if the host had not removed it yet
            monkeypatch.setattr(AdapterStore, "knows", lambda *_: True)
        assert await engine.remove_lora(4)
        with pytest.raises(VllmliteError, match="cannot be read"):
            await one("f", 0, gone)
        assert await one("g", 0, None) == wanted[""][0]

    asyncio.run(run())


def test_generate_takes_an_adapter(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, wanted: dict[str, list[list[int]]]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt_token_ids": each}) for each in PROMPTS))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if value is not True]
    command = ["generate", "--model", str(path / "base"), "--prompts-file", str(prompts), *flags]
    command += ["--skip-tokenizer-init", "--json", "--temperature=0", "--max-tokens=6", "--ignore-eos"]
    assert main([*command, "--lora", str(path / "one")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["token_ids"] for line in lines] == wanted["one"]
    assert main([*command, "--lora", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
