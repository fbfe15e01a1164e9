"""Policy of the cache tiers on the fake runner: what is saved, loaded and computed again."""

from __future__ import annotations

import pytest
from engine_runs import make_engine, run
from fake_disk import FakeDisk
from fake_runner import FakeRunner, expected

from vllmlite.engine.engine import Engine
from vllmlite.engine.saved_prefixes import SavedPrefixes
from vllmlite.engine.tiers import Tiers, TransferCost
from vllmlite.sampling_params import SamplingParams

PROMPT = list(range(1, 34))
"""Eight blocks of four tokens, and one token."""


def ask(engine: Engine, prompt: list[int], max_tokens: int = 1, salt: str | None = None) -> int:
    """Run one request, check its output, and return its number of cached tokens."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    request = engine.add_request("it", prompt, params, cache_salt=salt)
    assert run(engine)["it"][0] == expected(prompt, max_tokens, eos=())
    assert request.num_cached_tokens is not None
    return request.num_cached_tokens


def evict(engine: Engine) -> None:
    """Overwrite every block of the pool of 16 blocks."""
    for start in (40, 50):
        ask(engine, [start] * 60)


def tiers_of(engine: Engine) -> Tiers:
    assert engine.scheduler.tiers is not None
    return engine.scheduler.tiers


def disk_with_prompt() -> FakeDisk:
    """A disk on which an engine has left the blocks of PROMPT."""
    disk = FakeDisk()
    engine, _ = small_engine(64, disk=disk)
    ask(engine, PROMPT)
    while disk.pending:
        tiers_of(engine).poll()
    assert len(disk.blocks) == 8
    return disk


def small_engine(places: int, **options: object) -> tuple[Engine, FakeRunner]:
    return make_engine(16, 4, places=places, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2])
def test_an_evicted_prefix_is_copied_back_from_the_host(depth: int) -> None:
    engine, runner = small_engine(64, depth=depth)
    ask(engine, PROMPT)
    evict(engine)
    before = runner.tokens_run
    assert ask(engine, PROMPT) == 32
    assert runner.tokens_run - before == 1
    assert tiers_of(engine).counts.hits == 32


def test_without_tiers_an_evicted_prefix_is_computed_again() -> None:
    engine, _ = small_engine(0)
    ask(engine, PROMPT)
    evict(engine)
    assert ask(engine, PROMPT) == 0


def test_blocks_are_saved_before_the_pool_runs_dry_and_no_sooner() -> None:
    engine, _ = small_engine(64)
    ask(engine, [9] * 21)
    assert tiers_of(engine).counts.saved == 0
    evict(engine)
    assert tiers_of(engine).counts.saved >= 5


def test_a_pool_that_may_run_dry_is_saved_while_nothing_runs() -> None:
    engine, _ = small_engine(64)
    ask(engine, [9] * 41)
    assert tiers_of(engine).counts.saved == 10
    before = engine.stats.num_steps
    ask(engine, [8] * 60)  # evicts what was saved: its step has nothing to save
    assert tiers_of(engine).counts.saved == 10 + 15
    assert engine.stats.num_steps == before + 2


def test_blocks_without_a_place_are_dropped_and_counted() -> None:
    engine, _ = small_engine(2)
    ask(engine, PROMPT)
    evict(engine)
    assert ask(engine, PROMPT) == 0


@pytest.mark.parametrize(("mode", "copies"), [("auto", True), ("swap", True), ("recompute", False)])
def test_preempted_sequences_resume_by_copying_unless_told_not_to(mode: str, copies: bool) -> None:
    computed = []
    for places in (0, 64):
        engine, runner = small_engine(places, max_model_len=64, preemption_mode=mode)
        for name in "abc":
            params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
            engine.add_request(name, [ord(name) % 9] * 9, params)
        done = run(engine)
        assert all(done[n][0] == expected([ord(n) % 9] * 9, 50, eos=()) for n in "abc")
        assert engine.scheduler.num_preemptions > 0
        computed.append(runner.tokens_run)
    assert (computed[1] < computed[0]) == copies


def test_what_takes_longer_to_copy_than_to_compute_is_computed() -> None:
    engine, _ = small_engine(64)
    ask(engine, PROMPT)
    evict(engine)
    tiers_of(engine).cost = TransferCost(4, host_seconds=1.0, token_seconds=0.2)
    assert ask(engine, PROMPT) == 0
    evict(engine)
    tiers_of(engine).cost = TransferCost(4, host_seconds=1.0, token_seconds=0.3)
    assert ask(engine, PROMPT) == 32


def test_blocks_on_disk_outlive_the_engine() -> None:
    engine, runner = small_engine(16, disk=disk_with_prompt())
    assert ask(engine, PROMPT) == 32
    assert runner.tokens_run == 1


def test_others_run_while_a_prefix_is_read_from_disk() -> None:
    disk = disk_with_prompt()
    engine, runner = small_engine(16, disk=disk)
    stuck = disk.finished
    disk.finished = list  # type: ignore[method-assign]
    engine.add_request("reads", PROMPT, SamplingParams(temperature=0, max_tokens=1))
    engine.add_request("runs", [5, 6], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert [output.request_id for _ in range(3) for output in engine.step()] == ["runs", "runs"]
    disk.finished = stuck  # type: ignore[method-assign]
    assert run(engine)["reads"][0] == expected(PROMPT, 1)
    assert runner.tokens_run == 1 + 3


def test_a_request_does_not_wait_for_a_slow_disk_for_ever() -> None:
    disk = disk_with_prompt()
    engine, runner = small_engine(16, disk=disk)
    disk.finished = list  # type: ignore[method-assign]
    tiers_of(engine).cost = TransferCost(4, token_seconds=1e-9)
    assert ask(engine, PROMPT) == 0
    assert runner.tokens_run == 33


def test_requests_with_a_salt_stay_off_the_disk_but_not_out_of_host_memory() -> None:
    disk = FakeDisk()
    engine, _ = small_engine(64, disk=disk)
    ask(engine, PROMPT, salt="secret")
    assert not disk.pending
    assert not disk.blocks
    evict(engine)
    assert ask(engine, PROMPT, salt="secret") == 32
    assert ask(engine, PROMPT) == 0


def test_resetting_the_prefix_cache_empties_every_tier() -> None:
    disk = disk_with_prompt()
    engine, _ = small_engine(64, disk=disk)
    assert ask(engine, PROMPT) == 32
    engine.reset_prefix_cache()
    assert not disk.blocks
    assert ask(engine, PROMPT) == 0


def test_nothing_is_loaded_after_a_step_that_failed() -> None:
    """Nobody knows which copies of a failed step were made."""
    engine, runner = small_engine(64)
    ask(engine, PROMPT)
    evict(engine)
    runner.fail_at = runner.steps + 1
    engine.add_request("fails", [8] * 40, SamplingParams(temperature=0, max_tokens=1))
    outputs = engine.step() or engine.step()  # the first one may only wait for copies
    assert [output.finish_reason for output in outputs] == ["error"]
    assert ask(engine, PROMPT) == 0
    engine.scheduler.check_integrity()


def test_a_stuck_disk_delays_nothing_and_takes_half_of_the_host_at_most() -> None:
    disk = FakeDisk()
    engine, runner = small_engine(16, disk=disk)
    disk.finished = list  # type: ignore[method-assign]
    for number in range(20):
        ask(engine, [number + 1] * 30, max_tokens=3)
    assert len(disk.pending) == 8
    assert runner.tokens_run == 20 * 32
    assert engine.current_stats().tier_blocks_written == 0


def test_the_stats_count_what_the_tiers_did() -> None:
    engine, _ = small_engine(16, disk=disk_with_prompt())
    ask(engine, PROMPT)
    stats = engine.current_stats()
    assert (stats.external_prefix_cache_queries, stats.external_prefix_cache_hits) == (33, 32)
    assert (stats.tier_blocks_read, stats.tier_blocks_loaded, stats.tier_blocks_failed) == (8, 8, 0)


class Files:
    """Keeps the blocks of one file."""

    def __init__(self, memory: dict[int, list[int]]) -> None:
        self.memory = memory
        self.blocks: list[list[int]] = []

    def create(self, name: str, num_blocks: int) -> Files:
        return self

    def write(self, digest: bytes, *block: int) -> None:
        self.blocks.append(list(block))

    def finish(self, file: Files, name: str) -> None:
        pass


def test_saving_a_prompt_does_not_evict_the_blocks_that_are_to_be_saved() -> None:
    """The first block is in the host's memory alone, in the place that would be used next."""
    engine, runner = small_engine(8)
    ask(engine, PROMPT)
    pool, host, files = tiers_of(engine).pool, tiers_of(engine).host, Files(runner.host)
    saved = SavedPrefixes(tiers_of(engine), files, engine.prefix_root(), 4, engine.run_copies)  # type: ignore[arg-type]
    request = engine.add_request("it", PROMPT, SamplingParams(max_tokens=1))
    run(engine)
    digests = request.block_hashes
    host.forget(digests)
    pool.forget(digests[:1])
    [place] = host.allocate(1)
    host.cache(place, digests[0])
    runner.host[place] = PROMPT[:4]
    others = host.allocate(7)
    for number, other in enumerate(others):
        host.cache(other, bytes([number]))
    host.release([place])
    host.release(others)
    assert saved.save("name", PROMPT) == 32
    assert [token for block in files.blocks for token in block] == PROMPT[:32]
    engine.scheduler.check_integrity()
