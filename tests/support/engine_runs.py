"""Engines on the fake runner, and running them to the end."""

from __future__ import annotations

from typing import Any

from fake_disk import FakeDisk
from fake_runner import EOS, VOCAB, FakeRunner
from hypothesis import strategies as st

from vllmlite.engine.drafts import DraftPolicy, StepCost
from vllmlite.engine.engine import Engine
from vllmlite.engine.scheduler import Limits
from vllmlite.engine.tiers import Tiers, TransferCost


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    max_num_seqs: int = 8,
    budget: int = 64,
    mixed: int | None = None,
    max_model_len: int | None = None,
    caching: bool = True,
    depth: int = 1,
    fail_at: int = -1,
    drafts: int = 0,
    right: float = 0.5,
    cost: StepCost | None = None,
    places: int = 0,
    preemption_mode: str = "auto",
    disk: FakeDisk | None = None,
    stages: int = 1,
) -> tuple[Engine, FakeRunner]:
    limits = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_mixed_prefill_tokens=mixed or budget,
        max_model_len=max_model_len or num_blocks * block_size,
        block_size=block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=caching,
        stages=stages,
    )
    runner = FakeRunner(limits, fail_at, right)
    drafting = DraftPolicy(drafts, overlapped=depth > 1, cost=cost or StepCost())
    tiers = None
    if places:
        if disk is not None:
            disk.host = runner.host
        tiers = Tiers(num_blocks, places, TransferCost(block_size), preemption_mode, disk)
    engine = Engine(
        limits, runner, vocab_size=VOCAB, eos_ids=[EOS], steps_in_flight=depth, drafting=drafting, tiers=tiers
    )
    return engine, runner


def engine_options(**others: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Random keyword arguments of :func:`make_engine`: limits of a step, and those that ``others`` name."""
    limits = {
        "max_num_seqs": st.integers(1, 6),
        "budget": st.integers(1, 40),
        "mixed": st.integers(1, 40),
        "caching": st.booleans(),
        "depth": st.integers(1, 3),
    }
    return st.fixed_dictionaries({**limits, **others})


def run(engine: Engine, limit: int = 10_000) -> dict[str, tuple[list[int], str | None]]:
    """Step to the end, checking integrity after each step; id → output and finish reason."""
    done: dict[str, tuple[list[int], str | None]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        assert steps < limit, "starved"
        for output in engine.step():
            ids, _ = done.get(output.request_id, ([], None))
            done[output.request_id] = (ids + output.new_token_ids, output.finish_reason)
        engine.scheduler.check_integrity()
    return done


def assert_idle(engine: Engine) -> None:
    engine.step()
    assert engine.scheduler.pool.num_used == 0
    assert not engine.scheduler.running and not engine.scheduler.num_waiting
    engine.scheduler.check_integrity()
