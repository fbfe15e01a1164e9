"""vLLM's options whose features are not here: each is refused by its name, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllmlite.errors import ParameterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Absent:
    """An option of vLLM's without its feature: the values that ask for nothing, and why others are refused."""

    neutral: tuple[Any, ...]
    reason: str
    keys: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """A mapping asks for nothing if each of its keys is here, with one of these values."""
    logged: tuple[Any, ...] = ()
    """Values that change no text: they are accepted, and the log has the reason why they do nothing."""

    def accepts(self, value: object) -> bool:
        """Whether ``value`` asks for nothing."""
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


_ONE_DEVICE = "an engine runs on one device in this version"
_NO_LORA = "LoRA adapters are not supported in this version: merge the adapter into the checkpoint"
_TEXT_ONLY = "only text models are supported in this version"
_ONE_RUNNER = (
    "an engine writes text and makes embeddings in any case; it neither scores, ranks nor classifies"
)
_LEVELS = (0, 1, 2, 3)
_ONE_GRAMMAR = "grammars are xgrammar's"
_NO_PLUGINS = "parsers are those that are built in"
_NO_SPECULATION = "speculative decoding is not supported in this version"
_NO_CACHE_TIERS = "the key/value cache stays on the device in this version"
_MAPPED = "weights are mapped from their files: there is nothing to choose"
_PARSER_LIMITS = "uvicorn's own limits of a request's head are kept"
_NO_GRAPH_CHOICE = "there is no compiler to configure: enforce_eager alone chooses between graphs and none"
_NO_REMOTE_CODE = "code from a checkpoint is never run: only vllmlite's own and transformers' is"
_HOST_MEMORY = "nothing is moved to host memory: preempted sequences are computed again"

