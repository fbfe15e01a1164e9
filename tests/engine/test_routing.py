"""Which replica a request goes to: the one with the least work, the request's own uncached tokens included."""

from __future__ import annotations

import random
from collections.abc import Callable

from engine_runs import make_engine
from fake_runner import VOCAB

from vllmlite.engine.block_pool import root_digest
from vllmlite.engine.engine import Engine
from vllmlite.engine.routing import TOKENS_PER_REQUEST, Router
from vllmlite.sampling_params import SamplingParams

ROOT = root_digest("salt", "")
BLOCK = 4


def test_idle_replicas_take_turns() -> None:
    router = Router(range(3), BLOCK, 100)
    chosen = [router.choose(str(index), [index] * 8, ROOT) for index in range(6)]
    assert sorted(chosen[:3]) == sorted(chosen[3:]) == [0, 1, 2]


def test_a_prefix_stays_with_its_replica_until_another_would_be_sooner() -> None:
    router = Router(range(2), BLOCK, 100)
    prefix = [*range(40)]
    first = router.choose("first", prefix, ROOT)
    router.note_end(first, "first")
    assert router.choose("second", [*prefix, 1, 2], ROOT) == first
    # 40 tokens are saved; a request that decodes delays by more than that.
    assert TOKENS_PER_REQUEST > 40
    assert router.choose("third", [*prefix, 3], ROOT) != first


def test_the_work_before_a_replica_falls_as_its_requests_progress() -> None:
    router = Router(range(2), BLOCK, 100)
    long = router.choose("long", [1] * 500, ROOT)
    other = 1 - long
    for index in range(3):  # the long prompt outweighs three requests
        assert router.choose(f"short {index}", [index, 9], ROOT) == other
    router.note_token(long, "long")
    assert router.choose("after its first token", [7, 9], ROOT) == long
    router.note_token(long, "unknown")
    router.note_end(long, "unknown")
    router.note_end(long, "long")
    router.note_end(long, "long")
    assert router.choose("after its end", [8, 9], ROOT) == long


def test_prefixes_under_other_roots_do_not_match() -> None:
    router = Router(range(2), BLOCK, 100)
    prefix = [*range(40)]
    first = router.choose("first", prefix, root_digest("salt", "alice"))
    router.note_end(first, "first")
    assert router.choose("second", prefix, root_digest("salt", "bob")) != first


def test_a_router_remembers_as_many_blocks_as_a_cache_has() -> None:
    router = Router(range(2), BLOCK, 10)
    prefix = [*range(41)]
    first = router.choose("first", prefix, ROOT)
    router.note_end(first, "first")
    assert router.choose("again", prefix, ROOT) == first
    router.note_end(first, "again")
    for index in range(2):  # other prompts take the memory of both
        router.note_end(router.choose(str(index), [50 + index] * 41, ROOT), str(index))
    before = router.choose("short", [1], ROOT)
    router.note_end(before, "short")
    assert router.choose("forgotten", prefix, ROOT) != before  # it is only their turn that counts


def test_a_router_forgets_prefixes_when_caches_are_emptied() -> None:
    router = Router(range(2), BLOCK, 100)
    prefix = [*range(40)]
    first = router.choose("first", prefix, ROOT)
    router.note_end(first, "first")
    router.forget_prefixes()
    assert router.choose("second", prefix, ROOT) != first


def _replay(
    choose: Callable[[str, list[int]], int], note: Callable[[int, str, bool], None]
) -> tuple[float, int]:
    """Replay 61 conversations of three turns, with five system prompts between them, on four replicas, each of whose
    caches holds three of these; return the prefix hit rate and the 99th percentile of the steps to the first token."""
    rng = random.Random(5)
    engines: list[Engine] = [
        make_engine(num_blocks=300, block_size=BLOCK, max_num_seqs=16, budget=128)[0] for _ in range(4)
    ]
    systems = [[rng.randrange(1, VOCAB) for _ in range(400)] for _ in range(5)]
    history = [list(rng.choice(systems)) for _ in range(61)]
    turns = [index for index in range(61) for _ in range(3)]
    rng.shuffle(turns)
    where: dict[str, tuple[int, int, int]] = {}
    delays: list[int] = []
    busy: set[int] = set()
    step = 0
    while turns or where:
        ready = next((index for index in turns if index not in busy), None)
        if ready is not None and step % 3 == 0:
            turns.remove(ready)
            busy.add(ready)
            history[ready] += [rng.randrange(1, VOCAB) for _ in range(20)]
            name = f"{step} {ready}"
            replica = choose(name, history[ready])
            where[name] = (replica, ready, step)
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            engines[replica].add_request(name, history[ready], params)
        for replica, engine in enumerate(engines):
            for output in engine.step():
                _, conversation, since = where[output.request_id]
                if output.new_token_ids and since >= 0:
                    delays.append(step - since)
                    where[output.request_id] = (replica, conversation, -1)
                history[conversation] += output.new_token_ids
                done = output.finish_reason is not None
                note(replica, output.request_id, done)
                if done:
                    del where[output.request_id]
                    busy.discard(conversation)
        step += 1
    queries = sum(engine.current_stats().prefix_cache_queries for engine in engines)
    hits = sum(engine.current_stats().prefix_cache_hits for engine in engines)
    return hits / queries, sorted(delays)[len(delays) * 99 // 100]


def test_conversations_hit_the_prefix_cache_half_again_as_often_as_by_turns() -> None:
    count = iter(range(10**6))
    by_turns, delay_by_turns = _replay(lambda _name, _prompt: next(count) % 4, lambda *_: None)
    router = Router(range(4), BLOCK, 300)

    def note(replica: int, name: str, done: bool) -> None:
        (router.note_end if done else router.note_token)(replica, name)

    routed, delay = _replay(lambda name, prompt: router.choose(name, prompt, ROOT), note)
    assert routed >= 1.5 * by_turns
    assert delay <= delay_by_turns
