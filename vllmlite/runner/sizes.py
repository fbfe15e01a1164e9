"""Sizes of a runner that follow from the configuration and the memory: tokens in a step, blocks in the cache."""

from __future__ import annotations

from collections.abc import Sequence

from vllmlite.backends.base import Backend
from vllmlite.backends.kv_cache import KVSpec
from vllmlite.config.engine_config import EngineConfig
from vllmlite.engine.drafts import MOST_DRAFTS
from vllmlite.errors import BackendError, ParameterError
from vllmlite.models import kv_spec
from vllmlite.models.interface import Model
from vllmlite.models.plan import Plan
from vllmlite.runner.runner import ModelRunner

CPU_KV_BYTES = 4 << 30
"""Maximum bytes of the key/value cache on a CPU, over all ranks, unless its size is given. Pages that no request
reaches are never touched."""
STAGING_BYTES, STAGED_BLOCKS = 256 << 20, 32
"""Minimum host memory between the key/value cache and a disk, in bytes and in blocks."""
CPU_BATCHED_TOKENS, GPU_BATCHED_TOKENS = 2048, 8192
"""Default maximum numbers of tokens in a step: enough to keep the device busy."""


def batched_tokens(config: EngineConfig, device: str) -> int:
    """Return the maximum number of tokens in a step on ``device``."""
    default = CPU_BATCHED_TOKENS if device == "cpu" else GPU_BATCHED_TOKENS
    return config.max_num_batched_tokens or default


def mixed_tokens(config: EngineConfig, batched: int) -> int:
    """Return the maximum number of prompt tokens in a step that also decodes, where a step has at most ``batched``
    tokens."""
    mixed = config.max_mixed_prefill_tokens
    if mixed is not None and mixed > batched:
        raise ParameterError(
            "max_mixed_prefill_tokens", mixed, f"must be at most the {batched} of a whole step"
        )
    return mixed or batched


def most_positions(config: EngineConfig, backend: Backend, plan: Plan, longest: int) -> int:
    """Return the number of tokens of a sequence that the key/value cache could hold if the weights took no memory, at
    most ``longest``. Rotary tables have this length."""
    if plan.spec is None:  # transformers' models compute them as they go
        return longest
    cache = kv_spec(plan.spec, backend, config.block_size, config.kv_cache_dtype)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    else:
        memory = backend.memory()
        most = CPU_KV_BYTES // backend.comm.sharing if backend.device == "cpu" else memory.total
        available = config.kv_cache_memory_bytes or min(
            most, int(memory.total * config.gpu_memory_utilization)
        )
        num_blocks = available // backend.kv_bytes_per_block(cache)
    return min(longest, max(num_blocks, 1) * config.block_size)


def num_cache_blocks(
    config: EngineConfig,
    backend: Backend,
    models: Sequence[Model],
    caches: Sequence[KVSpec],
    max_model_len: int,
    reserved: int = 0,
) -> int:
    """Return the number of blocks in each of the key/value ``caches``, after the weights have been loaded. ``models``
    are the model and, if there is one, the draft model. ``reserved`` bytes are left free for later."""
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    block_bytes = sum(map(backend.kv_bytes_per_block, caches))
    if config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
        if not num_blocks:
            raise ParameterError(
                "kv_cache_memory_bytes",
                config.kv_cache_memory_bytes,
                f"must be at least {block_bytes}, one block",
            )
        return num_blocks
    if backend.device == "cpu":
        memory = backend.memory()
        available = min(
            CPU_KV_BYTES // backend.comm.sharing,
            int(memory.free * config.gpu_memory_utilization / config.data_parallel_size) - reserved,
        )
    else:
        for model in models:
            _largest_step(config, backend, model, max_model_len)
        memory = backend.memory()
        sampled = config.max_num_seqs + (0 if config.speculative() is None else MOST_DRAFTS)
        logits = 4 * sampled * max(model.vocab_size for model in models) * 4
        used = memory.total - memory.free + logits + reserved
        available = int(memory.total * config.gpu_memory_utilization) - used
    most_used = -(-max_model_len // config.block_size) * config.max_num_seqs
    num_blocks = min(available // block_bytes, most_used)
    if num_blocks < 1:
        raise BackendError(
            f"no memory is left for the key/value cache: a block of {config.block_size} tokens takes {block_bytes} "
            f"bytes, and {memory.free} of {memory.total} are free: raise gpu_memory_utilization, or choose a smaller "
            "model, dtype or quantization"
        )
    return num_blocks


def num_host_places(config: EngineConfig, backend: Backend, model: Model) -> int:
    """Return the number of blocks to keep in this rank's share of host memory. With files alone, that is a small buffer
    for blocks on their way to and from them."""
    block_bytes, ranks = backend.kv_bytes_per_block(model.kv_spec), backend.comm.sharing
    wanted = config.host_tier_bytes() // ranks
    if config.keeps_block_files():
        wanted = max(wanted, STAGING_BYTES // ranks, STAGED_BLOCKS * block_bytes)
    places = wanted // block_bytes
    if config.host_tier_bytes() and not places:
        raise ParameterError(
            "swap_space", config.swap_space, f"must be enough for a block of {block_bytes * ranks} bytes"
        )
    return places


def _largest_step(config: EngineConfig, backend: Backend, model: Model, max_model_len: int) -> None:
    """Run a step of the largest size, so that its memory is allocated before the cache is sized."""
    runner = ModelRunner(
        backend,
        model,
        num_blocks=1,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        enforce_eager=True,
    )
    runner.profile(min(batched_tokens(config, backend.device), config.max_num_seqs * max_model_len))
