"""The first model families against transformers on tiny random checkpoints: logits of prompts split in any way, and
greedy text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from model_runs import LENGTHS, a_backend, chunked, edit_config, expected_logits, greedy, paged_model, prompts
from numpy.typing import NDArray
from paged import PagedModel

from vllmlite.backends.base import Backend
from vllmlite.backends.batch import SlotParams
from vllmlite.backends.torch import TorchBackend
from vllmlite.errors import ModelError, ParameterError
from vllmlite.models import load_model, read_spec

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-no-gqa-gelu": ("Llama", {"num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-sharded": ("Llama", {"max_shard_size": "60KB"}),
    "rope-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "rope-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 32,
        },
    ),
    "rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "rope-yarn": ("Llama", {"rope_parameters": YARN}),
    "rope-yarn-options": (
        "Llama",
        {
            "rope_parameters": YARN
            | {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False}
        },
    ),
    "rope-yarn-mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", SLIDING | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3-layer-types": (
        "Qwen3",
        SLIDING
        | {
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 13}),
}


def test_two_models_share_one_backend(tmp_path: Path, device: str) -> None:
    """Each model has its own pool and slots, of different sizes, and captured steps if the backend has them.
    Alternating steps give the results of each model alone."""
    shapes: list[dict[str, Any]] = [
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 401},
    ]
    for index, shape in enumerate(shapes):
        write_checkpoint(tmp_path / str(index), "Llama", seed=index, **shape)

    def load(backend: Backend, index: int) -> PagedModel:
        model = load_model(
            backend, tmp_path / str(index), max_model_len=(100, 128)[index], block_size=(4, 16)[index]
        )
        paged = PagedModel(model, num_blocks=(300, 80)[index], max_context=(100, 128)[index])
        for slot in range(len(LENGTHS)):
            paged.admit(slot, SlotParams(temperature=0.9 * (slot % 2), seed=slot, frequency_penalty=0.5))
        return paged

    captures = bool(a_backend(device).graph_rows(8))

    def step(paged: PagedModel, number: int) -> list[int]:
        if number == 0:
            sampled = paged.sample(range(len(LENGTHS)), prompts())
        else:
            rows = range(number % 2, len(LENGTHS))
            sampled = paged.sample(rows, captured=captures and number % 5 > 0)
        ids: list[int] = paged.backend.to_host(sampled.ids).tolist()
        return ids

    alone = [load(a_backend(device), index) for index in range(2)]
    wanted = [[step(paged, number) for number in range(24)] for paged in alone]
    backend = a_backend(device)
    together = [load(backend, index) for index in range(2)]
    found = [[step(paged, number) for paged in together] for number in range(24)]
    assert [list(steps) for steps in zip(*found, strict=True)] == wanted


def test_drafts_never_change_the_text(tmp_path: Path, device: str) -> None:
    """Steps of several tokens a row, captured where the backend captures, of two models in turn, give the ids of steps
    of one token, whatever is drafted: greedy and seeded, with penalties."""
    captures, draw = bool(a_backend(device).graph_rows(8)), np.random.default_rng(2)
    backend, texts, models = a_backend(device), [], []
    for index, family in enumerate(("Llama", "Qwen3")):
        write_checkpoint(tmp_path / family, family, seed=index)

        def load(backend: Backend, folder: Path = tmp_path / family) -> PagedModel:
            paged = PagedModel(load_model(backend, folder, max_model_len=128, block_size=16), num_blocks=80)
            for slot in range(3):
                params = SlotParams(
                    temperature=0.9 * (slot % 2), seed=slot, frequency_penalty=0.5 * (slot == 2)
                )
                paged.admit(slot, params)
            return paged

        alone = load(a_backend(device))
        steps = [alone.sample(range(3), prompts()[:3])] + [alone.sample(range(3)) for _ in range(40)]
        texts.append(np.array([alone.backend.to_host(step.ids) for step in steps]).T.tolist())
        models.append(load(backend))
    found = [
        [[int(i)] for i in backend.to_host(paged.sample(range(3), prompts()[:3]).ids)] for paged in models
    ]
    for number in range(18):
        length = number % 9
        for paged, text, known in zip(models, texts, found, strict=True):
            drafts = [wanted[len(own) :][:length] for wanted, own in zip(text, known, strict=True)]
            for draft in drafts:
                draft += [0] * (length - len(draft))
                if length and number % 3:
                    draft[draw.integers(length)] = 1
            for own, ids in zip(known, paged.verify(range(3), drafts, captured=captures), strict=True):
                own += ids
    for text, known in zip(texts, found, strict=True):
        assert [own[: len(wanted)] for wanted, own in zip(text, known, strict=True)] == [
            wanted[: len(own)] for wanted, own in zip(text, known, strict=True)
        ]
        assert max(len(own) for own in known) > 41


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path, device: str) -> None:
    family, changes = CASES[case]
    reference = write_checkpoint(tmp_path, family, **changes)
    sequences = prompts()
    # Past its original length, dynamic rotation depends on how far one had come: token by token is our definition.
    expected = [expected_logits(reference, sequence, case == "rope-dynamic") for sequence in sequences]
    scale = max(float(np.abs(logits).max()) for logits in expected)
    paged = paged_model(tmp_path, device)
    for how in ("whole", "ragged", "token"):
        for row, (found, wanted) in enumerate(zip(chunked(paged, sequences, how), expected, strict=True)):
            assert float(np.abs(found - wanted).max()) <= 1e-4 * scale, f"{how}, row {row}"


@pytest.mark.parametrize("case", ["llama", "qwen2-sliding", "qwen3", "mistral-sliding", "rope-yarn"])
def test_greedy_text_equals_transformers(case: str, tmp_path: Path, device: str) -> None:
    family, changes = CASES[case]
    reference = write_checkpoint(tmp_path, family, **changes)
    found, wanted = greedy(paged_model(tmp_path, device), reference, prompts(3))
    assert found == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama", "qwen2-sliding", "qwen3"])
def test_sixteen_bit_dtypes_are_as_exact_as_transformers(
    case: str, dtype: str, tmp_path: Path, device: str
) -> None:
    family, changes = CASES[case]
    write_checkpoint(tmp_path, family, dtype=dtype, **changes)
    import transformers

    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    paged = paged_model(tmp_path, device, dtype)
    sequences = prompts()
    wanted = [expected_logits(exact, sequence, False) for sequence in sequences]
    theirs = [expected_logits(peer, sequence, False) for sequence in sequences]

    def error(found: list[NDArray[np.float32]]) -> float:
        return float(
            np.sqrt(np.mean(np.concatenate([a - b for a, b in zip(found, wanted, strict=True)]) ** 2))
        )

    for how in ("whole", "ragged"):
        assert error(chunked(paged, sequences, how)) <= 1.1 * error(theirs)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("rope")])
def test_the_older_spelling_of_rope_is_equivalent(case: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, *CASES[case][:1], **CASES[case][1])
    spec = read_spec(tmp_path)
    scaling = dict(CASES[case][1]["rope_parameters"])
    theta = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_scaling=scaling,
        rope_theta=theta,
        torch_dtype="float32",
        dtype=None,
    )
    assert read_spec(tmp_path) == spec
    edit_config(tmp_path, architectures=None)
    assert read_spec(tmp_path) == spec


def windows(path: Path) -> tuple[int | None, ...]:
    return tuple(layer.window for layer in read_spec(path).layers)


def test_sliding_windows_start_at_the_first_layer_that_has_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Qwen2", max_window_layers=1, **SLIDING)
    assert windows(tmp_path) == (None, 8, 8)
    edit_config(tmp_path, layer_types=None)
    assert windows(tmp_path) == (None, 8, 8)
    edit_config(tmp_path, use_sliding_window=False)
    assert windows(tmp_path) == (None, None, None)


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config")
    write_checkpoint(path, "Llama")
    return path


BAD_CONFIGS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"architectures": ["OtherForCausalLM"]},
        ["architectures", "OtherForCausalLM", "LlamaForCausalLM", "Qwen3", "--model-impl transformers"],
    ),
    ({"architectures": ["BertForMaskedLM"]}, ["BertForMaskedLM", "encoders are not supported"]),
    ({"architectures": ["BertForSequenceClassification"]}, ["classifiers are not supported"]),
    ({"architectures": ["LlavaForConditionalGeneration"]}, ["vision, audio"]),
    ({"architectures": ["BertModel"]}, ["without an output layer"]),
    ({"architectures": ["Gibberish"]}, ["Gibberish", "such models are not supported"]),
    ({"vision_config": {"depth": 3}}, ["vision_config", "only text models"]),
    ({"is_encoder_decoder": True}, ["is_encoder_decoder=True", "with an encoder"]),
    ({"architectures": [3]}, ["architectures"]),
    ({"architectures": None, "model_type": "gpt5"}, ["model_type", "gpt5", "llama"]),
    ({"hidden_size": 64.0}, ["hidden_size=64.0", "integer"]),
    ({"hidden_size": True}, ["hidden_size=True", "integer"]),
    ({"hidden_size": "64"}, ["hidden_size='64'"]),
    ({"vocab_size": -1}, ["vocab_size=-1"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "divisor"]),
    (
        {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": None},
        ["num_attention_heads=6", "hidden_size"],
    ),
    ({"head_dim": 15}, ["head_dim=15", "even"]),
    ({"hidden_act": "relu2"}, ["hidden_act='relu2'", "silu"]),
    ({"rms_norm_eps": 0}, ["rms_norm_eps=0"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps='small'"]),
    ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1", "true or false"]),
    ({"dtype": "float8_e4m3fn"}, ["dtype='float8_e4m3fn'", "bfloat16"]),
    ({"architectures": [["LlamaForCausalLM"]]}, ["architectures", "a list of names"]),
    ({"quantization_config": {"quant_method": "aqlm"}}, ["quantization_config", "aqlm"]),
    ({"rope_parameters": {"rope_type": "shortrope", "factor": 2.0}}, ["rope_type='shortrope'", "yarn"]),
    ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters", "factor", "absent"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, ["factor=-2"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, ["factor=nan"]),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, ["high_freq_factor=1.0", "low_freq_factor"]),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention", "one set"]),
    ({"rope_parameters": [1]}, ["rope_parameters=[1]", "object"]),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
    (
        {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]},
        ["layer_types", "list of 3 entries"],
    ),
    (
        {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 3},
        ["sliding_window", "use_sliding_window"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), BAD_CONFIGS)
def test_bad_model_configs_are_refused_by_key(
    config_dir: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    (tmp_path / "config.json").write_bytes((config_dir / "config.json").read_bytes())
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError) as caught:
        read_spec(tmp_path)
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(caught.value)


def test_a_malformed_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_spec(tmp_path)
    for content, message in (
        (b"{", "not JSON"),
        (b"[1]", "list"),
        (b"\xff", "not JSON"),
        (b"[" * 100000, "not JSON"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_spec(tmp_path)


def test_dummy_weights_need_no_files_and_follow_the_seed(config_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((config_dir / "config.json").read_bytes())

    def logits(seed: int) -> NDArray[np.float32]:
        model = load_model(
            TorchBackend(), tmp_path, max_model_len=64, block_size=4, load_format="dummy", seed=seed
        )
        return chunked(PagedModel(model), prompts()[:3], "whole")[2]

    one, again, other = logits(1), logits(1), logits(2)
    assert np.isfinite(one).all()
    assert (one == again).all()
    assert not (one == other).all()


def test_bad_arguments_are_named(config_dir: Path) -> None:
    with pytest.raises(ParameterError, match="kv_cache_dtype"):
        load_model(TorchBackend(), config_dir, max_model_len=64, block_size=4, kv_cache_dtype="int4")
    with pytest.raises(ParameterError, match="load_format"):
        load_model(TorchBackend(), config_dir, max_model_len=64, block_size=4, load_format="gguf")


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8", "fp8_e4m3", "fp8_per_token_head"])
def test_the_cache_may_have_another_dtype(config_dir: Path, kv_dtype: str) -> None:
    def logits(dtype: str) -> NDArray[np.float32]:
        model = load_model(TorchBackend(), config_dir, max_model_len=64, block_size=4, kv_cache_dtype=dtype)
        assert model.kv_spec.dtype == ("float32" if dtype == "auto" else dtype)
        return chunked(PagedModel(model), prompts()[:4], "ragged")[3]

    exact, rounded = logits("auto"), logits(kv_dtype)
    assert 0 < float(np.abs(exact - rounded).max()) < 0.1 * float(np.abs(exact).max())
