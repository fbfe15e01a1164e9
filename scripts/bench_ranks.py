"""Measure what several processes on this host cost: messages, collectives, and decoding against one process.

    scripts/bench_ranks.py primitives
    scripts/bench_ranks.py decode DIR [--rows 1 16] [--rounds 5] [--ranks 2] [--layers N]

``primitives``: the time of an all-reduce of 4 KB between two processes, and until a schedule of 16 rows has reached
two processes that are awake. ``decode``: the model of DIR (its weights may be random: --load-format dummy) on one
process with as many threads as there are ranks, and on ranks of one thread each, in alternation; prints the tokens per
second of each round and the ratio of the medians. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vllmlite import LLM, SamplingParams
from vllmlite.backends.cpu import CpuBackend
from vllmlite.backends.native import load_extension
from vllmlite.engine.schedule import Schedule
from vllmlite.ranks.comm import connect

REPEATS = 20_000


def main() -> None:
    """Run the measurement that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("primitives", "decode"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    if args.what == "primitives":
        primitives()
    elif args.model is None:
        parser.error("decode needs a model")
    else:
        decode(args)


def primitives() -> None:
    """Print the times of collectives and messages between processes."""
    native = load_extension("_cpu")
    memory = os.memfd_create("ranks")
    os.ftruncate(memory, native.Ranks.memory_size(2))
    for elements in (1024, 32 * 1024, 512 * 1024):
        with forked(partial(all_reduces, native.Ranks(memory, 1, 2), elements)):
            seconds = all_reduces(native.Ranks(memory, 0, 2), elements)
        print(f"all-reduce of {elements * 4} bytes between two processes: {seconds * 1e6:.2f} us")
    driver = native.Ranks(memory, -1, 2)
    with (
        forked(lambda: echo(native.Ranks(memory, 0, 2))),
        forked(lambda: echo(native.Ranks(memory, 1, 2))),
    ):
        print("from the pickling of a schedule of 16 rows to its unpickling in two processes:")
        schedules(driver)


@contextmanager
def forked(run: Callable[[], object]) -> Iterator[None]:
    """Run a function in a child process while the body of the ``with`` statement runs."""
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    yield
    os.waitpid(child, 0)


def all_reduces(ranks: Any, elements: int) -> float:
    """Return the seconds of an all-reduce, of which many are recorded as one step."""
    backend = CpuBackend(threads=1)
    comm = connect(backend, ranks)
    x = backend.tensor(np.zeros((1, elements), np.float32))
    count = max(REPEATS * 1024 // elements // 100, 10)

    def run() -> None:
        for _ in range(count):
            comm.all_reduce(x)
        backend.to_host(comm.all_reduce(backend.tensor(np.zeros((1, 1), np.float32))))

    run()
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) / (count + 1))
    return min(times)


def echo(ranks: Any) -> None:
    """Take schedules, and write the time at which each has come into the next result, until an empty message comes."""
    ages = []
    while message := ranks.receive(-1):
        sent, _ = pickle.loads(message)
        ages.append(time.perf_counter() - sent)
        if ranks.rank == 0:
            ranks.send(b"next")
    print(f"rank {ranks.rank}: median {statistics.median(ages) * 1e6:.1f} us", flush=True)


def schedules(driver: Any) -> None:
    """Send schedules of 16 rows, each once the one before has come."""
    schedule = Schedule(
        slots=list(range(16)),
        starts=[100] * 16,
        counts=[1] * 16,
        samples=[1] * 16,
        num_tokens=16,
        num_sampled=16,
    )
    for _ in range(2000):
        driver.send(pickle.dumps((time.perf_counter(), schedule), pickle.HIGHEST_PROTOCOL))
        while driver.receive(1.0) is None:
            pass
    driver.send(b"")


def decode(args: argparse.Namespace) -> None:
    """Print tokens per second of one process and of several, by turns, and the ratio of their medians."""
    options: dict[str, Any] = {
        "backend": "cpu", "dtype": args.dtype, "load_format": args.load_format, "skip_tokenizer_init": True,
        "max_model_len": 512, "max_num_seqs": max(args.rows),
    }  # fmt: skip
    one = LLM(args.model, threads=args.ranks, **options)
    several = LLM(args.model, threads=1, tensor_parallel_size=args.ranks, **options)
    for rows in args.rows:
        speeds: dict[str, list[float]] = {"one process": [], "ranks": []}
        for turn in range(args.rounds + 1):
            for name, llm in (("one process", one), ("ranks", several)):
                speed = tokens_per_second(llm, rows, args.tokens)
                if turn:  # the first round warms up
                    speeds[name].append(speed)
        for name, values in speeds.items():
            print(f"{rows:3} rows, {name:12}", *(f"{value:8.2f}" for value in values), "tokens/s")
        medians = [statistics.median(values) for values in speeds.values()]
        best = [max(values) for values in speeds.values()]
        print(
            f"{rows:3} rows: {args.ranks} ranks have {medians[1] / medians[0]:.3f} of one process (median), ",
            end="",
        )
        print(f"{best[1] / best[0]:.3f} (best)")


def tokens_per_second(llm: LLM, rows: int, tokens: int) -> float:
    """Return the speed of decoding ``rows`` sequences, from the first token of the last one on."""
    engine = llm.llm_engine.engine
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for row in range(rows):
        engine.add_request(str(row), [row + 3, 5, 7, 11], params)
    engine.step()
    begin, count = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        count += sum(len(output.new_token_ids) for output in engine.step())
    return count / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
