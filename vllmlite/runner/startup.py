"""From a configuration to a running engine: find the model, choose the backend, load, size the cache."""

from __future__ import annotations

import logging
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from vllmlite.backends.base import Backend, Model
from vllmlite.config.engine_config import QUANTIZATIONS, REASONING_KEYS, EngineConfig
from vllmlite.engine.engine import Engine
from vllmlite.engine.scheduler import Limits
from vllmlite.engine.thinking import ReasoningMarks
from vllmlite.errors import BackendError, ModelError, ParameterError
from vllmlite.hub import find_model
from vllmlite.runner.runner import ModelRunner
from vllmlite.sampling_params import SamplingParams
from vllmlite.terminal import is_terminal, note
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.json_object import read_object

if TYPE_CHECKING:
    from vllmlite.models.plan import Plan

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 4 << 30
"""Most that the KV pool takes on a CPU unless its size is given; pages that no request reaches are never touched."""
CPU_BATCHED_TOKENS, GPU_BATCHED_TOKENS = 2048, 8192
"""Most tokens in a step unless the number is given: enough to fill the device."""


EngineT = TypeVar("EngineT", covariant=True)
OtherT = TypeVar("OtherT")


@dataclass(frozen=True, slots=True)
class Started(Generic[EngineT]):
    """A running engine, and the facts about its model that requests in text need."""

    engine: EngineT
    tokenizer: Tokenizer | None
    hidden_size: int
    """Elements of an embedding."""
    default_sampling_params: SamplingParams
    backend_choice: str
    """Which backend runs, and why the others do not."""

    def with_engine(self, engine: OtherT, tokenizer: Tokenizer | None) -> Started[OtherT]:
        """Return the same facts with another engine and tokenizer."""
        return replace(cast(Started[Any], self), engine=engine, tokenizer=tokenizer)


def start(config: EngineConfig) -> Started[Engine]:
    """Start an engine. Raises ModelError, BackendError or ParameterError, each saying what to change."""
    from vllmlite.backends.select import Wanted, select_backend
    from vllmlite.models import load_planned, plan_model
    from vllmlite.models.gguf import has_blocks, treatment
    from vllmlite.models.hf_config import HfConfig
    from vllmlite.models.tensors import stored_schemes
    from vllmlite.weights.packing import Packing

    path = find_model(config.model, revision=config.revision, download_dir=config.download_dir)
    plan = plan_model(path, config.model_impl)
    if config.max_model_len is not None and config.max_model_len > plan.max_position_embeddings:
        raise ParameterError(
            "max_model_len",
            config.max_model_len,
            f"must be at most the model's {plan.max_position_embeddings}",
        )
    if config.quantization not in (None, plan.quantization):
        if plan.quantization is not None:
            raise ParameterError(
                "quantization", config.quantization, f"the checkpoint is in {plan.quantization} already"
            )
        if config.quantization not in QUANTIZATIONS:
            raise ParameterError(
                "quantization",
                config.quantization,
                f"the checkpoint's weights are floats; {' or '.join(QUANTIZATIONS)} quantises them at load",
            )
    at_load = config.quantization if plan.quantization is None else None
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, path)
    generation = _generation_config(config, path)
    keep_blocks = config.dtype == "auto"
    wanted = Wanted(
        backend=config.backend,
        device=config.device,
        dtype=config.dtype,
        checkpoint_dtype=plan.dtype,
        threads=config.threads,
        cpu_isa=config.cpu_isa,
        quantization=at_load,
        packed=at_load is not None
        or plan.quantization in QUANTIZATIONS
        or (keep_blocks and path.is_file() and has_blocks(path)),
        model=plan.architecture,
        only=plan.backends,
        batch_invariant=config.batch_invariant,
    )
    backend, choice = select_backend(wanted)
    packing = Packing(backend, at_load, keep_blocks)
    if path.is_file():
        done = treatment(path, packing)
        choice += f"; {done}"
        if is_terminal(sys.stderr):
            note(f"vllmlite: {done}")
    elif plan.spec is not None and (plan.quantization or at_load):
        for scheme in dict.fromkeys(stored_schemes(plan.spec).values()) or [None]:
            stored = plan.dtype if scheme is None else scheme.name
            choice += f"; {stored} weights {packing.treatment(scheme)}"
    seed = secrets.randbits(64) if config.seed == -1 else config.seed
    longest = config.max_model_len or plan.max_position_embeddings
    num_positions = _most_positions(config, backend, plan, longest)
    model = load_planned(
        plan,
        backend,
        path,
        max_model_len=longest,
        num_positions=num_positions,
        block_size=config.block_size,
        kv_cache_dtype=config.kv_cache_dtype,
        load_format=config.load_format,
        seed=seed,
        packing=packing,
    )
    num_blocks = _num_blocks(config, backend, model, num_positions)
    capacity = min(num_blocks * config.block_size, num_positions)
    if longest > capacity:
        if config.max_model_len is not None:
            block_bytes = backend.kv_bytes_per_block(model.kv_spec)
            raise ParameterError(
                "max_model_len",
                longest,
                f"takes {-(-longest // config.block_size) * block_bytes} bytes of key/value cache; the "
                f"{num_blocks * block_bytes} there are hold {capacity} tokens: lower it to that, or give more",
            )
        logger.warning(
            "max_model_len is %d, what the key/value cache holds, not the model's %d", capacity, longest
        )
        longest = capacity
    runner = ModelRunner(
        backend,
        model,
        num_blocks=num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=longest,
        enforce_eager=config.enforce_eager,
    )
    _capture_graphs(runner)
    two_steps = backend.asynchronous if config.async_scheduling is None else config.async_scheduling
    batched = _batched_tokens(config, backend)
    engine = Engine(
        Limits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=batched,
            max_mixed_prefill_tokens=_mixed_tokens(config, batched),
            max_model_len=longest,
            block_size=config.block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        runner,
        vocab_size=model.vocab_size,
        eos_ids=_eos_ids(generation, HfConfig.read(path).text_value("eos_token_id"), path, tokenizer),
        steps_in_flight=2 if two_steps else 1,
        seed=seed,
        reasoning=_reasoning_marks(config.reasoning_config, tokenizer),
        max_logprobs=config.max_logprobs,
    )
    stats = engine.stats
    stats.backend, stats.device, stats.dtype = backend.name, backend.device, backend.dtype
    stats.lent_ops = list(backend.lent_ops)
    return Started(
        engine, tokenizer, plan.hidden_size, _default_params(config, generation), f"{plan}; {choice}"
    )


