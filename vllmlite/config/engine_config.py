"""EngineConfig: all options of an engine. Flags, ``--config`` YAML and ``--help`` are derived from its fields."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllmlite.config.nodes import check_nodes
from vllmlite.config.options import (
    check_fields,
    did_you_mean,
    given_options,
    mapping,
    mapping_option,
    read_yaml,
)
from vllmlite.config.options import option as _option
from vllmlite.config.refused import ABSENT
from vllmlite.config.speculative import FIELD as SPECULATIVE
from vllmlite.config.speculative import (
    PROBABILISTIC,
    SHORTHANDS,
    Speculative,
    speculative,
    with_shorthands,
)
from vllmlite.errors import ParameterError
from vllmlite.pooling_params import POOLING_TYPES
from vllmlite.sampling_params import MAX_LOGPROBS

MOST_RANKS = 64
"""Maximum number of processes that compute one model."""
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4")
AT_LOAD = (*QUANTIZATIONS, "fp8")
"""Methods by which float weights can be quantised when they are loaded."""
CHECKPOINT_METHODS = (
    "auto-round", "awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4",
)  # fmt: skip
METHOD_SYNONYMS = {
    "auto_round": "auto-round", "intel/auto-round": "auto-round", "awq_marlin": "awq", "gptq_marlin": "gptq",
    "gpt_oss_mxfp4": "mxfp4", "modelopt_fp4": "modelopt", "modelopt_fp8": "modelopt",
}  # fmt: skip
"""Other names of methods: older ones, and those of vLLM's kernels."""
KV_DTYPES = (*FLOAT_DTYPES, "int8", "fp8_e4m3", "fp8_e5m2", "fp8_per_token_head")
CPU_ISAS = ("auto", "baseline", "avx2", "avx512", "avx512_bf16", "amx", "neon")
DTYPE_SYNONYMS = {"float": "float32", "half": "float16"}
PREEMPTION_MODES = ("auto", "swap", "recompute")
REASONING_KEYS = ("reasoning_start_str", "reasoning_end_str")
KV_DTYPE_SYNONYMS = {**DTYPE_SYNONYMS, "fp8": "fp8_e4m3", "int8_per_token_head": "int8"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All options of an engine, under vLLM's names. Raises :class:`ParameterError` for an invalid value."""

    model: str | None = _option(
        None,
        "directory with a checkpoint, GGUF file, tarball of vllmlite download, or Hugging Face id; "
        "default: the built-in demo model",
        group="model",
        metavar="DIR|FILE|ID",
        short=("-m",),
    )
    tokenizer: str | None = _option(
        None,
        "directory or Hugging Face id of the tokenizer; default: the model's",
        group="model",
        metavar="DIR|ID",
    )
    skip_tokenizer_init: bool = _option(
        False, "do not load a tokenizer: prompts and outputs are token ids only", group="model"
    )
    revision: str | None = _option(
        None, "branch, tag or commit of a model on the hub", group="model", metavar="REVISION"
    )
    tokenizer_revision: str | None = _option(
        None, "branch, tag or commit of a tokenizer on the hub", group="model", metavar="REVISION"
    )
    download_dir: str | None = _option(
        None, "cache directory of downloads; default: the Hugging Face cache", group="model", metavar="DIR"
    )
    load_format: str = _option(
        "auto",
        "format of the weights; auto: the one present; pt: PyTorch's .bin and .pt; dummy: random, for benchmarks",
        group="model",
        choices=("auto", "safetensors", "pt", "gguf", "dummy"),
    )
    model_impl: str = _option(
        "auto",
        "native: vllmlite's decoder; transformers: transformers' model code, on torch; auto: native where supported",
        group="model",
        choices=("auto", "native", "transformers"),
        synonyms={"vllm": "native"},
    )
    dtype: str = _option(
        "auto",
        "dtype of weights and activations; auto: the checkpoint's, or the closest that the backend supports",
        group="model",
        choices=("auto", *FLOAT_DTYPES),
        synonyms=DTYPE_SYNONYMS,
    )
    quantization: str | None = _option(
        None,
        "int8, int4, fp8: quantise float weights at load; other names: the checkpoint must have this method; default: "
        "the checkpoint's",
        group="model",
        choices=(*QUANTIZATIONS, *CHECKPOINT_METHODS),
        synonyms=METHOD_SYNONYMS,
    )
    quantize_head: str | None = _option(
        None,
        "int8: quantise the output layer at load if it is stored as floats; default: keep it as it is stored",
        group="model",
        choices=("int8",),
    )
    activation_dtype: str = _option(
        "auto",
        "int8: products with 4-bit and 8-bit integer weights quantise activations; auto: as the checkpoint says",
        group="model",
        choices=("auto", "int8"),
    )
    max_model_len: int | None = _option(
        None,
        "maximum sequence length, prompt and output together; default: the model's context length",
        group="model",
        low=1,
        size=True,
    )
    generation_config: str = _option(
        "auto",
        "source of default sampling parameters: auto: the model's generation_config.json; vllm: none; or a directory",
        group="model",
        metavar="auto|vllm|DIR",
    )
    override_generation_config: Mapping[str, Any] = mapping_option(
        'default sampling parameters that override generation_config, such as {"temperature": 0.6}',
        group="model",
    )
    reasoning_config: Mapping[str, Any] = mapping_option(
        'markers of the model\'s reasoning, for thinking_token_budget: {"reasoning_start_str": "<think>", '
        '"reasoning_end_str": "</think>"}; the server takes them from reasoning-parser',
        group="model",
    )
    served_model_name: str | None = _option(
        None, "display name of the model; default: the value of --model", group="model", metavar="NAME"
    )

    backend: str = _option("auto", "compute backend", choices=("auto", "cpu", "cuda", "torch"))
    device: str = _option("auto", "device: auto, cpu, cuda or cuda:N", metavar="DEVICE")
    threads: int | None = _option(
        None,
        "CPU threads of each rank; default: the cores this process may use, divided among the ranks",
        low=1,
        high=4096,
    )
    data_parallel_size: int = _option(
        1,
        "replicas of the engine behind one server, each with its own process and its share of the CPUs, or its own "
        "GPU; a request goes to the one that can begin it the soonest, prompt prefixes that it has cached considered",
        low=1,
        high=1024,
        short=("-dp",),
    )
    cpu_isa: str = _option(
        "auto",
        "newest instruction set for the cpu backend to use; auto: the best that the CPU has",
        choices=CPU_ISAS,
    )
    kv_cache_dtype: str = _option(
        "auto",
        "dtype of the key/value cache; auto: the checkpoint's, or the model's; int8, fp8 (e4m3), fp8_e5m2 and "
        "fp8_per_token_head take half of bfloat16's memory",
        choices=("auto", *KV_DTYPES),
        synonyms=KV_DTYPE_SYNONYMS,
    )
    block_size: int = _option(16, "tokens per key/value cache block", low=1, high=1024)
    num_gpu_blocks_override: int | None = _option(
        None, "number of key/value cache blocks, on any device", low=1
    )
    kv_cache_memory_bytes: int | None = _option(
        None,
        "memory for the key/value cache: bytes, or 512M, 4G, 2GiB (1024-based; MB, GB: 1000-based)",
        low=1,
        size=True,
    )
    swap_space: float = _option(
        0.0,
        "GiB of main memory for blocks that leave the key/value cache, such as those of preempted sequences and of "
        "earlier prompts; they are copied back where that is faster than computing them again",
        group="cache tier",
        low=0.0,
    )
    kv_offloading_size: float | None = _option(None, "the same as swap_space", group="cache tier", low=0.0)
    kv_disk_path: str | None = _option(
        None,
        "directory of a file that keeps blocks across restarts; it reveals prompts, so only its owner may read it",
        group="cache tier",
        metavar="DIR",
    )
    kv_disk_size: int = _option(
        16 << 30, "maximum size of that file: bytes, or 512M, 64G", group="cache tier", low=1 << 20, size=True
    )
    slot_save_path: str | None = _option(
        None,
        "directory in which clients may save prompts' keys and values under names, with llama.cpp's "
        "/slots/ID?action=save, and restore them; the server must have an api-key",
        group="cache tier",
        metavar="DIR",
    )
    slot_save_size: int = _option(
        16 << 30,
        "maximum size of all files in that directory: bytes, or 512M, 64G",
        group="cache tier",
        low=1 << 20,
        size=True,
    )
    enable_sleep_mode: bool = _option(
        False,
        "let the engine sleep: LLM.sleep and POST /sleep free its memory, LLM.wake_up and POST /wake_up take it back",
    )
    preemption_mode: str = _option(
        "auto",
        "how a preempted sequence resumes: swap: copy its blocks from the cache tiers; recompute: compute them again; "
        "auto: whichever is faster",
        group="cache tier",
        choices=PREEMPTION_MODES,
    )
    gpu_memory_utilization: float = _option(
        0.9,
        "fraction of the device's memory to use if the cache size is not given (CPU: of free memory, at most 4 GiB)",
    )
    max_num_batched_tokens: int | None = _option(
        None,
        "maximum tokens per step, prompts and decodes together; default: 2048 on a CPU, else 8192",
        low=1,
        size=True,
    )
    max_mixed_prefill_tokens: int | None = _option(
        None,
        "maximum prompt tokens in a step that also has decodes; lower values make decoding smoother, prompts slower; "
        "default: max_num_batched_tokens",
        low=1,
        size=True,
    )
    max_num_seqs: int = _option(256, "maximum sequences per step", low=1, high=65536)
    enable_prefix_caching: bool = _option(True, "reuse cached blocks of prompts with the same beginning")
    scheduling_policy: str = _option(
        "fcfs",
        "order of requests: first come, first served; or lowest priority number first",
        choices=("fcfs", "priority"),
    )
    async_scheduling: bool | None = _option(
        None, "keep two steps in flight; default: on if the backend is asynchronous"
    )
    batch_invariant: bool = _option(
        False, "make results bit-identical for any batch composition; slower with 16-bit dtypes on a GPU"
    )
    enforce_eager: bool = _option(False, "do not capture CUDA graphs or other step graphs")
    tensor_parallel_size: int = _option(
        1,
        "number of processes (ranks) that compute each layer together: every rank has a part of each weight matrix "
        "and of the key/value cache",
        group="several devices",
        short=("-tp",),
        low=1,
        high=MOST_RANKS,
    )
    pipeline_parallel_size: int = _option(
        1,
        "number of stages, each of which has some of the layers and computes another part of the requests at the same "
        "time; each stage has tensor-parallel-size ranks",
        group="several devices",
        short=("-pp",),
        low=1,
        high=MOST_RANKS,
    )
    distributed_executor_backend: str | None = _option(
        None,
        "where ranks run; mp: in processes that the engine starts, the default; external_launcher: in the processes "
        "that torchrun, mpirun or srun has started, each of which runs the same program; ray: on the nodes of a Ray "
        "cluster; uni: in this process, so there can be one rank",
        group="several devices",
        choices=("mp", "uni", "external_launcher", "ray"),
    )
    nnodes: int = _option(
        1,
        "number of hosts (nodes) among which the ranks are divided; the engine runs on node 0, the others run "
        "`vllmlite serve --headless` with the same options and their node-rank",
        group="several devices",
        low=1,
        high=MOST_RANKS,
    )
    node_rank: int = _option(
        0, "number of this node, from 0", group="several devices", low=0, high=MOST_RANKS
    )
    master_addr: str | None = _option(
        None,
        "address at which node 0 listens until all nodes have joined; default: 127.0.0.1, or the launcher's",
        group="several devices",
        metavar="ADDRESS",
    )
    master_port: int | None = _option(
        None,
        "port at which node 0 listens; default: 29501, or the launcher's",
        group="several devices",
        low=1,
        high=65535,
    )
    ranks_secret_file: str | None = _option(
        None,
        "file with the secret by which nodes recognise each other, needed unless master-addr is this host's own; "
        "default: the variable VLLMLITE_RANKS_SECRET",
        group="several devices",
        metavar="FILE",
    )
    distributed_timeout_seconds: int = _option(
        60, "time in which all nodes must have joined", group="several devices", low=1
    )
    speculative_config: Mapping[str, Any] = mapping_option(
        'speculative decoding: guess tokens and verify several in a step: {"method": "ngram", '
        '"num_speculative_tokens": 8, "prompt_lookup_min": 2, "prompt_lookup_max": 5}: guess what followed the last '
        'tokens where they occurred before; {"method": "suffix"}: guess what followed them most often; '
        '{"method": "draft_model", "model": NAME}: guess what a smaller model with '
        "the same vocabulary generates; method eagle, eagle3 or medusa: what heads predict from hidden states; "
        '{"method": "mtp"}: what the MTP layer predicts that the model\'s checkpoint holds; '
        '"draft_sample_method": "probabilistic" draws the drafts of these models and verifies by rejection sampling',
        group="speculative decoding",
    )
    enable_lora: bool = _option(False, "let requests use LoRA adapters", group="LoRA")
    max_loras: int = _option(
        1, "adapters on the device, which requests of one step can use", group="LoRA", low=1, high=4096
    )
    max_lora_rank: int = _option(16, "largest rank of an adapter", group="LoRA", low=1, high=512)
    max_cpu_loras: int | None = _option(
        None,
        "adapters in host memory, from where they are put on the device; others are read from their files again; "
        "default: max_loras",
        group="LoRA",
        low=1,
    )
    max_lora_bytes: int = _option(
        4 << 30,
        "memory on the host for adapters, and maximum size of an adapter's file; bytes, or 512M, 4G",
        group="LoRA",
        low=1,
        size=True,
    )
    lora_dtype: str = _option(
        "auto",
        "dtype of adapters; auto: the model's",
        group="LoRA",
        choices=("auto", *FLOAT_DTYPES),
        synonyms=DTYPE_SYNONYMS,
    )
    pooling_type: str = _option(
        "LAST",
        "embeddings: hidden state of the last token, or mean of all tokens",
        choices=POOLING_TYPES,
        synonyms={name.lower(): name for name in POOLING_TYPES},
    )
    pooling_normalize: bool = _option(True, "normalise embeddings to length 1")
    seed: int = _option(
        0,
        "seed of the random numbers of sampling; -1: a different seed at each start",
        low=-1,
        high=2**64 - 1,
    )
    max_logprobs: int = _option(
        MAX_LOGPROBS, "maximum log-probabilities per token that a request may ask for; -1: no limit", low=-1
    )

    def __post_init__(self) -> None:
        """Normalise paths, sizes and synonyms; check each field, then combinations of fields."""
        check_fields(self)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ParameterError(
                "gpu_memory_utilization", self.gpu_memory_utilization, "must be greater than 0 and at most 1"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ParameterError("device", self.device, "must be auto, cpu, cuda or cuda:N")
        if self.data_parallel_size > 1 and ":" in self.device:
            raise ParameterError(
                "device", self.device, "replicas take GPUs in order: must be auto, cpu or cuda"
            )
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ParameterError(
                "num_gpu_blocks_override",
                self.num_gpu_blocks_override,
                "cannot be combined with kv_cache_memory_bytes: both set the size of the key/value cache",
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ParameterError(
                "max_cpu_loras", self.max_cpu_loras, f"must be at least max_loras, which is {self.max_loras}"
            )
        self._check_drafts()
        self._check_tiers()
        self._check_ranks()
        check_nodes(
            self.num_ranks,
            self.nnodes,
            self.node_rank,
            self.distributed_executor_backend,
            self.data_parallel_size,
            self.seed,
            {name: getattr(self, name) for name in ("enable_lora", "kv_disk_path", "slot_save_path")},
        )
        marks = self.reasoning_config
        if marks and (
            marks.keys() != {*REASONING_KEYS} or not all(isinstance(m, str) and m for m in marks.values())
        ):
            raise ParameterError(
                "reasoning_config", marks, f"must have {' and '.join(REASONING_KEYS)}, and nothing else"
            )
        for name in ("tokenizer", "tokenizer_revision"):
            if self.skip_tokenizer_init and getattr(self, name) is not None:
                raise ParameterError(name, getattr(self, name), "cannot be combined with skip_tokenizer_init")
        if self.model is None and self.revision is not None:
            raise ParameterError(
                "revision", self.revision, "the built-in model has no revisions: name a model"
            )

    def _check_ranks(self) -> None:
        """Raise ParameterError for options that cannot be combined with several ranks."""
        if self.num_ranks == 1:
            return
        name = "tensor_parallel_size" if self.pipeline_parallel_size == 1 else "pipeline_parallel_size"
        if self.num_ranks > MOST_RANKS:
            raise ParameterError(
                name, getattr(self, name), f"there are at most {MOST_RANKS} ranks, not {self.num_ranks}"
            )
        if self.distributed_executor_backend == "uni":
            raise ParameterError(
                "distributed_executor_backend", "uni", "runs one rank; leave it out for several"
            )
        if self.enable_sleep_mode:
            raise ParameterError(
                name, getattr(self, name), "must be 1 with enable_sleep_mode in this version"
            )

    @property
    def num_ranks(self) -> int:
        """Number of processes that compute the model together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def reporting_rank(self) -> int:
        """The rank that sends the sampled ids to the engine: the first one of the last stage."""
        return self.num_ranks - self.tensor_parallel_size

    def _check_drafts(self) -> None:
        options = self.speculative()
        if options is not None and options.probabilistic and self.batch_invariant:
            raise ParameterError(
                f"{SPECULATIVE}.draft_sample_method",
                PROBABILISTIC,
                "cannot be combined with batch_invariant: with drafts that are drawn at random, the text of a seed "
                "depends on their number",
            )

    def _check_tiers(self) -> None:
        """Raise ParameterError for options of cache tiers that contradict each other, or that have no effect."""
        if self.kv_offloading_size is not None and self.swap_space not in (0, self.kv_offloading_size):
            raise ParameterError(
                "kv_offloading_size", self.kv_offloading_size, f"contradicts swap_space={self.swap_space}"
            )
        tiers = [
            ("swap_space", self.host_tier_bytes()),
            ("kv_disk_path", self.kv_disk_path),
            ("slot_save_path", self.slot_save_path),
        ]
        if self.slot_save_path is not None and self.data_parallel_size > 1:
            raise ParameterError("slot_save_path", self.slot_save_path, "needs data_parallel_size=1")
        if None not in (paths := (self.slot_save_path, self.kv_disk_path)):
            slots, disk = (os.path.realpath(os.path.expanduser(path)) for path in paths if path is not None)
            if slots == disk:
                raise ParameterError(
                    "slot_save_path", self.slot_save_path, "must be another directory than kv_disk_path"
                )
        for name, value in tiers:
            speculative = self.speculative()
            if value and speculative and speculative.draft and speculative.reads_states:
                raise ParameterError(
                    name,
                    value,
                    f"method {speculative.draft.method} reads hidden states, which cache tiers do not keep",
                )
            if value and not self.enable_prefix_caching:
                raise ParameterError(
                    name, value, "needs enable_prefix_caching: blocks are found by their hashes"
                )
        if self.preemption_mode == "swap" and not any(value for _, value in tiers):
            raise ParameterError("preemption_mode", "swap", "needs swap_space or kv_disk_path")

    def host_tier_bytes(self) -> int:
        """Return the bytes of the cache tier in host memory; 0 if there is none."""
        return int((self.kv_offloading_size or self.swap_space) * 2**30)

    def keeps_block_files(self) -> bool:
        """Return whether blocks of the key/value cache are kept in files."""
        return self.kv_disk_path is not None or self.slot_save_path is not None

    def speculative(self) -> Speculative | None:
        """Return the options of speculative decoding, or None if it is off."""
        return speculative(self.speculative_config, self.tensor_parallel_size, self.model is None)

    @classmethod
    def from_kwargs(cls, **options: Any) -> EngineConfig:
        """Return a configuration from keyword arguments; an unsupported option of vLLM is refused with the reason."""
        return cls(**known_options(options))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> EngineConfig:
        """Return a configuration from a YAML mapping of options; ``overrides`` take precedence over the file."""
        return cls.from_kwargs(**{**read_yaml(path), **overrides})

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> EngineConfig:
        """Return a configuration from parsed :func:`add_engine_arguments`: flags override ``--config``."""
        flags = given_options(namespace, cls)
        flags |= {name: getattr(namespace, name) for name in SHORTHANDS if hasattr(namespace, name)}
        path = getattr(namespace, "config", None)
        return cls.from_kwargs(**flags) if path is None else cls.from_yaml(path, **flags)


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``options`` that are fields. Raises ParameterError for an unknown or unsupported option."""
    names = {f.name for f in fields(EngineConfig)}
    known: dict[str, Any] = {}
    shorthands: dict[str, Any] = {}
    for name, value in options.items():
        if name in names:
            known[name] = value
        elif name in SHORTHANDS:
            shorthands[name] = value
        elif name not in ABSENT:
            raise ParameterError(
                name, value, "unknown option" + did_you_mean(name, [*names, *SHORTHANDS, *ABSENT])
            )
        else:
            ABSENT[name].check(name, value)
    if shorthands:
        known[SPECULATIVE] = with_shorthands(mapping(SPECULATIVE, known.get(SPECULATIVE)), shorthands)
    return known
