"""Reading adapters that change or replace embeddings, output layers and experts, or rescale weights (DoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import TINY, write_checkpoint
from gguf_files import encode
from numpy.typing import NDArray
from peft_files import random_factors, write_peft
from safetensors.numpy import load_file

from vllmlite.errors import ModelError
from vllmlite.lora.reader import AdapterReader
from vllmlite.models import read_spec
from vllmlite.weights.adapter import ABILITIES
from vllmlite.weights.host import float_values

HIDDEN, INNER, VOCAB = TINY["hidden_size"], TINY["intermediate_size"], TINY["vocab_size"]
EXPERTS = 4
EMBED, ATTENTION = "model.embed_tokens", "model.layers.1.self_attn."
MOE = "model.layers.1.block_sparse_moe."
STACKED = "model.layers.1.mlp.experts."
Q = {f"{ATTENTION}q_proj": (HIDDEN, HIDDEN)}
Tensors = Mapping[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a checkpoint of a mixture of experts."""
    path = tmp_path_factory.mktemp("base")
    write_checkpoint(path, "Mixtral", num_local_experts=EXPERTS, num_experts_per_tok=2, num_hidden_layers=2)
    return path


def reader_of(base: Path, **options: Any) -> AdapterReader:
    return AdapterReader(base, read_spec(base), "float32", max_rank=16, max_bytes=1 << 24, **options)