def load_tokenizer(config: EngineConfig, path: Path) -> Tokenizer:
    """Load the tokenizer that ``config`` names, by default that of the model at ``path``."""
    if config.tokenizer is None:
        return Tokenizer(path)
    return Tokenizer(
        find_model(
            config.tokenizer,
            revision=config.tokenizer_revision,
            download_dir=config.download_dir,
            weights=False,
        )
    )


def _batched_tokens(config: EngineConfig, backend: Backend) -> int:
    default = CPU_BATCHED_TOKENS if backend.device == "cpu" else GPU_BATCHED_TOKENS
    return config.max_num_batched_tokens or default


def _mixed_tokens(config: EngineConfig, batched: int) -> int:
    mixed = config.max_mixed_prefill_tokens
    if mixed is not None and mixed > batched:
        raise ParameterError(
            "max_mixed_prefill_tokens", mixed, f"must be at most the {batched} of a whole step"
        )
    return mixed or batched


def _most_positions(config: EngineConfig, backend: Backend, plan: Plan, longest: int) -> int:
    """Tokens of the longest sequence that the key/value cache can hold, before the weights take their memory: no
    rotations are made for more positions."""
    from vllmlite.models import kv_spec

    if plan.spec is None:  # transformers' models compute them as they go
        return longest
    cache = kv_spec(plan.spec, backend, config.block_size, config.kv_cache_dtype)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    else:
        memory = backend.memory()
        most = CPU_KV_BYTES if backend.device == "cpu" else memory.total
        room = config.kv_cache_memory_bytes or min(most, int(memory.total * config.gpu_memory_utilization))
        num_blocks = room // backend.kv_bytes_per_block(cache)
    return min(longest, max(num_blocks, 1) * config.block_size)


