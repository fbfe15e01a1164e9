"""Finding and loading the model that proposes drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from vllmlite.backends.kv_cache import KVSpec
from vllmlite.config.engine_config import KV_DTYPE_SYNONYMS, KV_DTYPES, EngineConfig
from vllmlite.config.speculative import BUILT_IN_DRAFTS, EAGLE, FIELD, MTP, DraftCheckpoint
from vllmlite.errors import ParameterError
from vllmlite.hub import built_in_draft, find_model
from vllmlite.models import load_planned
from vllmlite.models.decoder import FINAL, Decoder
from vllmlite.models.eagle import EagleHead, read_eagle
from vllmlite.models.interface import Model
from vllmlite.models.medusa import MedusaHeads
from vllmlite.models.mtp import MtpHead
from vllmlite.models.plan import Plan, check_quantization, plan_model
from vllmlite.models.shard import sharded
from vllmlite.models.spec import DecoderSpec
from vllmlite.runner.propose.draft_model import ModelProposer
from vllmlite.runner.propose.eagle import DraftHead, EagleProposer
from vllmlite.runner.propose.medusa import MedusaProposer
from vllmlite.runner.propose.proposer import Proposer
from vllmlite.runner.propose.rejection import RejectionSampler
from vllmlite.runner.runner import ModelRunner
from vllmlite.runner.sizes import batched_tokens
from vllmlite.tokenizers.tokenizer import Tokenizer
from vllmlite.weights.packing import Packing


def _plan(config: EngineConfig, draft: DraftCheckpoint) -> Plan:
    """Find the draft model and return how it would run. Raises ModelError, and ParameterError for options that
    contradict the model."""
    plan = plan_model(_find(config, draft), config.model_impl)
    check_quantization(plan, draft.quantization, f"{FIELD}.quantization")
    dtype, accepted = _cache_dtype(draft), ("auto", *KV_DTYPES)
    if dtype not in accepted:
        raise ParameterError(f"{FIELD}.kv_cache_dtype", dtype, f"must be {' or '.join(accepted)}")
    longest = plan.max_position_embeddings
    if draft.max_model_len is not None and draft.max_model_len > longest:
        raise ParameterError(
            f"{FIELD}.max_model_len", draft.max_model_len, f"must be at most the draft model's {longest}"
        )
    return plan


def _cache_dtype(draft: DraftCheckpoint) -> str:
    return KV_DTYPE_SYNONYMS.get(draft.kv_cache_dtype, draft.kv_cache_dtype)


def check_vocabulary(config: EngineConfig, draft: DraftCheckpoint, tokenizer: Tokenizer) -> None:
    """Raise ParameterError unless the draft model's tokens have the same ids as in ``tokenizer``, the target model's.
    Draft heads may have no tokenizer. Sizes are not compared: models of one family pad their vocabularies to different
    sizes."""
    if draft.model is None:
        return
    path = _find(config, draft)
    if draft.method != "draft_model" and not any(
        (path / name).exists() for name in ("tokenizer.json", "tokenizer.model")
    ):
        return
    tokens, drafted = tokenizer.token_ids(), Tokenizer(path).token_ids()
    if tokens == drafted:
        return
    other = next(text for text in [*tokens, *drafted] if tokens.get(text) != drafted.get(text))
    raise ParameterError(
        f"{FIELD}.model",
        draft.model,
        f"must have the model's vocabulary: token {other!r} is {tokens.get(other)} in the model, "
        f"{drafted.get(other)} in the draft model",
    )


RunnerOf: TypeAlias = Callable[[Model, int], ModelRunner]
"""Function that returns a runner of a draft model for sequences of up to the given number of tokens."""


@dataclass(frozen=True, slots=True)
class Drafter:
    """A loaded model that proposes drafts."""

    models: tuple[Model, ...]
    """The draft model, if drafts come from a whole model; otherwise empty."""
    caches: tuple[KVSpec, ...]
    """The format of its key/value cache, which has as many blocks as the target model's; empty if it has none."""
    proposer: Callable[[RunnerOf, int, int], Proposer]
    """Function that returns the proposer, given a function that builds the runner of a draft model, the number of
    blocks, and the maximum length of sequences."""