def numbers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stacked(rank: int, seed: int = 0) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Factors for both parameters of the experts of layer 1 as PEFT stores them, and by name of the parameter."""
    factors = random_factors({"gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}, rank * EXPERTS, seed)
    names = {"gate_up": f"{STACKED}base_layer.lora_", "down": f"{STACKED}lora_"}
    return {
        f"{names[name]}{factor}.weight": values
        for name, pair in factors.items()
        for factor, values in zip("AB", pair, strict=True)
    }, dict(factors)


def test_dora_gives_rows_their_norms(base: Path, tmp_path: Path) -> None:
    """``m * (W + scale * b @ a) / ||W + scale * b @ a||``, where the second factor of the gain is in ``b``."""
    factors = random_factors(Q, 4)
    magnitudes = np.random.default_rng(1).uniform(0.5, 2, HIDDEN).astype(np.float32)
    path = write_peft(
        tmp_path, factors, more={f"{ATTENTION}q_proj.lora_magnitude_vector": magnitudes},
        target_modules=["1.self_attn.q_proj"], use_dora=True,
    )  # fmt: skip
    found = reader_of(base).read(path).weights["1.q"]
    assert found.gain is not None
    weight = load_file(base / "model.safetensors")[f"{ATTENTION}q_proj.weight"]
    product = found.scale * float_values(found.b) @ float_values(found.a)
    changed = found.gain[0][:, None] * weight + product
    np.testing.assert_allclose(np.linalg.norm(changed, axis=1), magnitudes, rtol=1e-5)
    a, b = factors[f"{ATTENTION}q_proj"]
    np.testing.assert_allclose(changed / found.gain[0][:, None], weight + 2 * b @ a, rtol=1e-3, atol=1e-5)
    assert not found.gain[1].any()


def test_whole_tables_replace_those_of_the_base_model(base: Path, tmp_path: Path) -> None:
    tables = {"lm_head.weight": numbers(VOCAB, HIDDEN), f"{EMBED}.weight": numbers(VOCAB, HIDDEN, seed=1)}
    path = write_peft(
        tmp_path, random_factors(Q, 4), more=tables, target_modules=["1.self_attn.q_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
    )  # fmt: skip
    found = reader_of(base).read(path)
    assert found.rank == 4
    for place, table in (("head", tables["lm_head.weight"]), ("embedding", tables[f"{EMBED}.weight"].T)):
        change = found.weights[place]
        assert change.gain is not None and not change.gain.any()
        np.testing.assert_array_equal(float_values(change.b) @ float_values(change.a), table)


def test_copies_of_the_base_models_tables_change_nothing(base: Path, tmp_path: Path) -> None:
    """PEFT stores them beside an adapter of an embedding; in another dtype they are rounded."""
    a, b = random_factors({"embed": (HIDDEN, VOCAB)}, 4)["embed"]
    table = load_file(base / "model.safetensors")[f"{EMBED}.weight"]
    more = {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}
    options: dict[str, Any] = {"target_modules": ["embed_tokens", "1.self_attn.q_proj"]}

    def read(copy: NDArray[Any]) -> set[str]:
        copies = {f"{EMBED}.base_layer.weight": copy}
        path = write_peft(tmp_path, random_factors(Q, 4), more=more | copies, **options)
        return set(reader_of(base).read(path).weights)

    assert read(table) == read(table.astype(np.float16)) == {"embedding", "1.q"}
    with pytest.raises(ModelError, match=r"embed_tokens': its base_layer.weight differs from the base model"):
        read(table + 1)
    with pytest.raises(ModelError, match=r"its base_layer.weight is of int32"):
        read(table.astype(np.int32))
    with pytest.raises(ModelError, match=r"target_modules: .*added tokens"):
        read(np.concatenate([table, table[:2]]))


def test_stacked_experts_are_taken_apart(base: Path, tmp_path: Path) -> None:
    """Rows of ``a`` are ordered by expert, columns of ``b`` by rank and then by expert."""
    more, factors = stacked(3)
    path = write_peft(
        tmp_path, random_factors(Q, 3), more=more, target_modules=["1.self_attn.q_proj"],
        target_parameters=["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
    )  # fmt: skip
    found = reader_of(base).read(path).weights
    assert len(found) == 1 + 3 * EXPERTS
    for expert in range(EXPERTS):
        whole = {}
        for name, (a, b) in factors.items():
            whole[name] = b.reshape(len(b), 3, EXPERTS)[..., expert] @ a.reshape(EXPERTS, 3, -1)[expert]
        parts = {"gate": whole["gate_up"][:INNER], "up": whole["gate_up"][INNER:], "down": whole["down"]}
        for part, expected in parts.items():
            change = found[f"1.experts.{expert}.{part}"]
            np.testing.assert_allclose(float_values(change.b) @ float_values(change.a), expected, rtol=1e-5)
            assert change.scale == 8 / 3


def test_single_experts_and_routers_are_changed(base: Path, tmp_path: Path) -> None:
    names = {f"{MOE}experts.{expert}.w1": (INNER, HIDDEN) for expert in range(EXPERTS)}
    path = write_peft(
        tmp_path, random_factors(names | {f"{MOE}gate": (EXPERTS, HIDDEN)}, 4), layers_to_transform=1
    )
    found = reader_of(base).read(path).weights
    assert found.keys() == {*(f"1.experts.{expert}.gate" for expert in range(EXPERTS)), "1.router"}
    write_peft(tmp_path, random_factors(dict(list(names.items())[1:]), 4), layers_to_transform=1)
    with pytest.raises(ModelError, match=r"lacks tensors of modules .*experts.0.w1"):
        reader_of(base).read(tmp_path)


def test_gguf_files_change_embeddings_and_experts(base: Path, tmp_path: Path) -> None:
    """llama.cpp stores the first factor of an embedding transposed, and stacks the factors of experts."""
    a, b = random_factors({"embed": (HIDDEN, VOCAB)}, 4)["embed"]
    down_a, down_b = numbers(EXPERTS, 2, INNER), numbers(EXPERTS, HIDDEN, 2)
    embedding = np.ascontiguousarray(a.T), b
    file = _gguf(tmp_path, {"token_embd": embedding, "blk.1.ffn_down_exps": (down_a, down_b)})
    found = reader_of(base).read(file).weights
    assert found.keys() == {"embedding", *(f"1.experts.{expert}.down" for expert in range(EXPERTS))}
    np.testing.assert_array_equal(float_values(found["embedding"].a), a)
    np.testing.assert_array_equal(float_values(found["1.experts.2.down"].b), down_b[2])
    halves = down_a[:2], down_b.reshape(2, 2 * HIDDEN, 2)
    for name, pair in (("blk.1.ffn_down_exps", halves), ("blk.1.attn_q", (down_a, down_b))):
        with pytest.raises(ModelError, match=r"x.gguf: module 'blk.1.*experts; the base model has"):
            reader_of(base).read(_gguf(tmp_path, {name: pair}))


def _gguf(path: Path, tensors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Path:
    fields = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    file = path / "x.gguf"
    file.write_bytes(
        encode(
            fields,
            {
                f"{name}.weight.lora_{factor}": ("F32", values.shape, values.tobytes())
                for name, pair in tensors.items()
                for factor, values in zip("ab", pair, strict=True)
            },
        )
    )
    return file


def _with(more: Tensors, **config: Any) -> tuple[Tensors, dict[str, Any]]:
    return more, {"target_modules": ["1.self_attn.q_proj"]} | config


VECTOR = f"{ATTENTION}q_proj.lora_magnitude_vector"
REFUSED: dict[str, tuple[tuple[Tensors, dict[str, Any]], str]] = {
    "DoRA without vectors": (_with({}, use_dora=True), r"has no lora_magnitude_vector, .*use_dora=True"),
    "vectors without DoRA": (_with({VECTOR: numbers(HIDDEN)}), r"has a lora_magnitude_vector, .*use_dora=False"),
    "a short vector": (_with({VECTOR: numbers(3)}, use_dora=True), r"of shape \[3\]; expected \[64\]"),
    "no whole weight": (_with({}, modules_to_save=["lm_head"]), "no tensors of 'lm_head', which modules_to_save"),
    "more tokens": (
        _with({"lm_head.weight": numbers(VOCAB + 1, HIDDEN)}, modules_to_save=["lm_head"]),
        "modules_to_save: .*added tokens",
    ),
    "an unnamed weight": (_with({"lm_head.weight": numbers(VOCAB, HIDDEN)}), "differs from the base model"),
    "a norm": (
        _with({"model.norm.weight": numbers(HIDDEN)}, modules_to_save=["norm"]), "modules_to_save: replaces module"
    ),
    "parameters that are absent": (
        _with({}, target_parameters=["mlp.experts.down_proj"]), "lacks tensors .*experts.down_proj"
    ),
    "unnamed parameters": (_with(stacked(4)[0]), "neither target_modules nor target_parameters"),
    "experts of another number": (
        _with({f"{STACKED}lora_A.weight": numbers(3, INNER), f"{STACKED}lora_B.weight": numbers(HIDDEN, 3)}),
        "expected those of gate_up_proj or down_proj of 4 experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(base: Path, tmp_path: Path, case: str) -> None:
    (more, config), says = REFUSED[case]
    path = write_peft(tmp_path, random_factors(Q, 4), more=more, **config)
    with pytest.raises(ModelError, match=says):
        reader_of(base).read(path)


@pytest.mark.parametrize("ability", sorted(ABILITIES))
def test_backends_refuse_what_they_cannot_do(base: Path, tmp_path: Path, ability: str) -> None:
    cases: dict[str, tuple[Tensors, dict[str, Any], str]] = {
        "embedding": ({f"{EMBED}.weight": numbers(VOCAB, HIDDEN)}, {"modules_to_save": ["embed_tokens"]}, "embedding"),
        "head": ({"lm_head.weight": numbers(VOCAB, HIDDEN)}, {"modules_to_save": ["lm_head"]}, "output layer"),
        "gain": ({VECTOR: numbers(HIDDEN) + 5}, {"use_dora": True}, "use_dora"),
        "experts": (
            stacked(4)[0], {"target_parameters": ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]}, "experts"
        ),
    }  # fmt: skip
    more, config, field = cases[ability]
    path = write_peft(
        tmp_path, random_factors(Q, 4), more=more, **{"target_modules": ["1.self_attn.q_proj"]} | config
    )
    assert reader_of(base).read(path).weights
    with pytest.raises(ModelError, match=rf"{field}.*which this backend does not support"):
        reader_of(base, abilities=frozenset()).read(path)