def _num_blocks(config: EngineConfig, backend: Backend, model: Model, max_model_len: int) -> int:
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    block_bytes = backend.kv_bytes_per_block(model.kv_spec)
    if config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
        if not num_blocks:
            raise ParameterError(
                "kv_cache_memory_bytes", config.kv_cache_memory_bytes, f"a block takes {block_bytes}"
            )
        return num_blocks
    if backend.device == "cpu":
        memory = backend.memory()
        room = min(CPU_KV_BYTES, int(memory.free * config.gpu_memory_utilization))
    else:
        _largest_step(config, backend, model, max_model_len)
        memory = backend.memory()
        logits = 4 * config.max_num_seqs * model.vocab_size * 4
        room = int(memory.total * config.gpu_memory_utilization) - (memory.total - memory.free) - logits
    most_used = -(-max_model_len // config.block_size) * config.max_num_seqs
    num_blocks = min(room // block_bytes, most_used)
    if num_blocks < 1:
        raise BackendError(
            f"no memory is left for the key/value cache: a block of {config.block_size} tokens takes {block_bytes} "
            f"bytes, and {memory.free} of {memory.total} are free: raise gpu_memory_utilization, or choose a smaller "
            "model, dtype or quantization"
        )
    return num_blocks


def _largest_step(config: EngineConfig, backend: Backend, model: Model, max_model_len: int) -> None:
    """Run a step as large as any will be, so that what it takes is taken before the cache is sized."""
    runner = ModelRunner(
        backend,
        model,
        num_blocks=1,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        enforce_eager=True,
    )
    runner.profile(min(_batched_tokens(config, backend), config.max_num_seqs * max_model_len))


def _capture_graphs(runner: ModelRunner) -> None:
    """Capture the decoding steps, with a line of progress on a terminal where it takes a while."""
    began, captured, shown = time.perf_counter(), 0, False
    for rows in runner.capture_graphs():
        captured += 1
        if is_terminal(sys.stderr) and time.perf_counter() - began > 0.1:
            note(f"\rcapturing decoding steps: {rows} rows \x1b[K", end="")
            shown = True
    if shown:
        note("\r\x1b[K", end="")
    logger.info("decoding steps of %d sizes captured in %.1f s", captured, time.perf_counter() - began)


def _generation_config(config: EngineConfig, path: Path) -> dict[str, Any]:
    """The checkpoint's ``generation_config.json``, or the one that the configuration names; may be empty."""
    if config.generation_config not in ("auto", "vllm"):
        return read_object(Path(config.generation_config) / "generation_config.json")
    return read_object(path / "generation_config.json", optional=True)


def _eos_ids(
    generation: dict[str, Any], configured: Any, path: Path, tokenizer: Tokenizer | None
) -> Sequence[int]:
    """Every id that ends a text: the generation config's (or else what the model's has) and the tokenizer's."""
    listed = generation.get("eos_token_id")
    if listed is None:
        listed = configured
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"{path}: eos_token_id={listed!r} must be a token id or a list of them")
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


def _default_params(config: EngineConfig, generation: dict[str, Any]) -> SamplingParams:
    """What a request gets that names no sampling parameters."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    override = config.override_generation_config
    for name in override.keys() - {*names, "do_sample", "max_new_tokens"}:
        raise ParameterError(
            "override_generation_config", name, f"may hold {', '.join(names)}, do_sample and max_new_tokens"
        )
    if override.get("do_sample") is False and override.get("temperature"):
        raise ParameterError(
            "override_generation_config.temperature", override["temperature"], "contradicts do_sample: false"
        )
    generation = {} if config.generation_config == "vllm" else generation
    if generation.get("do_sample") is False and override.get("do_sample") is None:
        generation = {**generation, "temperature": 0.0}
    generation = {**generation, **override}
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    if override.get("do_sample") is False:
        given["temperature"] = 0.0
    if generation.get("max_new_tokens") is not None:
        given["max_tokens"] = generation["max_new_tokens"]
    try:
        return SamplingParams(**given)
    except ParameterError as error:
        if error.field in override:
            raise ParameterError(
                f"override_generation_config.{error.field}", error.value, error.accepted
            ) from None
        raise ModelError(f"generation_config.json: {error}") from None


def _reasoning_marks(config: Mapping[str, Any], tokenizer: Tokenizer | None) -> ReasoningMarks | None:
    """Return the ids of the marks that ``reasoning_config`` names. Raises :class:`ParameterError`."""
    if not config:
        return None
    if tokenizer is None:
        raise ParameterError(
            "reasoning_config", dict(config), "needs a tokenizer: leave skip_tokenizer_init out"
        )
    opening, closing = (tuple(tokenizer.encode(config[name], False)) for name in REASONING_KEYS)
    if not opening or not closing:
        raise ParameterError("reasoning_config", dict(config), "must name marks that the tokenizer can write")
    return ReasoningMarks(opening, closing)