def load_drafter(
    config: EngineConfig,
    draft: DraftCheckpoint,
    target: Model,
    packing: Packing,
    longest: int,
    rank: int,
    world: int,
    rejection: RejectionSampler | None,
) -> Drafter:
    """Load the model of ``draft`` onto the backend of ``target``. ``packing`` decides the form of its weights; its
    sequences have up to ``longest`` tokens.

    With several ranks, each rank has a part of a draft model, as of the target model, but a whole copy of heads and MTP
    layers."""
    if draft.method != "draft_model":
        return _load_heads(config, draft, target, packing, longest, rejection)
    plan, backend = _plan(config, draft), packing.backend
    if plan.backends and backend.name not in plan.backends:
        raise ParameterError(
            f"{FIELD}.model",
            draft.model,
            f"{plan.architecture} runs on {', '.join(plan.backends)} only, but the model on {backend.name}",
        )
    if plan.spec is not None and not draft.whole:
        plan = replace(plan, spec=sharded(plan.spec, rank, world))
    drafted = min(longest, draft.max_model_len or plan.max_position_embeddings)
    at_load = draft.quantization if plan.quantization is None else None
    model = load_planned(
        plan,
        backend,
        max_model_len=drafted,
        num_positions=drafted,
        block_size=config.block_size,
        kv_cache_dtype=_cache_dtype(draft),
        load_format="dummy" if config.load_format == "dummy" else "auto",
        seed=config.seed,
        packing=Packing(backend, at_load, config.dtype == "auto"),
    )

    def proposer(runner_of: RunnerOf, num_blocks: int, longest: int) -> Proposer:
        longest = min(drafted, longest)
        return ModelProposer(
            runner_of(model, longest),
            max_model_len=longest,
            budget=batched_tokens(config, backend.device),
            vocab_size=target.vocab_size,
            rejection=rejection,
        )

    return Drafter((model,), (model.kv_spec,), proposer)


def read_states(config: EngineConfig, draft: DraftCheckpoint, target: DecoderSpec) -> tuple[int, ...]:
    """Return the layers whose inputs the drafts of ``draft`` read, in a model of which ``target`` is a stage."""
    if draft.method not in EAGLE:
        return ()
    spec = read_eagle(_find(config, draft), draft.method, target.whole or target)
    return tuple(layer for layer in spec.states if layer != FINAL)


def _load_heads(
    config: EngineConfig,
    draft: DraftCheckpoint,
    target: Model,
    packing: Packing,
    longest: int,
    rejection: RejectionSampler | None,
) -> Drafter:
    """Load draft heads or MTP layers, which read the target model's hidden states."""
    if not isinstance(target, Decoder):
        raise ParameterError(f"{FIELD}.method", draft.method, "needs a native model")
    path = _find(config, draft)
    if draft.method == "medusa":
        spec = target.spec
        heads = MedusaHeads(path, target.backend, spec.output_size, spec.vocab_size)
        return Drafter((), (), lambda *_: MedusaProposer(heads))
    head: DraftHead
    if draft.method == MTP:
        head = MtpHead(
            path,
            target,
            packing=packing,
            num_positions=longest,
            block_size=config.block_size,
            load_format=config.load_format,
            seed=config.seed,
        )
    else:
        eagle = read_eagle(path, draft.method, target.spec.whole or target.spec)
        head = EagleHead(eagle, target, num_positions=longest, block_size=config.block_size)

    def proposer(runner_of: RunnerOf, num_blocks: int, longest: int) -> Proposer:
        return EagleProposer(
            head,
            num_blocks=num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_model_len=min(draft.max_model_len or longest, longest),
            rejection=rejection,
        )

    return Drafter((), (head.kv_spec,), proposer)


def _find(config: EngineConfig, draft: DraftCheckpoint) -> Path:
    if draft.model is None:
        if draft.method in BUILT_IN_DRAFTS:
            return built_in_draft(draft.method)
        revision = draft.revision or config.revision
        return find_model(config.model, revision=revision, download_dir=config.download_dir)
    return find_model(draft.model, revision=draft.revision, download_dir=config.download_dir)
