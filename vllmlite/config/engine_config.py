"""EngineConfig: everything an engine can be told. Flags, ``--config`` YAML and ``--help`` derive from its fields."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllmlite.config.options import (
    add_fields,
    check_fields,
    did_you_mean,
    flag,
    given,
    mapping_option,
    read_yaml,
)
from vllmlite.config.options import option as _option
from vllmlite.config.refused import ABSENT
from vllmlite.errors import ParameterError
from vllmlite.pooling_params import POOLING_TYPES
from vllmlite.sampling_params import MAX_LOGPROBS

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4")
CHECKPOINT_METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "modelopt")
METHOD_SYNONYMS = {
    "awq_marlin": "awq", "gptq_marlin": "gptq", "modelopt_fp4": "modelopt", "modelopt_fp8": "modelopt"
}  # fmt: skip
"""Names of vLLM for its kernels of a method."""
KV_DTYPES = (*FLOAT_DTYPES, "int8")
CPU_ISAS = ("auto", "baseline", "avx2", "avx512", "avx512_bf16", "amx", "neon")
DTYPE_SYNONYMS = {"float": "float32", "half": "float16"}
REASONING_KEYS = ("reasoning_start_str", "reasoning_end_str")
KV_DTYPE_SYNONYMS = {**DTYPE_SYNONYMS, "int8_per_token_head": "int8"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine runs and with what means, under vLLM's names. Raises :class:`ParameterError` on bad values."""

    model: str | None = _option(
        None,
        "directory with a checkpoint, GGUF file, tarball of vllmlite download, or Hugging Face id; "
        "default: the built-in demo model",
        group="model",
        metavar="DIR|FILE|ID",
    )
    tokenizer: str | None = _option(
        None,
        "directory or Hugging Face id of the tokenizer; default: the model's",
        group="model",
        metavar="DIR|ID",
    )
    skip_tokenizer_init: bool = _option(
        False, "load no tokenizer: token ids in, token ids out", group="model"
    )
    revision: str | None = _option(
        None, "branch, tag or commit of a model on the hub", group="model", metavar="REVISION"
    )
    tokenizer_revision: str | None = _option(
        None, "branch, tag or commit of a tokenizer on the hub", group="model", metavar="REVISION"
    )
    download_dir: str | None = _option(
        None, "where downloads are cached; default: the Hugging Face cache", group="model", metavar="DIR"
    )
    load_format: str = _option(
        "auto",
        "what holds the weights; auto: what is there; pt: PyTorch's .bin and .pt; dummy: random ones, to measure speed",
        group="model",
        choices=("auto", "safetensors", "pt", "gguf", "dummy"),
    )
    model_impl: str = _option(
        "auto",
        "native: vllmlite's decoder; transformers: its own code, on torch; auto: native for families that have it",
        group="model",
        choices=("auto", "native", "transformers"),
        synonyms={"vllm": "native"},
    )
    dtype: str = _option(
        "auto",
        "dtype of weights and activations; auto: the backend's best for the checkpoint's",
        group="model",
        choices=("auto", *FLOAT_DTYPES),
        synonyms=DTYPE_SYNONYMS,
    )
    quantization: str | None = _option(
        None,
        "int8, int4: quantise float weights at load; others: the method that the checkpoint must have; default: as the "
        "checkpoint has them",
        group="model",
        choices=(*QUANTIZATIONS, *CHECKPOINT_METHODS),
        synonyms=METHOD_SYNONYMS,
    )
    max_model_len: int | None = _option(
        None,
        "longest sequence, prompt and output together; default: the model's context",
        group="model",
        low=1,
        size=True,
    )
    generation_config: str = _option(
        "auto",
        "default sampling parameters: auto, the model's generation_config.json; vllm, the engine's own; or a directory",
        group="model",
        metavar="auto|vllm|DIR",
    )
    override_generation_config: Mapping[str, Any] = mapping_option(
        'default sampling parameters over those, such as {"temperature": 0.6}',
        group="model",
    )
    reasoning_config: Mapping[str, Any] = mapping_option(
        'marks of the model\'s reasoning, for thinking_token_budget: {"reasoning_start_str": "<think>", '
        '"reasoning_end_str": "</think>"}; the server knows them from reasoning-parser',
        group="model",
    )
    served_model_name: str | None = _option(
        None, "name to show for the model; default: as it was given", group="model", metavar="NAME"
    )

    backend: str = _option("auto", "what computes", choices=("auto", "cpu", "cuda", "torch"))
    device: str = _option("auto", "where: auto, cpu, cuda or cuda:N", metavar="DEVICE")
    threads: int | None = _option(
        None, "CPU threads; default: the cores this process may use", low=1, high=4096
    )
    cpu_isa: str = _option(
        "auto",
        "newest instruction set that the cpu backend uses; auto: the CPU's best",
        choices=CPU_ISAS,
    )
    kv_cache_dtype: str = _option(
        "auto",
        "dtype of the key/value cache; auto: the model's; int8: half of bfloat16's memory, a scale a token and head",
        choices=("auto", *KV_DTYPES),
        synonyms=KV_DTYPE_SYNONYMS,
    )
    block_size: int = _option(16, "tokens in a key/value cache block", low=1, high=1024)
    num_gpu_blocks_override: int | None = _option(None, "key/value cache blocks, on any device", low=1)
    kv_cache_memory_bytes: int | None = _option(
        None,
        "memory for the key/value cache: bytes, or 512M, 4G, 2GiB (1024-based; MB, GB: 1000-based)",
        low=1,
        size=True,
    )
    gpu_memory_utilization: float = _option(
        0.9,
        "part of the device's memory to use, where the cache's size is not given (CPU: of what is free, to 4 GiB)",
    )
    max_num_batched_tokens: int | None = _option(
        None,
        "most tokens in a step, prompts and decodes together; default: 2048 on a CPU, else 8192",
        low=1,
        size=True,
    )
    max_mixed_prefill_tokens: int | None = _option(
        None,
        "most tokens of prompts in a step that also continues texts: with fewer, texts flow more evenly and prompts "
        "take longer; default: max_num_batched_tokens",
        low=1,
        size=True,
    )
    max_num_seqs: int = _option(256, "most sequences in a step", low=1, high=65536)
    enable_prefix_caching: bool = _option(True, "reuse cached blocks of equal prompt beginnings")
    scheduling_policy: str = _option(
        "fcfs", "who goes first: first come, or the lowest priority number", choices=("fcfs", "priority")
    )
    async_scheduling: bool | None = _option(
        None, "keep two steps in flight; default: where the backend is asynchronous"
    )
    batch_invariant: bool = _option(
        False, "the same bits however requests are batched, in 16 bits on a GPU too, where that takes time"
    )
    enforce_eager: bool = _option(False, "record no graphs")
    pooling_type: str = _option(
        "LAST",
        "embeddings: the last token's hidden state, or the mean of all",
        choices=POOLING_TYPES,
        synonyms={name.lower(): name for name in POOLING_TYPES},
    )
    pooling_normalize: bool = _option(True, "scale embeddings to length 1")
    seed: int = _option(
        0, "sampling is reproducible from this; -1: another one at each start", low=-1, high=2**64 - 1
    )
    max_logprobs: int = _option(
        MAX_LOGPROBS, "most log-probabilities a request may ask for; -1: no limit", low=-1
    )

    def __post_init__(self) -> None:
        """Normalise paths, sizes and dtype synonyms; check every field, then the fields against one another."""
        check_fields(self)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ParameterError(
                "gpu_memory_utilization", self.gpu_memory_utilization, "must be over 0 and at most 1"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ParameterError("device", self.device, "must be auto, cpu, cuda or cuda:N")
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ParameterError(
                "num_gpu_blocks_override",
                self.num_gpu_blocks_override,
                "says the size of the key/value cache, and so does kv_cache_memory_bytes: give one of them",
            )
        marks = self.reasoning_config
        if marks and (
            marks.keys() != {*REASONING_KEYS} or not all(isinstance(m, str) and m for m in marks.values())
        ):
            raise ParameterError(
                "reasoning_config", marks, f"must hold {' and '.join(REASONING_KEYS)}, and nothing else"
            )
        for name in ("tokenizer", "tokenizer_revision"):
            if self.skip_tokenizer_init and getattr(self, name) is not None:
                raise ParameterError(
                    name, getattr(self, name), "is not used with skip_tokenizer_init: leave one out"
                )
        if self.model is None and self.revision is not None:
            raise ParameterError(
                "revision", self.revision, "the built-in model has no revisions: name a model"
            )

    @classmethod
    def from_kwargs(cls, **options: Any) -> EngineConfig:
        """A configuration from keyword arguments, vLLM's included; what is not here is refused by its name."""
        return cls(**known_options(options))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> EngineConfig:
        """A configuration from a YAML mapping of options; ``overrides`` win over the file."""
        return cls.from_kwargs(**{**read_yaml(path), **overrides})

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> EngineConfig:
        """What a parser of :func:`add_engine_arguments` found: flags over ``--config`` over defaults."""
        flags = given(namespace, cls)
        path = getattr(namespace, "config", None)
        return cls(**flags) if path is None else cls.from_yaml(path, **flags)


class EngineArgs(EngineConfig):
    """vLLM's name for :class:`EngineConfig`, taking every keyword that :meth:`EngineConfig.from_kwargs` takes."""

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """See :class:`EngineConfig`'s fields."""
        super().__init__(model=model, **known_options(options))

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """vLLM's name for :func:`add_engine_arguments`; returns ``parser``."""
        add_engine_arguments(parser)
        return parser

    from_cli_args = EngineConfig.from_namespace


AsyncEngineArgs = EngineArgs
"""vLLM's name for the options of an AsyncLLM, which are the same here."""


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``options`` that are fields; raises where one is unknown, or asks for something that is absent."""
    names = {f.name for f in fields(EngineConfig)}
    known: dict[str, Any] = {}
    for name, value in options.items():
        if name in names:
            known[name] = value
        elif name not in ABSENT:
            raise ParameterError(name, value, "no such option" + did_you_mean(name, [*names, *ABSENT]))
        else:
            ABSENT[name].check(name, value)
    return known


SHORT = {
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
    "compilation_config": ("-cc",),
    "optimization_level": ("-O",),
}
"""vLLM's other names of options that are absent."""


def add_engine_arguments(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Give ``parser`` a flag for each field, ``--config``, and hidden ones for what is in :data:`ABSENT`.

    Flags that are not given leave nothing in the namespace: :meth:`EngineConfig.from_namespace` merges. Names in
    ``leave_out`` get no flag: the command has its own."""
    add_fields(parser, EngineConfig, leave_out)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; flags win over it")
    for name, absent in ABSENT.items():
        if name in leave_out:
            continue
        action = _AbsentFlag if any(isinstance(n, bool) for n in absent.neutral) else _AbsentValue
        parser.add_argument(
            *SHORT.get(name, ()),
            flag(name),
            dest=name,
            action=action,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


class _AbsentValue(argparse.Action):
    """``--flag VALUE`` of an option in :data:`ABSENT`: an error, unless the value asks for nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        flag: str | None = None,
    ) -> None:
        absent = ABSENT[self.dest]
        if absent.accepts(values):
            return
        try:
            absent.check(self.dest, json.loads(values))
        except ValueError:
            parser.error(f"{flag}={values}: {absent.reason}")


class _AbsentFlag(argparse.BooleanOptionalAction):
    """``--flag`` or ``--no-flag`` of an option in :data:`ABSENT`: an error, unless that asks for nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        flag: str | None = None,
    ) -> None:
        absent = ABSENT[self.dest]
        if flag is not None:
            try:
                absent.check(self.dest, not flag.startswith("--no-"))
            except ParameterError:
                parser.error(f"{flag}: {absent.reason}")
