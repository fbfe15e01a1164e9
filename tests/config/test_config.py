"""EngineConfig: the same fields from keywords, flags and YAML, none of which is ignored."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmlite.cli.parser import OptionParser
from vllmlite.config.arguments import EngineArgs, add_engine_arguments
from vllmlite.config.engine_config import EngineConfig
from vllmlite.config.options import parse_size
from vllmlite.config.refused import ABSENT
from vllmlite.config.speculative import DraftCheckpoint, Speculative, SuffixOptions
from vllmlite.errors import ParameterError

FLAGS: list[tuple[list[str], str, Any]] = [
    (["--model", "m"], "model", "m"),
    (["-m", "m"], "model", "m"),
    (["--tokenizer", "t"], "tokenizer", "t"),
    (["--pooling-type", "mean"], "pooling_type", "MEAN"),
    (["--no-pooling-normalize"], "pooling_normalize", False),
    (["--skip-tokenizer-init"], "skip_tokenizer_init", True),
    (["--model", "m", "--revision", "r"], "revision", "r"),
    (["--tokenizer-revision", "r"], "tokenizer_revision", "r"),
    (["--download-dir", "d"], "download_dir", "d"),
    (["--load-format", "dummy"], "load_format", "dummy"),
    (["--model-impl", "transformers"], "model_impl", "transformers"),
    (["--model-impl", "vllm"], "model_impl", "native"),
    (["--dtype", "half"], "dtype", "float16"),
    (["--max-model-len", "4K"], "max_model_len", 4096),
    (["--generation-config", "vllm"], "generation_config", "vllm"),
    (
        ["--reasoning-config", '{"reasoning_start_str": "<a>", "reasoning_end_str": "</a>"}'],
        "reasoning_config",
        {"reasoning_start_str": "<a>", "reasoning_end_str": "</a>"},
    ),
    (["--speculative-config", '{"method": "ngram"}'], "speculative_config", {"method": "ngram"}),
    (["--override-generation-config", '{"top_k": 5}'], "override_generation_config", {"top_k": 5}),
    (["--served-model-name", "n"], "served_model_name", "n"),
    (["--backend", "torch"], "backend", "torch"),
    (["--device", "cuda:1"], "device", "cuda:1"),
    (["--threads", "3"], "threads", 3),
    (["-dp", "2"], "data_parallel_size", 2),
    (["-tp", "2"], "tensor_parallel_size", 2),
    (["-pp", "2"], "pipeline_parallel_size", 2),
    (["--distributed-executor-backend", "mp"], "distributed_executor_backend", "mp"),
    (["--nnodes", "2", "-tp", "2"], "nnodes", 2),
    (["--node-rank", "1", "--nnodes", "2", "-tp", "2"], "node_rank", 1),
    (["--master-addr", "10.0.0.1"], "master_addr", "10.0.0.1"),
    (["--master-port", "4000"], "master_port", 4000),
    (["--ranks-secret-file", "f"], "ranks_secret_file", "f"),
    (["--distributed-timeout-seconds", "9"], "distributed_timeout_seconds", 9),
    (["--cpu-isa", "avx2"], "cpu_isa", "avx2"),
    (["--quantization", "int4"], "quantization", "int4"),
    (["--quantize-head", "int8"], "quantize_head", "int8"),
    (["--activation-dtype", "int8"], "activation_dtype", "int8"),
    (["--kv-cache-dtype", "float"], "kv_cache_dtype", "float32"),
    (["--kv-cache-dtype", "int8"], "kv_cache_dtype", "int8"),
    (["--kv-cache-dtype", "int8_per_token_head"], "kv_cache_dtype", "int8"),
    (["--kv-cache-dtype", "fp8"], "kv_cache_dtype", "fp8_e4m3"),
    (["--kv-cache-dtype", "fp8_per_token_head"], "kv_cache_dtype", "fp8_per_token_head"),
    (["--block-size", "32"], "block_size", 32),
    (["--num-gpu-blocks-override", "9"], "num_gpu_blocks_override", 9),
    (["--kv_cache_memory_bytes", "2GiB"], "kv_cache_memory_bytes", 2 << 30),
    (["--gpu-memory-utilization=0.5"], "gpu_memory_utilization", 0.5),
    (["--max_num_batched_tokens", "8k"], "max_num_batched_tokens", 8000),
    (["--max-mixed-prefill-tokens", "512"], "max_mixed_prefill_tokens", 512),
    (["--max-num-seqs", "4"], "max_num_seqs", 4),
    (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
    (["--no_enable_prefix_caching"], "enable_prefix_caching", False),
    (["--scheduling-policy", "priority"], "scheduling_policy", "priority"),
    (["--no-async-scheduling"], "async_scheduling", False),
    (["--batch-invariant"], "batch_invariant", True),
    (["--enforce-eager"], "enforce_eager", True),
    (["--seed", "7"], "seed", 7),
    (["--max-logprobs", "-1"], "max_logprobs", -1),
    (["--enable-lora"], "enable_lora", True),
    (["--max-loras", "4"], "max_loras", 4),
    (["--max-lora-rank", "64"], "max_lora_rank", 64),
    (["--max-cpu-loras", "8"], "max_cpu_loras", 8),
    (["--max-lora-bytes", "1G"], "max_lora_bytes", 1 << 30),
    (["--lora-dtype", "half"], "lora_dtype", "float16"),
    (["--swap-space", "2"], "swap_space", 2.0),
    (["--kv-offloading-size", "2"], "kv_offloading_size", 2.0),
    (["--kv-disk-path", "d"], "kv_disk_path", "d"),
    (["--kv-disk-size", "2GiB"], "kv_disk_size", 2 << 30),
    (["--slot-save-path", "d"], "slot_save_path", "d"),
    (["--slot-save-size", "64MiB"], "slot_save_size", 64 << 20),
    (["--enable-sleep-mode"], "enable_sleep_mode", True),
    (["--preemption-mode", "recompute"], "preemption_mode", "recompute"),
]


NODES: dict[str, Any] = {"nnodes": 2, "tensor_parallel_size": 2}
NEEDED: dict[str, dict[str, Any]] = {"revision": {"model": "m"}, "nnodes": NODES, "node_rank": NODES}
"""Options without which another is refused."""


def parser() -> OptionParser:
    made = OptionParser(prog="x")
    add_engine_arguments(made)
    return made


def from_flags(*argv: str) -> EngineConfig:
    return EngineConfig.from_namespace(parser().parse(argv))


def test_no_flags_give_the_defaults() -> None:
    assert from_flags() == EngineConfig() == EngineConfig.from_kwargs()


def test_every_field_is_documented_and_has_a_tested_flag() -> None:
    names = {f.name for f in dataclasses.fields(EngineConfig)}
    assert names == {name for _, name, _ in FLAGS}
    text = parser().format_help()
    for f in dataclasses.fields(EngineConfig):
        assert "--" + f.name.replace("_", "-") in text
        assert f.metadata["help"]
    assert not names & ABSENT.keys()


@pytest.mark.parametrize(
    ("argv", "name", "value"), FLAGS, ids=lambda v: v[0] if isinstance(v, list) else None
)
def test_flag(argv: list[str], name: str, value: Any) -> None:
    assert getattr(from_flags(*argv), name) == value
    others = NEEDED.get(name, {})
    assert getattr(EngineConfig(**{**others, name: value}), name) == value


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"dtype": "int8"}, "dtype", "float32"),
        ({"dtype": "bfloat61"}, "dtype", "did you mean bfloat16?"),
        (
            {"kv_cache_dtype": "int4"},
            "kv_cache_dtype",
            "float16, int8, fp8_e4m3, fp8_e5m2 or fp8_per_token_head",
        ),
        ({"override_generation_config": "{"}, "override_generation_config", "is not JSON"),
        ({"override_generation_config": [1]}, "override_generation_config", "a mapping"),
        ({"block_size": 0}, "block_size", "at least 1"),
        ({"block_size": True}, "block_size", "integer"),
        ({"block_size": 16.0}, "block_size", "integer"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens", "at least 1"),
        ({"max_num_seqs": 10**6}, "max_num_seqs", "at most"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization", "greater than 0"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization", "at most 1"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization", "greater than 0"),
        ({"gpu_memory_utilization": "0.5"}, "gpu_memory_utilization", "number"),
        ({"kv_cache_memory_bytes": "much"}, "kv_cache_memory_bytes", "4G"),
        ({"device": "cuda:x"}, "device", "cuda:N"),
        ({"device": "tpu"}, "device", "cuda:N"),
        ({"model": 3}, "model", "string"),
        ({"model": ""}, "model", "empty"),
        ({"enforce_eager": 1}, "enforce_eager", "True or False"),
        ({"async_scheduling": "yes"}, "async_scheduling", "or None"),
        ({"seed": None}, "seed", "integer"),
        ({"max_logprobs": -2}, "max_logprobs", "at least -1"),
        ({"threads": 0}, "threads", "at least 1"),
        ({"revision": "main"}, "revision", "built-in"),
        ({"skip_tokenizer_init": True, "tokenizer": "t"}, "tokenizer", "cannot be combined"),
        (
            {"num_gpu_blocks_override": 4, "kv_cache_memory_bytes": 4},
            "num_gpu_blocks_override",
            "cannot be combined",
        ),
    ],
)
def test_bad_values_are_refused_by_field(options: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(ParameterError, match=f"^{field}=") as error:
        EngineConfig.from_kwargs(**options)
    assert error.value.field == field
    assert says in str(error.value)


NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def test_forms_of_speculative_decoding_are_one() -> None:
    config = EngineConfig(speculative_config=NGRAM)
    assert config.speculative() == Speculative(4, 5, 5, None)
    assert from_flags("--speculative-config", json.dumps(NGRAM)) == config
    assert from_flags("--spec-method", "ngram", "--spec-tokens", "4") == config
    assert (
        EngineConfig.from_kwargs(speculative_config={"method": "ngram"}, num_speculative_tokens=4) == config
    )
    older = from_flags(
        "--speculative-model=[ngram]", "--num-speculative-tokens=3", "--ngram-prompt-lookup-max=4",
        "--ngram-prompt-lookup-min=2", "--speculative-disable-by-batch-size=8",
    )  # fmt: skip
    assert older.speculative() == Speculative(3, 2, 4, 7)
    drafted = from_flags(
        "--speculative-model=a/draft", "--num-speculative-tokens=3", "--speculative-max-model-len=64",
        "--speculative-model-quantization=int8",
    )  # fmt: skip
    assert drafted.speculative() == Speculative(
        3, 5, 5, None, DraftCheckpoint("draft_model", "a/draft", None, "int8", 64)
    )
    assert from_flags(
        "--spec-method=draft_model", "--spec-model=a/draft", "--spec-tokens=3"
    ).speculative() == (
        Speculative(3, 5, 5, None, DraftCheckpoint("draft_model", "a/draft", None, None, None))
    )
    assert from_flags("--spec-method=suffix").speculative() == Speculative(
        8, 5, 5, None, None, SuffixOptions()
    )
    given = {
        "method": "suffix", "suffix_decoding_max_tree_depth": 16, "suffix_decoding_max_spec_factor": 2,
        "suffix_decoding_min_token_prob": 0.3, "suffix_decoding_max_cached_requests": 10,
    }  # fmt: skip
    limited = {**NGRAM, "max_model_len": 64, "num_speculative_tokens_per_batch_size": [[1, 8, 4], [9, 32, 0]]}
    options = from_flags("--speculative-config", json.dumps(limited)).speculative()
    assert options is not None and (options.max_len, options.by_rows) == (64, ((1, 8, 4), (9, 32, 0)))
    suffix = EngineConfig(speculative_config=given).speculative()
    assert suffix is not None and suffix.suffix == SuffixOptions(16, 2.0, 0.3, 10)
    for ranks, split in ((2, 2), (1, 1), (2, 1)):
        EngineConfig(
            tensor_parallel_size=ranks, speculative_config=NGRAM | {"draft_tensor_parallel_size": split}
        )
    assert EngineConfig.from_kwargs(spec_method=None, spec_tokens=None) == EngineConfig()
    assert (
        EngineConfig().speculative()
        is EngineConfig(speculative_config={"method": None}).speculative()
        is None
    )


@pytest.mark.parametrize(
    ("given", "want"), [({}, (5, 5)), ({"prompt_lookup_min": 2}, (2, 2)), ({"prompt_lookup_max": 3}, (3, 3))]
)
def test_lengths_of_ngrams_are_those_of_vllm(given: dict[str, int], want: tuple[int, int]) -> None:
    options = EngineConfig(
        speculative_config={**NGRAM, **given, "draft_tensor_parallel_size": 1}
    ).speculative()
    assert options is not None
    assert (options.prompt_lookup_min, options.prompt_lookup_max) == want


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"speculative_config": {"method": "dflash"}}, "speculative_config.method", "must be ngram or suffix or"),
        ({"speculative_config": {"method": "mtp", "quantization": "int8"}},
         "speculative_config.quantization", "no effect on mtp drafts"),
        ({"speculative_config": {**NGRAM, "rejection_sample_method": "block"}},
         "speculative_config.rejection_sample_method", "must be standard or strict"),
        ({"speculative_config": {**NGRAM, "synthetic_acceptance_length": 2.0}},
         "speculative_config.synthetic_acceptance_length", "not supported"),
        ({"speculative_config": {"model": "a/draft", "draft_sample_method": "random"}},
         "speculative_config.draft_sample_method", "must be greedy or probabilistic"),
        ({"speculative_config": {"model": "a/draft", "draft_sample_method": "probabilistic"}, "batch_invariant": True},
         "speculative_config.draft_sample_method", "cannot be combined with batch_invariant"),
        ({"speculative_config": {"method": "mtp", "model": ""}}, "speculative_config.model", "needs a checkpoint"),
        ({"speculative_config": {"method": "eagle3", "model": "a/b", "quantization": "int8"}},
         "speculative_config.quantization", "no effect on eagle3 drafts"),
        ({"speculative_config": {"method": "ngrams"}}, "speculative_config.method", "did you mean ngram?"),
        ({"speculative_config": {"method": "draft_model"}}, "speculative_config.model", "needs a checkpoint"),
        ({"speculative_config": {"method": "ngram", "model": "a/draft"}},
         "speculative_config.model", "no effect on ngram drafts"),
        ({"speculative_config": {"model": "a/draft", "prompt_lookup_max": 3}},
         "speculative_config.prompt_lookup_max", "no effect on draft_model drafts"),
        ({"speculative_config": {**NGRAM, "quantization": "int8"}},
         "speculative_config.quantization", "no effect on ngram drafts"),
        ({"speculative_config": {**NGRAM, "num_speculative_tokens_per_batch_size": [[1, 4, 5]]}},
         "speculative_config.num_speculative_tokens_per_batch_size", "drafts from 0 to 4"),
        ({"speculative_config": {**NGRAM, "num_speculative_tokens_per_batch_size": [[1, 4, 3], [4, 8, 1]]}},
         "speculative_config.num_speculative_tokens_per_batch_size", "not overlap"),
        ({"speculative_config": {**NGRAM, "num_speculative_tokens_per_batch_size": {"1": 3}}},
         "speculative_config.num_speculative_tokens_per_batch_size", "must be a list of"),
        ({"speculative_config": {**NGRAM, "num_speculative_tokens": 0}},
         "speculative_config.num_speculative_tokens", "from 1 to 32"),
        ({"speculative_config": {**NGRAM, "prompt_lookup_min": 4, "prompt_lookup_max": 3}},
         "speculative_config.prompt_lookup_min", "at most prompt_lookup_max, which is 3"),
        ({"speculative_config": {**NGRAM, "promt_lookup_min": 4}},
         "speculative_config.promt_lookup_min", "did you mean prompt_lookup_min?"),
        ({"speculative_config": {**NGRAM, "draft_sample_method": "probabilistic"}},
         "speculative_config.draft_sample_method", "no effect on ngram drafts"),
        ({"speculative_config": NGRAM, "spec_tokens": 5}, "spec_tokens", "contradicts num_speculative_tokens=4"),
        ({"spec_tokens": 5}, "speculative_config.method", "must be ngram"),
        ({"speculative_config": "{"}, "speculative_config", "is not JSON"),
    ],
)  # fmt: skip
def test_bad_options_of_speculative_decoding_are_refused(
    options: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(ParameterError) as error:
        EngineConfig.from_kwargs(**options)
    assert error.value.field == field
    assert says in str(error.value)


def test_unknown_names_suggest_the_closest() -> None:
    with pytest.raises(ParameterError, match=r"did you mean max_model_len\?"):
        EngineConfig.from_kwargs(max_model_length=3)
    with pytest.raises(ParameterError, match=r"unknown option$"):
        EngineConfig.from_kwargs(zzz=3)


@pytest.mark.parametrize("name", ABSENT)
def test_unsupported_features_are_refused_by_name(name: str) -> None:
    for value in (*ABSENT[name].neutral, *ABSENT[name].logged):
        assert EngineConfig.from_kwargs(**{name: value}) == EngineConfig()
    with pytest.raises(ParameterError) as error:
        EngineConfig.from_kwargs(**{name: "something else"})
    assert error.value.field == name
    assert error.value.accepted == ABSENT[name].reason


def test_trust_remote_code_logs_that_it_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    EngineConfig.from_kwargs(trust_remote_code=False)
    assert not caplog.records
    EngineConfig.from_kwargs(trust_remote_code=True)
    assert "trust_remote_code=True has no effect: code from a checkpoint is never run" in caplog.text


@pytest.mark.parametrize(
    ("argv", "accepted"),
    [
        (["--tensor-parallel-size", "1"], True),
        (["--prefill_context_parallel_size=2"], False),
        (["--trust-remote-code"], True),
        (["-tp", "1", "--attention-backend", "auto", "-pp=1"], True),
        (["--structured-outputs-config", '{"backend": "xgrammar"}'], True),
        (["--enable-chunked-prefill"], True),
        (["--no-enable-chunked-prefill"], False),
        (["--hf-overrides", "{}"], True),
        (["--hf-overrides", '{"a": 1}'], False),
        (["--swap-space", "0"], True),
        (["--structured-outputs-config.backend", "xgrammar"], True),
        (["--structured_outputs_config.backend=guidance"], False),
        (
            ["--structured-outputs-config", '{"backend": "auto"}', "--structured-outputs-config.a.b", "1"],
            False,
        ),
        (["--compilation-config", "3"], True),
        (["--compilation-config.mode", "3", "-O3"], True),
        (["-cc.level=3", "-O", "2", "--disable-log-requests"], True),
        (["--compilation-config", '{"cudagraph_mode": "NONE"}'], False),
        (["--runner", "pooling", "--task", "embed", "--convert", "embed"], True),
        (["--task", "classify"], False),
        (["--limit-mm-per-prompt", '{"image": 0, "video": {"count": 0}}'], True),
        (["--limit-mm-per-prompt.image", "0"], True),
        (["--limit-mm-per-prompt.image", "1"], False),
        (["--enable-per-request-metrics", "--enable-tokenizer-info-endpoint"], True),
        (["--calculate-kv-scales"], True),
    ],
)
def test_unsupported_features_are_refused_on_the_command_line(
    argv: list[str], accepted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if accepted:
        assert from_flags(*argv) == EngineConfig()
        return
    with pytest.raises(SystemExit, match="2"):
        from_flags(*argv)
    name = (
        argv[0].partition("=")[0].partition(".")[0].removeprefix("--no-").removeprefix("--").replace("-", "_")
    )
    assert ABSENT[name].reason in capsys.readouterr().err


def test_dotted_flags_set_keys_of_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OptionParser(prog="x")
    parser.add_argument("--kwargs")
    parser.add_argument("-n")
    parser.add_argument("words", nargs="*")

    def parsed(*argv: str) -> Any:
        found = parser.parse(argv)
        return json.loads(found.kwargs), found.words

    assert parsed("--kwargs.a_b.c", "1", "word", "--kwargs.d=x=y") == (
        {"a_b": {"c": 1}, "d": "x=y"},
        ["word"],
    )
    assert parsed("--kwargs", '{"a": {"b": 1}, "c": 2}', "--kwargs.a.d", "[3]", "--kwargs.c=4") == (
        {"a": {"b": 1, "d": [3]}, "c": 4},
        [],
    )
    assert parsed("--kwargs.a", "1", "--", "--kwargs.b") == ({"a": 1}, ["--kwargs.b"])
    for argv, says in (
        (["--kwargs", "3", "--kwargs.a", "1"], "--kwargs: 3 is not a JSON object"),
        (["--kwarg.a", "1"], "unknown option --kwarg.a; did you mean --kwargs?"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse(argv)
        assert says in capsys.readouterr().err


def test_options_without_effect_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    from_flags("--trust-remote-code")
    EngineConfig.from_kwargs(trust_remote_code=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"trust_remote_code=True has no effect: {ABSENT['trust_remote_code'].reason}"
    ] * 2


def test_a_torch_dtype_is_accepted() -> None:
    class Like:
        def __str__(self) -> str:
            return "torch.bfloat16"

    assert EngineConfig.from_kwargs(dtype=Like()).dtype == "bfloat16"


def test_paths_become_strings() -> None:
    assert EngineConfig.from_kwargs(model=Path("a") / "b").model == "a/b"


def test_configurations_are_immutable_values() -> None:
    config = EngineConfig(model="m", seed=3)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4  # type: ignore[misc]
    with pytest.raises(ParameterError):
        dataclasses.replace(config, seed=-2)


def test_engine_args_have_vllms_names() -> None:
    args = EngineArgs("m", tensor_parallel_size=1, dtype="half")
    assert isinstance(args, EngineConfig)
    assert (args.model, args.dtype) == ("m", "float16")
    with pytest.raises(ParameterError, match="fully_sharded_loras"):
        EngineArgs("m", fully_sharded_loras=True)
    with pytest.raises(ParameterError, match="max_cpu_loras=2: must be at least max_loras, which is 3"):
        EngineArgs("m", enable_lora=True, max_loras=3, max_cpu_loras=2)
    made = EngineArgs.add_cli_args(argparse.ArgumentParser())
    assert EngineArgs.from_cli_args(made.parse_args(["--seed", "2"])).seed == 2


def test_yaml_overrides_defaults_and_flags_override_yaml(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("model: m\nblock-size: 8\nseed: 5\nkv_cache_memory_bytes: 1M\ntensor-parallel-size: 1\n")
    config = EngineConfig(model="m", block_size=8, seed=6, kv_cache_memory_bytes=1 << 20)
    assert from_flags("--config", str(file), "--seed", "6") == config
    assert EngineConfig.from_yaml(file, seed=6) == config
    file.write_text("")
    assert EngineConfig.from_yaml(file) == EngineConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("block_sise: 8", "did you mean block_size?"),
        ("block-size: 8\nblock_size: 8", "twice"),
        ("- 1", "one mapping"),
        ("1: 2", "one mapping"),
        ("a: [", "is not YAML"),
        ("fully-sharded-loras: true", "enable_lora"),
        ("block-size: eight", "integer"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text)
    with pytest.raises(ParameterError) as error:
        EngineConfig.from_yaml(file)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="No such file"):
        EngineConfig.from_yaml(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("17", 17),
        ("17B", 17),
        ("1k", 1000),
        ("1K", 1024),
        ("1kib", 1024),
        ("1KB", 1000),
        ("1.5G", 3 << 29),
        ("512M", 1 << 29),
        ("2GiB", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1 TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5", "1X", "1e3", "1.0001K", "0x10", "1 2"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_plain_sizes_are_exact(number: int) -> None:
    assert parse_size(str(number)) == number
