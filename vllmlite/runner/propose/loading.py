"""Finding and loading the model that proposes drafts."""

from __future__ import annotations

from dataclasses import replace

from vllmlite.backends.base import Backend, Model
from vllmlite.config.engine_config import EngineConfig
from vllmlite.config.speculative import FIELD, DraftCheckpoint
from vllmlite.errors import ParameterError
from vllmlite.hub import find_model
from vllmlite.models import load_planned
from vllmlite.models.plan import Plan, check_quantization, plan_model
from vllmlite.models.shard import sharded
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.packing import Packing


def plan_draft(config: EngineConfig, draft: DraftCheckpoint) -> Plan:
    """Find the draft model and return how it would run. Raises ModelError, and ParameterError for options that
    contradict the model."""
    path = find_model(draft.model, revision=draft.revision, download_dir=config.download_dir)
    plan = plan_model(path, config.model_impl)
    check_quantization(plan, draft.quantization, f"{FIELD}.quantization")
    longest = plan.max_position_embeddings
    if draft.max_model_len is not None and draft.max_model_len > longest:
        raise ParameterError(
            f"{FIELD}.max_model_len", draft.max_model_len, f"must be at most the draft model's {longest}"
        )
    return plan


def check_vocabulary(draft: DraftCheckpoint, plan: Plan, tokenizer: Tokenizer) -> None:
    """Raise ParameterError unless the draft model's ids are those of ``tokenizer``, the target model's.

    Sizes are not compared: models of one family pad their vocabularies to different sizes."""
    tokens, drafted = tokenizer.token_ids(), Tokenizer(plan.path).token_ids()
    if tokens == drafted:
        return
    other = next(text for text in [*tokens, *drafted] if tokens.get(text) != drafted.get(text))
    raise ParameterError(
        f"{FIELD}.model",
        draft.model,
        f"must have the model's vocabulary: token {other!r} is {tokens.get(other)} in the model, "
        f"{drafted.get(other)} in the draft model",
    )


def load_draft(
    config: EngineConfig, draft: DraftCheckpoint, backend: Backend, longest: int, rank: int, world: int
) -> tuple[Model, int]:
    """Load the draft model onto the target model's backend; ``longest`` is the length of the target's sequences.

    Returns the model and the length of its sequences. On several ranks each computes a part of it, as of the target."""
    plan = plan_draft(config, draft)
    if plan.backends and backend.name not in plan.backends:
        raise ParameterError(
            f"{FIELD}.model",
            draft.model,
            f"{plan.architecture} runs on {', '.join(plan.backends)} only, but the model on {backend.name}",
        )
    if plan.spec is not None:
        plan = replace(plan, spec=sharded(plan.spec, rank, world))
    longest = min(longest, draft.max_model_len or plan.max_position_embeddings)
    packing = Packing(
        backend, draft.quantization if plan.quantization is None else None, config.dtype == "auto"
    )
    model = load_planned(
        plan,
        backend,
        max_model_len=longest,
        num_positions=longest,
        block_size=config.block_size,
        kv_cache_dtype="auto",
        load_format="dummy" if config.load_format == "dummy" else "auto",
        seed=config.seed,
        packing=packing,
    )
    return model, longest
