"""Building a runner: choose the backend, load the model or one rank's part of it, size the cache, capture graphs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from vllmlite.backends.base import Backend
from vllmlite.backends.comm import Comm
from vllmlite.backends.cores import usable_cores
from vllmlite.backends.select import BackendRequest, select_backend
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.hub import find_model
from vllmlite.models import load_planned
from vllmlite.models.adapters import most_bytes
from vllmlite.models.gguf import has_blocks, treatment
from vllmlite.models.interface import Model
from vllmlite.models.plan import Plan, check_quantization, plan_model
from vllmlite.models.shard import part_of
from vllmlite.models.spec import DecoderSpec
from vllmlite.models.tensors import stored_schemes
from vllmlite.runner.cache_tiers import HostPlaces, host_places
from vllmlite.runner.propose.loading import load_drafter, read_states
from vllmlite.runner.propose.lookup import lookup_proposer
from vllmlite.runner.propose.proposer import EarlierStages, Proposer
from vllmlite.runner.propose.rejection import RejectionSampler
from vllmlite.runner.runner import ModelRunner
from vllmlite.runner.sizes import most_positions, num_cache_blocks, num_host_places
from vllmlite.runner.step_times import step_times, waiting_time
from vllmlite.terminal import is_terminal, note
from vllmlite.weights.adapter import AdapterLimits
from vllmlite.weights.packing import Packing
from vllmlite.weights.schemes.grouped import GroupedScheme

logger = logging.getLogger(__name__)

WAITING = "waiting until all ranks have loaded their weights"
"""Name of the phase in which a rank waits for others and makes no progress of its own."""


RunnerT = TypeVar("RunnerT", covariant=True)


@dataclass(frozen=True, slots=True)
class BuiltRunner(Generic[RunnerT]):
    """A runner, with the sizes and times that an engine needs to schedule its steps."""

    runner: RunnerT
    num_blocks: int
    max_model_len: int
    backend_choice: str
    """A line that names the backend, and the reasons why other backends were not chosen."""
    step_times: list[tuple[int, float]] = field(default_factory=list)
    """For speculative decoding: pairs of a number of tokens and the seconds that a step of so many tokens takes."""
    draft_times: list[tuple[int, float]] = field(default_factory=list)
    """Pairs of a number of tokens and the seconds of such a step of the draft model; empty without a draft model."""
    waiting_time: float = 0.0
    """Seconds by which a step that waits for the results of the one before takes longer than one launched beside it; 0
    without speculative decoding and two steps in flight."""
    host: HostPlaces | None = None
    """The host memory for blocks; None if there is none."""


def plan_for(config: EngineConfig) -> Plan:
    """Find the model of ``config`` and return how it would run. Raises ModelError, and ParameterError for options that
    contradict the model."""
    path = find_model(config.model, revision=config.revision, download_dir=config.download_dir)
    plan = plan_model(path, config.model_impl)
    if config.max_model_len is not None and config.max_model_len > plan.max_position_embeddings:
        raise ParameterError(
            "max_model_len",
            config.max_model_len,
            f"must be at most the model's {plan.max_position_embeddings}",
        )
    check_quantization(plan, config.quantization, "quantization")
    return plan


def _quantizes_inputs(spec: DecoderSpec) -> bool:
    """Return whether products with the checkpoint's weights quantise activations to int8."""
    return any(scheme.input_dtype == "int8" for scheme in stored_schemes(spec).values())


def _packing(
    config: EngineConfig, plan: Plan, backend: Backend, at_load: str | None, keep_blocks: bool
) -> Packing:
    """Return in which form weights are put on the backend. Raises ParameterError for options that have no effect
    there."""
    int8_activations = config.activation_dtype == "int8"
    found = Packing(backend, at_load, keep_blocks, config.quantize_head, int8_activations)
    if config.quantize_head is not None and (
        plan.spec is None or config.quantize_head not in backend.schemes
    ):
        raise ParameterError(
            "quantize_head",
            config.quantize_head,
            f"needs a native model and backend cpu; this is {backend.name}",
        )
    schemes = [] if plan.spec is None else map(found.scheme, stored_schemes(plan.spec).values())
    if int8_activations and not any(isinstance(each, GroupedScheme) and each.int8_input for each in schemes):
        raise ParameterError(
            "activation_dtype",
            config.activation_dtype,
            "needs integer weights in groups, as those of AWQ and GPTQ checkpoints, and backend cpu",
        )
    return found


