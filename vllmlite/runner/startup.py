"""Starting an engine: from a configuration to a running engine with its tokenizer."""

from __future__ import annotations

import logging
import secrets
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from vllmlite.backends.base import Backend
from vllmlite.config.engine_config import EngineConfig
from vllmlite.disk_tier.place_memory import PlaceMemory
from vllmlite.engine.adapters import AdapterSource
from vllmlite.engine.drafts import DraftPolicy, StepCost
from vllmlite.engine.engine import Engine
from vllmlite.engine.scheduler import Limits
from vllmlite.errors import ParameterError
from vllmlite.hub import find_model
from vllmlite.models import open_stored
from vllmlite.models.plan import Plan
from vllmlite.runner.build import BuiltRunner, build_runner, plan_for
from vllmlite.runner.cache_tiers import cache_tiers, saved_prefixes
from vllmlite.runner.generation_config import default_params, eos_ids, generation_config, reasoning_marks
from vllmlite.runner.propose.loading import check_vocabulary
from vllmlite.runner.runner import ModelRunner
from vllmlite.runner.sizes import batched_tokens, mixed_tokens
from vllmlite.runner.sleep import sleep_mode
from vllmlite.sampling_params import SamplingParams
from vllmlite.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vllmlite.ranks.group import RankGroup
    from vllmlite.ranks.messages import BackendFacts
    from vllmlite.ranks.runner import ParallelRunner

logger = logging.getLogger(__name__)

EngineT = TypeVar("EngineT", covariant=True)
OtherT = TypeVar("OtherT")


@dataclass(frozen=True, slots=True)
class Started(Generic[EngineT]):
    """A running engine, and the properties of its model that are needed for requests in text."""

    engine: EngineT
    tokenizer: Tokenizer | None
    hidden_size: int
    """Number of elements of an embedding."""
    default_sampling_params: SamplingParams
    backend_choice: str
    """A line that names the backend, and the reasons why other backends were not chosen."""
    ranks: RankGroup | None = None
    """The processes that compute the model; None if the engine's process does."""

    def with_engine(self, engine: OtherT, tokenizer: Tokenizer | None) -> Started[OtherT]:
        """Return a copy for a client, with another engine and tokenizer and without the ranks, which belong to the
        engine's host."""
        return replace(cast(Started[Any], self), engine=engine, tokenizer=tokenizer, ranks=None)


def start(config: EngineConfig, replica: int | None = None) -> Started[Engine]:
    """Start an engine: the only one, or the one with number ``replica`` of ``config.data_parallel_size``. Raises
    ModelError, BackendError or ParameterError with a message that says what to change."""
    if config.data_parallel_size > 1 and replica is None:
        raise ParameterError(
            "data_parallel_size",
            config.data_parallel_size,
            "replicas run behind `vllmlite serve` and AsyncLLM; here one engine runs",
        )
    if config.seed == -1:
        config = replace(config, seed=secrets.randbits(64))
    plan = plan_for(config)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, plan.path)
    generation = generation_config(config, plan.path)
    speculative = config.speculative()
    if speculative is not None and speculative.draft is not None and tokenizer is not None:
        check_vocabulary(config, speculative.draft, tokenizer)
    built: BuiltRunner[ModelRunner] | BuiltRunner[ParallelRunner]
    # Imported where they are needed: one rank starts sooner without them.
    if config.distributed_executor_backend == "ray":
        from vllmlite.ranks.ray_nodes import start_on_ray

        built = start_on_ray(config, plan)
    elif config.num_ranks > 1:
        from vllmlite.ranks.start import start_ranks

        built = start_ranks(config, plan)
    else:
        built = build_runner(config, plan, replica=replica or 0)
    runner, backend = built.runner, built.runner.backend
    two_steps = backend.asynchronous if config.async_scheduling is None else config.async_scheduling
    batched = batched_tokens(config, backend.device)
    tiers, fingerprint = None, b""
    memory = PlaceMemory(runner.host_memory())
    if built.host is not None:
        fingerprint = built.host.fingerprint
        tiers = cache_tiers(config, built.host, memory, built.num_blocks, replica or 0)
    engine = Engine(
        Limits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=batched,
            max_mixed_prefill_tokens=mixed_tokens(config, batched),
            max_model_len=built.max_model_len,
            block_size=config.block_size,
            num_blocks=built.num_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
            stages=config.pipeline_parallel_size,
            max_adapters=config.max_loras if config.enable_lora else 0,
        ),
        runner,
        vocab_size=runner.model.vocab_size,
        eos_ids=eos_ids(generation, plan.path, tokenizer),
        steps_in_flight=max(2 if two_steps else 1, config.pipeline_parallel_size),
        seed=config.seed + (replica or 0),  # equal prompts get other random numbers in each replica
        reasoning=reasoning_marks(config.reasoning_config, tokenizer),
        max_logprobs=config.max_logprobs,
        drafting=_drafting(config, built, two_steps),
        cache_format=f"{runner.model.kv_spec.dtype} {runner.model.kv_spec.scales}",
        adapters=_adapters(config, plan, backend) if config.enable_lora else None,
        tiers=tiers,
    )
    if config.slot_save_path is not None:
        engine.saved_prefixes = saved_prefixes(config, fingerprint, memory, engine)
    if config.enable_sleep_mode and isinstance(runner, ModelRunner):
        engine.sleep_mode = sleep_mode(config, plan, replica or 0, runner, memory, fingerprint)
    stats = engine.stats
    stats.backend, stats.device, stats.dtype = backend.name, backend.device, backend.dtype
    defaults = default_params(config, generation)
    ranks = None if isinstance(runner, ModelRunner) else runner.group
    return Started(engine, tokenizer, plan.hidden_size, defaults, built.backend_choice, ranks)


def _drafting(config: EngineConfig, built: BuiltRunner[object], two_steps: bool) -> DraftPolicy | None:
    """Return the policy that decides how many drafts to make, from the measured times of steps; None without
    speculative decoding."""
    options = config.speculative()
    if options is None:
        return None
    return DraftPolicy(
        options.num_tokens,
        options.max_rows,
        two_steps,
        StepCost(built.step_times),
        by_rows=options.by_rows,
        max_len=options.max_len or sys.maxsize,
        draft_cost=StepCost(built.draft_times) if built.draft_times else None,
        wait=built.waiting_time if two_steps else 0.0,
        fills_cache=options.draft is not None and options.draft.method != "medusa",
        reads_states=options.reads_states,
    )


def _adapters(config: EngineConfig, plan: Plan, backend: Backend | BackendFacts) -> AdapterSource:
    """Return the reader of LoRA adapters, which keeps some of them in host memory."""
    from vllmlite.lora.reader import AdapterReader
    from vllmlite.lora.store import AdapterStore

    assert plan.spec is not None  # the runner has refused other models
    dtype = backend.dtype if config.lora_dtype == "auto" else config.lora_dtype
    reader = AdapterReader(
        plan.path,
        plan.spec,
        dtype,
        config.max_lora_rank,
        config.max_lora_bytes,
        partial(open_stored, plan.path, plan.spec, config.load_format, config.seed),
        backend.adapter_abilities,
    )
    return AdapterStore(reader, config.max_cpu_loras or config.max_loras, config.max_lora_bytes)


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