ABSENT: Mapping[str, Absent] = {
    "tokenizer_mode": Absent(("auto",), "the tokenizer is the one that the model has; there is no other to choose"),
    "trust_remote_code": Absent((False,), _NO_REMOTE_CODE, logged=(True,)),
    "hf_config_path": Absent((None,), "config.json is read from the model's directory"),
    "hf_overrides": Absent((None, {}), "edit config.json in a copy of the checkpoint"),
    "hf_token": Absent((None,), "set HF_TOKEN in the environment, or run `hf auth login`"),
    "code_revision": Absent((None,), _NO_REMOTE_CODE),
    "config_format": Absent(("auto", "hf"), "only Hugging Face's config.json is read"),
    "task": Absent((None, "auto", "generate", "embed", "embedding"), _ONE_RUNNER),
    "runner": Absent(("auto", "generate", "pooling"), _ONE_RUNNER),
    "convert": Absent(("auto", "none", "embed"), _ONE_RUNNER),
    "allowed_local_media_path": Absent((None, ""), _TEXT_ONLY),
    "limit_mm_per_prompt": Absent(
        (None, {}), _TEXT_ONLY, keys=dict.fromkeys(("image", "video", "audio"), (0, {"count": 0}))
    ),
    "mm_processor_kwargs": Absent((None, {}), _TEXT_ONLY),
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
    "speculative_config": Absent((None, {}), _NO_SPECULATION),
    "spec_method": Absent((None,), _NO_SPECULATION),
    "spec_model": Absent((None,), _NO_SPECULATION),
    "spec_tokens": Absent((None, 0), _NO_SPECULATION),
    "guided_decoding_backend": Absent((None, "auto", "xgrammar"), _ONE_GRAMMAR),
    "structured_outputs_config": Absent(
        (None, {}),
        _ONE_GRAMMAR,
        keys={"backend": ("auto", "xgrammar"), "disable_fallback": (False, True), "reasoning_parser": ("",)},
    ),
    "reasoning_parser": Absent((None, ""), "the server alone takes reasoning out of the text: see serve"),
    "logits_processors": Absent((None, []), "custom logits processors are not supported: see logit_bias, bad_words"),
    "compilation_config": Absent(
        (None, {}, *_LEVELS), _NO_GRAPH_CHOICE, keys={"level": _LEVELS, "mode": _LEVELS}
    ),
    "cuda_graph_sizes": Absent((None, []), _NO_GRAPH_CHOICE),
    "cpu_offload_gb": Absent((0,), "weights stay on the device in this version"),
    "swap_space": Absent((0, 4), _HOST_MEMORY),
    "preemption_mode": Absent((None, "recompute"), _HOST_MEMORY),
    "kv_transfer_config": Absent((None,), "the key/value cache is not shared between engines in this version"),
    "calculate_kv_scales": Absent((False, True), "an int8 cache has a scale for each token and head in any case"),
    "prefix_caching_hash_algo": Absent(("builtin", "sha256"), "blocks are named by SHA-256"),
    "enable_chunked_prefill": Absent((True, None), "long prompts are always computed in chunks"),
    "max_num_partial_prefills": Absent((1,), "the token budget alone limits prompts that are being computed"),
    "long_prefill_token_threshold": Absent((0,), "the token budget alone limits prompts that are being computed"),
    "scheduler_cls": Absent((None,), "the scheduler cannot be replaced"),
    "use_v2_block_manager": Absent((True,), "there is one block manager"),
    "disable_log_stats": Absent((True, False), "statistics are counted in any case and logged in none"),
    "disable_log_requests": Absent((True,), "requests are not logged"),
    "attention_backend": Absent((None, "auto"), "each backend has its own attention: see backend"),
    "moe_backend": Absent((None, "auto"), "each backend has its own kernels: see backend"),
    "linear_backend": Absent((None, "auto"), "each backend has its own kernels: see backend"),
    "cudagraph_capture_sizes": Absent((None, []), _NO_GRAPH_CHOICE),
    "max_cudagraph_capture_size": Absent((None,), _NO_GRAPH_CHOICE),
    "max_seq_len_to_capture": Absent((None, 8192), _NO_GRAPH_CHOICE),
    "optimization_level": Absent((None, *_LEVELS), _NO_GRAPH_CHOICE),
    "performance_mode": Absent((None, "balanced"), "see max_num_batched_tokens and max_num_seqs"),
    "prefill_context_parallel_size": Absent((1,), _ONE_DEVICE),
    "decode_context_parallel_size": Absent((1,), _ONE_DEVICE),
    "nnodes": Absent((1,), _ONE_DEVICE),
    "node_rank": Absent((0,), _ONE_DEVICE),
    "headless": Absent((False,), _ONE_DEVICE),
    "enable_eplb": Absent((False,), _ONE_DEVICE),
    "enable_dbo": Absent((False,), _ONE_DEVICE),
    "worker_extension_cls": Absent((None, ""), "workers cannot be replaced"),
    "max_cpu_loras": Absent((None,), _NO_LORA),
    "fully_sharded_loras": Absent((False,), _NO_LORA),
    "quantization_config": Absent((None, {}), "see quantization"),
    "kv_cache_dtype_skip_layers": Absent((None, []), "the key/value cache has one type: see kv_cache_dtype"),
    "kv_offloading_size": Absent((None,), _NO_CACHE_TIERS),
    "kv_events_config": Absent((None, {}), "the key/value cache sends no events"),
    "disable_hybrid_kv_cache_manager": Absent((None, False, True), "each model's cache has one layout"),
    "disable_cascade_attn": Absent((None, False, True), "there is no cascade attention"),
    "enable_sleep_mode": Absent((False,), "an engine keeps its memory until it ends"),
    "enable_prompt_embeds": Absent((False,), "prompts are text or token ids"),
    "model_loader_extra_config": Absent((None, {}), _MAPPED),
    "safetensors_load_strategy": Absent((None, "lazy"), _MAPPED),
    "max_parallel_loading_workers": Absent((None,), _MAPPED),
    "use_tqdm_on_load": Absent((True, False), "a terminal sees progress, and nothing else does"),
    "language_model_only": Absent((False, True), _TEXT_ONLY),
    "enable_mm_embeds": Absent((False,), _TEXT_ONLY),
    "mm_processor_cache_gb": Absent((None, 0, 4), _TEXT_ONLY),
    "disable_mm_preprocessor_cache": Absent((False, True), _TEXT_ONLY),
    "media_io_kwargs": Absent((None, {}), _TEXT_ONLY),
    "allowed_media_domains": Absent((None, []), _TEXT_ONLY),
    "logprobs_mode": Absent(("raw_logprobs",), "log-probabilities are those before sampling"),
    "stream_interval": Absent((1,), "a stream brings each token as it comes"),
    "max_num_queued_reqs": Absent((None,), "see max_queue, which counts what waits beyond max_num_seqs"),
    "max_num_queued_tokens": Absent((None,), "see max_queue"),
    "api_server_count": Absent((None, 1), "one process serves HTTP"),
    "disable_frontend_multiprocessing": Absent((False,), "see --no-engine-process"),
    "enable_reasoning": Absent((False, True), "reasoning_parser alone says it"),
    "reasoning_parser_plugin": Absent((None, ""), _NO_PLUGINS),
    "tool_parser_plugin": Absent((None, ""), _NO_PLUGINS),
    "tool_server": Absent((None, ""), "tools are run by clients"),
    "enable_server_load_tracking": Absent((False, True), "/load counts in any case"),
    "enable_prompt_tokens_details": Absent((False, True), "usage has its details in any case"),
    "enable_per_request_metrics": Absent((False,), "see /metrics", logged=(True,)),
    "enable_tokenizer_info_endpoint": Absent(
        (False,), "see /props, which has the chat template", logged=(True,)
    ),
    "enable_log_outputs": Absent((False,), "answers are not logged"),
    "enable_log_deltas": Absent((False, True), "answers are not logged"),
    "enable_offline_docs": Absent((False,), "see /openapi.json"),
    "enable_ssl_refresh": Absent((False,), "restart the server for another certificate"),
    "log_error_stack": Absent((False, True), "the log has the trace of every error that is not the client's"),
    "h11_max_header_count": Absent((None, 256), _PARSER_LIMITS),
    "h11_max_incomplete_event_size": Absent((None, 4194304), _PARSER_LIMITS),
    "otlp_traces_endpoint": Absent((None,), "there is no tracing: see --profile-dir"),
    "collect_detailed_traces": Absent((None,), "there is no tracing: see --profile-dir"),
    "show_hidden_metrics_for_version": Absent((None,), "no metric is hidden"),
    "kv_cache_metrics": Absent((False,), "see /metrics"),
    "fail_on_environ_validation": Absent((False, True), "no variable of the environment configures an engine"),
}  # fmt: skip
"""vLLM's options that are fields of neither :class:`EngineConfig` nor the server's configuration."""
