"""vLLM's engine options whose features are not here: each is refused by its name, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Absent:
    """An option of vLLM's without its feature: the values that ask for nothing, and why others are refused."""

    neutral: tuple[Any, ...]
    reason: str

    def accepts(self, value: object) -> bool:
        """Whether ``value`` asks for nothing."""
        return value in self.neutral


_ONE_DEVICE = "an engine runs on one device in this version"
_NO_LORA = "LoRA adapters are not supported in this version: merge the adapter into the checkpoint"
_TEXT_ONLY = "only text models are supported in this version"
_NO_GUIDED = "structured output is not supported in this version"
_NO_GRAPH_CHOICE = "there is no compiler to configure: enforce_eager alone chooses between graphs and none"
_NO_REMOTE_CODE = "code from a checkpoint is never run: only the model families built in are supported"
_HOST_MEMORY = "nothing is moved to host memory: preempted sequences are computed again"

ABSENT: Mapping[str, Absent] = {
    "tokenizer_mode": Absent(("auto",), "the tokenizer is the one that the model has; there is no other to choose"),
    "trust_remote_code": Absent((False,), _NO_REMOTE_CODE),
    "hf_config_path": Absent((None,), "config.json is read from the model's directory"),
    "hf_overrides": Absent((None, {}), "edit config.json in a copy of the checkpoint"),
    "hf_token": Absent((None,), "set HF_TOKEN in the environment, or run `hf auth login`"),
    "code_revision": Absent((None,), _NO_REMOTE_CODE),
    "config_format": Absent(("auto", "hf"), "only Hugging Face's config.json is read"),
    "task": Absent((None, "auto", "generate"), "only text generation is supported in this version"),
    "runner": Absent(("auto", "generate"), "only text generation is supported in this version"),
    "convert": Absent(("auto", "none"), "only text generation is supported in this version"),
    "allowed_local_media_path": Absent((None, ""), _TEXT_ONLY),
    "limit_mm_per_prompt": Absent((None, {}), _TEXT_ONLY),
    "mm_processor_kwargs": Absent((None, {}), _TEXT_ONLY),
    "override_generation_config": Absent((None, {}), "give these values as sampling parameters"),
    "rope_scaling": Absent((None, {}), "edit rope_scaling in config.json of a copy of the checkpoint"),
    "rope_theta": Absent((None,), "edit rope_theta in config.json of a copy of the checkpoint"),
    "disable_sliding_window": Absent((False,), "a model's sliding window is part of what it computes"),
    "tensor_parallel_size": Absent((1,), _ONE_DEVICE),
    "pipeline_parallel_size": Absent((1,), _ONE_DEVICE),
    "data_parallel_size": Absent((1,), _ONE_DEVICE),
    "enable_expert_parallel": Absent((False,), _ONE_DEVICE),
    "distributed_executor_backend": Absent((None, "uni"), _ONE_DEVICE),
    "disable_custom_all_reduce": Absent((False, True), _ONE_DEVICE),
    "worker_cls": Absent(("auto",), "workers cannot be replaced"),
    "enable_lora": Absent((False, None), _NO_LORA),
    "max_loras": Absent((1,), _NO_LORA),
    "max_lora_rank": Absent((16,), _NO_LORA),
    "lora_modules": Absent((None,), _NO_LORA),
    "speculative_config": Absent((None, {}), "speculative decoding is not supported in this version"),
    "guided_decoding_backend": Absent((None, "auto"), _NO_GUIDED),
    "structured_outputs_config": Absent((None, {}), _NO_GUIDED),
    "reasoning_parser": Absent((None, ""), "the server alone takes reasoning out of the text: see serve"),
    "logits_processors": Absent((None, []), "custom logits processors are not supported: see logit_bias, bad_words"),
    "compilation_config": Absent((None, {}, 0), _NO_GRAPH_CHOICE),
    "cuda_graph_sizes": Absent((None, []), _NO_GRAPH_CHOICE),
    "cpu_offload_gb": Absent((0,), "weights stay on the device in this version"),
    "swap_space": Absent((0, 4), _HOST_MEMORY),
    "preemption_mode": Absent((None, "recompute"), _HOST_MEMORY),
    "kv_transfer_config": Absent((None,), "the key/value cache is not shared between engines in this version"),
    "calculate_kv_scales": Absent((False,), "the key/value cache has no scales in this version"),
    "prefix_caching_hash_algo": Absent(("builtin", "sha256"), "a hit compares the tokens themselves: any hash is safe"),
    "enable_chunked_prefill": Absent((True, None), "long prompts are always computed in chunks"),
    "max_num_partial_prefills": Absent((1,), "the token budget alone limits prompts that are being computed"),
    "long_prefill_token_threshold": Absent((0,), "the token budget alone limits prompts that are being computed"),
    "scheduler_cls": Absent((None,), "the scheduler cannot be replaced"),
    "use_v2_block_manager": Absent((True,), "there is one block manager"),
    "disable_log_stats": Absent((True, False), "statistics are counted in any case and logged in none"),
    "disable_log_requests": Absent((True,), "requests are not logged"),
}  # fmt: skip
"""vLLM's engine options that are not fields of :class:`EngineConfig`."""
