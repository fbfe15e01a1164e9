"""Options of vLLM whose features do not exist here. Each is refused by its name, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllmlite.errors import ParameterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Absent:
    """An option of vLLM that is not supported: the values that leave its feature off, and the reason why others are
    refused."""

    neutral: tuple[Any, ...]
    reason: str
    keys: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that a mapping given as value may have, with the values of each that have no effect."""
    logged: tuple[Any, ...] = ()
    """Values that are accepted although the feature is missing, because they change no text. The log gives the
    reason."""

    def accepts(self, value: object) -> bool:
        """Return whether ``value`` leaves the feature off."""
        if value in self.neutral:
            return True
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(entry in self.keys.get(key, ()) for key, entry in value.items())
        )

    def check(self, name: str, value: object) -> None:
        """Raise :class:`ParameterError` unless the option ``name`` may have ``value``."""
        if value in self.logged:
            logger.warning("%s=%s has no effect: %s", name, value, self.reason)
        elif not self.accepts(value):
            raise ParameterError(name, value, self.reason)


_NOTHING: tuple[Any, ...] = (None, "", {}, [])
_LEVELS = (0, 1, 2, 3)
_EITHER = (False, True)

_REASONS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ranks divide heads, MLPs and layers only: see tensor_parallel_size and pipeline_parallel_size": {
        "prefill_context_parallel_size": (1,), "decode_context_parallel_size": (1,),
        "enable_expert_parallel": (False,), "enable_eplb": (False,), "enable_dbo": (False,),
        "disable_custom_all_reduce": _EITHER,
    },
    "adapters are not sharded, and change the language model only: see enable_lora": {
        "fully_sharded_loras": (False,), "default_mm_loras": _NOTHING, "enable_tower_connector_lora": (False,),
        "lora_extra_vocab_size": (0, 256), "long_lora_scaling_factors": (None,), "enable_lora_bias": (False,),
        "specialize_active_lora": _EITHER, "lora_target_modules": (None,),
    },
    "drafts are verified by sampling, which never changes the text: see speculative_config": {
        "speculative_draft_tensor_parallel_size": (None, 1), "speculative_disable_mqa_scorer": _EITHER,
        "spec_decoding_acceptance_method": (None, "rejection_sampler"),
        "typical_acceptance_sampler_posterior_threshold": (None,),
        "typical_acceptance_sampler_posterior_alpha": (None,),
        "disable_logprobs_during_spec_decoding": (None, False),
    },
    "only models of text run, and prompts are text or token ids: leave the option out": {
        "allowed_local_media_path": _NOTHING, "allowed_media_domains": _NOTHING, "limit_mm_per_prompt": _NOTHING,
        "mm_processor_kwargs": _NOTHING, "media_io_kwargs": _NOTHING, "mm_processor_cache_gb": (None, 0, 4),
        "language_model_only": _EITHER, "disable_mm_preprocessor_cache": _EITHER, "enable_mm_embeds": (False,),
        "enable_prompt_embeds": (False,),
    },
    "every engine generates text and computes embeddings, and does not score, rank or classify": {
        "task": (None, "auto", "generate", "embed", "embedding"), "runner": ("auto", "generate", "pooling"),
        "convert": ("auto", "none", "embed"),
    },
    "code from a checkpoint is never run: only vllmlite's own and transformers' is": {
        "trust_remote_code": (False,), "code_revision": (None,),
    },
    "the model is computed as its checkpoint says: edit config.json in a copy of the checkpoint": {
        "hf_overrides": _NOTHING, "hf_config_path": (None,), "config_format": ("auto", "hf"),
        "rope_scaling": _NOTHING, "rope_theta": (None,), "disable_sliding_window": (False,),
        "quantization_config": _NOTHING,
    },
    "weights are mapped from their files, with progress on a terminal: there is nothing to choose": {
        "model_loader_extra_config": _NOTHING, "safetensors_load_strategy": (None, "lazy"),
        "max_parallel_loading_workers": (None,), "use_tqdm_on_load": _EITHER,
    },
    "the token is read from the environment: set HF_TOKEN, or run `hf auth login`": {"hf_token": (None,)},
    "weights stay on the device, and blocks of the key/value cache move as swap_space and kv_disk_path say: see also "
    "gpu_memory_utilization and kv_cache_dtype": {
        "cpu_offload_gb": (0,), "kv_offloading_backend": (None, "native"), "kv_transfer_config": (None,),
        "kv_events_config": _NOTHING,
        "kv_cache_dtype_skip_layers": _NOTHING, "calculate_kv_scales": _EITHER,
        "disable_hybrid_kv_cache_manager": (None, *_EITHER), "disable_cascade_attn": (None, *_EITHER),
        "prefix_caching_hash_algo": ("builtin", "sha256"), "use_v2_block_manager": (True,),
    },
    "prompts are computed in chunks of one token budget: see max_num_batched_tokens, max_num_seqs and max_queue": {
        "enable_chunked_prefill": (True, None), "max_num_partial_prefills": (1,), "long_prefill_token_threshold": (0,),
        "performance_mode": (None, "balanced"), "max_num_queued_reqs": (None,), "max_num_queued_tokens": (None,),
    },
    "there is no compiler to configure: enforce_eager alone chooses between graphs and none": {
        "compilation_config": (None, {}, *_LEVELS), "optimization_level": (None, *_LEVELS),
        "cuda_graph_sizes": _NOTHING, "cudagraph_capture_sizes": _NOTHING, "max_cudagraph_capture_size": (None,),
        "max_seq_len_to_capture": (None, 8192),
    },
    "each backend has kernels of its own: see backend": {
        "attention_backend": (None, "auto"), "moe_backend": (None, "auto"), "linear_backend": (None, "auto"),
    },
    "this part is built in and cannot be replaced: see tokenizer, logit_bias, bad_words, structured_outputs, and "
    "tool_call_parser and reasoning_parser of the server": {
        "tokenizer_mode": ("auto",), "worker_cls": ("auto",), "worker_extension_cls": _NOTHING,
        "scheduler_cls": (None,), "logits_processors": _NOTHING, "guided_decoding_backend": (None, "auto", "xgrammar"),
        "structured_outputs_config": _NOTHING, "reasoning_parser": _NOTHING, "reasoning_parser_plugin": _NOTHING,
        "tool_parser_plugin": _NOTHING, "tool_server": _NOTHING, "logprobs_mode": ("raw_logprobs",),
    },
    "the server works in one way here, in one process for HTTP and one for the engine: see --no-engine-process, /props "
    "and /openapi.json, and restart it for another certificate": {
        "api_server_count": (None, 1), "disable_frontend_multiprocessing": (False,), "stream_interval": (1,),
        "enable_reasoning": _EITHER, "enable_prompt_tokens_details": _EITHER, "enable_offline_docs": (False,),
        "enable_tokenizer_info_endpoint": (False,), "enable_ssl_refresh": (False,),
        "h11_max_header_count": (None, 256), "h11_max_incomplete_event_size": (None, 4194304),
        "fail_on_environ_validation": _EITHER,
    },
    "requests and answers are not logged, and statistics are always counted: see /metrics, /load and --profile-dir": {
        "disable_log_stats": _EITHER, "disable_log_requests": (True,), "enable_log_outputs": (False,),
        "enable_log_deltas": _EITHER, "log_error_stack": _EITHER, "enable_server_load_tracking": _EITHER,
        "enable_per_request_metrics": (False,), "kv_cache_metrics": (False,), "otlp_traces_endpoint": (None,),
        "collect_detailed_traces": (None,), "show_hidden_metrics_for_version": (None,),
    },
}  # fmt: skip
"""Reason → the options that it refuses, each with the values that leave its feature off."""
_KEYS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "limit_mm_per_prompt": dict.fromkeys(("image", "video", "audio"), (0, {"count": 0})),
    "structured_outputs_config": {
        "backend": ("auto", "xgrammar"), "disable_fallback": _EITHER, "reasoning_parser": ("",)
    },
    "compilation_config": {"level": _LEVELS, "mode": _LEVELS},
}  # fmt: skip
_LOGGED = ("trust_remote_code", "enable_per_request_metrics", "enable_tokenizer_info_endpoint")
"""Options that change no text: True is accepted and logged."""

ABSENT: Mapping[str, Absent] = {
    name: Absent(neutral, reason, _KEYS.get(name, {}), (True,) if name in _LOGGED else ())
    for reason, options in _REASONS.items()
    for name, neutral in options.items()
}
"""vLLM's options that are fields of neither :class:`EngineConfig` nor the server's configuration."""