def weight_forms(plan: Plan, packing: Packing) -> list[str]:
    """Return a text for each quantisation scheme of the checkpoint: how its weights are multiplied, and the dtype of
    the activations."""
    if plan.spec is None:
        return []
    forms = []
    for scheme in dict.fromkeys(stored_schemes(plan.spec).values()) or [None]:
        stored = plan.dtype if scheme is None else scheme.name
        forms.append(
            f"{stored} weights {packing.treatment(scheme)}, activations in {packing.activations(scheme)}"
        )
    return forms


def build_runner(
    config: EngineConfig,
    plan: Plan,
    rank: int = 0,
    world: int = 1,
    connect: Callable[[Backend], Comm] | None = None,
    replica: int = 0,
    enter: Callable[[str], None] = lambda phase: None,
) -> BuiltRunner[ModelRunner]:
    """Build the runner of rank ``rank`` of ``world`` ranks, from ``plan``, which is :func:`plan_for` ``config``.
    ``replica`` is the engine's number among those of ``config.data_parallel_size``.

    ``connect`` connects this rank's backend to the other ranks. ``enter`` is called with the name of each long phase.
    All ranks build at the same time from equal arguments, and ``config.seed`` must not be -1. Raises ModelError,
    BackendError or ParameterError."""
    stages, options = config.pipeline_parallel_size, config.speculative()
    if plan.spec is not None:
        drafts_read_table = options is not None and options.reads_states
        plan = replace(plan, spec=part_of(plan.spec, rank, world, stages, drafts_read_table))
    elif world > 1:
        raise ParameterError("tensor_parallel_size", world, "transformers' models run on 1 rank")
    path, at_load = plan.path, config.quantization if plan.quantization is None else None
    keep_blocks = config.dtype == "auto"
    threads = config.threads
    if threads is None and config.data_parallel_size > 1:
        threads = max(1, usable_cores() // config.data_parallel_size)
    request = BackendRequest(
        backend=config.backend,
        device=config.device,
        dtype=config.dtype,
        checkpoint_dtype=plan.dtype,
        threads=threads,
        gpu=replica,
        cpu_isa=config.cpu_isa,
        quantization=at_load,
        packed=at_load is not None
        or config.activation_dtype == "int8"
        or (plan.spec is not None and _quantizes_inputs(plan.spec))
        or (keep_blocks and path.is_file() and has_blocks(path)),
        model=plan.architecture,
        only=plan.backends,
        batch_invariant=config.batch_invariant,
        movable=config.enable_sleep_mode,
    )
    backend, choice = select_backend(request)
    if connect is not None:
        backend.comm = connect(backend)
    packing = _packing(config, plan, backend, at_load, keep_blocks)
    if path.is_file() and plan.spec is not None:
        done = treatment(path, plan.spec, packing)
        choice += f"; {done}"
        if is_terminal(sys.stderr):
            note(f"vllmlite: {done}")
    elif plan.spec is not None and (plan.quantization or at_load):
        choice = "; ".join((choice, *weight_forms(plan, packing)))
    if packing.head is not None:
        choice += f"; output layer quantised to {packing.head} if stored as floats"
    longest = config.max_model_len or plan.max_position_embeddings
    num_positions = backend.comm.least(most_positions(config, backend, plan, longest))
    enter("loading the weights")
    model = load_planned(
        plan,
        backend,
        max_model_len=longest,
        num_positions=num_positions,
        block_size=config.block_size,
        kv_cache_dtype=config.kv_cache_dtype,
        load_format=config.load_format,
        seed=config.seed,
        packing=packing,
    )
    if model.kv_spec.dtype != backend.dtype:
        choice += f"; key/value cache in {model.kv_spec.dtype}"
    draft = None if options is None else options.draft
    drafter, rejection, samples = None, None, plan.spec is None or plan.spec.stage.is_last
    models, caches = [model], [model.kv_spec]
    if draft is not None and options is not None:
        choice += f"; drafts of up to {options.num_tokens} tokens from {draft.model or f'its {draft.method}'}"
        if options.probabilistic:
            rejection = RejectionSampler(backend)
        if samples:
            drafter = load_drafter(
                config, draft, model, packing, num_positions, backend.comm.rank, world // stages, rejection
            )
            models, caches = [*models, *drafter.models], [*caches, *drafter.caches]
    enter(WAITING)
    backend.comm.least(0)  # all ranks have loaded their weights: the memory that is free now is for caches
    enter("allocating the cache and measuring steps")
    adapters = AdapterLimits(config.max_loras, config.max_lora_rank) if config.enable_lora else None
    reserved = (
        most_bytes(plan.spec, adapters, backend.dtype, backend.adapter_abilities)
        if plan.spec is not None and adapters
        else 0
    )
    num_blocks = backend.comm.least(
        num_cache_blocks(config, backend, models, caches, num_positions, reserved)
    )
    capacity = min(num_blocks * config.block_size, num_positions)
    if longest > capacity:
        if config.max_model_len is not None:
            block_bytes = sum(map(backend.kv_bytes_per_block, caches))
            raise ParameterError(
                "max_model_len",
                longest,
                f"takes {-(-longest // config.block_size) * block_bytes} bytes of key/value cache; the "
                f"{num_blocks * block_bytes} there are hold {capacity} tokens: lower it to that, or enlarge the cache",
            )
        logger.warning(
            "max_model_len is %d, what the key/value cache holds, not the model's %d", capacity, longest
        )
        longest = capacity

    def runner_of(
        model: Model,
        longest: int,
        proposer: Proposer | None = None,
        adapters: AdapterLimits | None = None,
        num_places: int = 0,
    ) -> ModelRunner:
        runner = ModelRunner(
            backend,
            model,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_model_len=longest,
            enforce_eager=config.enforce_eager,
            proposer=proposer,
            adapters=adapters,
            samples=samples,
            num_places=num_places,
            rejection=None if proposer is None else rejection,
        )
        _capture_graphs(runner)
        return runner

    proposer: Proposer | None = None
    if drafter is not None:
        proposer = drafter.proposer(runner_of, num_blocks, longest)
    elif draft is not None and plan.spec is not None:
        proposer = EarlierStages(read_states(config, draft, plan.spec))
    elif options is not None:
        proposer = lookup_proposer(options, config.max_num_seqs, backend.extension)
    places = num_host_places(config, backend, model)
    if places:
        places = backend.comm.least(places)
    runner = runner_of(model, longest, proposer, adapters, places)

    def agree(value: bool) -> bool:
        return bool(backend.comm.least(value))

    times: list[tuple[int, float]] = []
    draft_times: list[tuple[int, float]] = []
    if options is not None:
        times = step_times(runner.profile, config.max_num_seqs * longest, backend.device, agree)
    if draft is not None and proposer is not None:
        draft_times = step_times(proposer.profile, config.max_num_seqs, backend.device, agree)
    wait = waiting_time(runner.profile) if options is not None and backend.asynchronous else 0.0
    host = host_places(config, plan, runner, num_blocks, longest)
    return BuiltRunner(runner, num_blocks, longest, f"{plan}; {choice}", times, draft_times, wait, host)


def _capture_graphs(runner: ModelRunner) -> None:
    """Capture the graphs of decoding steps. Shows a line of progress on a terminal if that takes long."""
    began, captured, shown = time.perf_counter(), 0, False
    for rows in runner.graphs.capture():
        captured += 1
        if is_terminal(sys.stderr) and time.perf_counter() - began > 0.1:
            note(f"\rcapturing decoding steps: {rows} rows \x1b[K", end="")
            shown = True
    if shown:
        note("\r\x1b[K", end="")
    logger.info("decoding steps of %d sizes captured in %.1f s", captured, time.perf_counter() - began)
