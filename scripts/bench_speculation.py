#!/usr/bin/env python3
"""Measure speculative decoding, mostly with n-gram drafts on a model of random weights: what it saves where text
repeats its prompt, what it costs where nothing repeats, and what a step that verifies drafts costs.

    PYTHONPATH=. scripts/bench_speculation.py DIR [--quantization int4] [--batches 1,8,64] [--rows edit,random,step]
        [--rounds 3] [--tokens 128] [--device cuda] [--cache 8GiB]
    PYTHONPATH=. scripts/bench_speculation.py --rows answers [--method eagle3] [--rounds 3] [--device cuda]

DIR has a config.json, for example of llama1b's shape. Times on a CPU are processor time, so that other programs disturb
them little; with and without drafts run by turns. Rows:

edit    a 600-token file is the prompt, and the output is the file with one word changed. The random model is held to
        that output by a mask of one id a token, which stands for a model that copies; the drafts know nothing of it.
random  ids are drawn from 200 at random, so that short n-grams repeat and what followed them is seldom right.
step    a step of 1 + k tokens a row against one of 1 (alone: that nothing was launched beside), by the number of rows;
        "mixed" has 0 to 3 drafts a row, "uncaptured" likewise without captured steps.
answers the built-in model answers questions, one after the other, without drafts and with those of its own head: tokens
        a step, the bonus token included, and tokens a second with drafts against those without. Needs no DIR.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import statistics
import time
from collections.abc import Sequence
from copy import copy
from typing import Any

from vllmlite import LLM, SamplingParams
from vllmlite.engine.drafts import DraftPolicy
from vllmlite.engine.engine import Engine
from vllmlite.hub import find_model
from vllmlite.runner.propose.proposer import Proposer
from vllmlite.tokenizers.tokenizer import Tokenizer

DRAFTS = 8
FILE_TOKENS = 600
QUESTIONS = (
    "What is Debian?", "What is a package?", "How do I install a package?", "What does apt do?", "What is systemd?",
    "Hello!", "Who are you?", "What is the difference between stable and unstable?", "How do I remove nginx?",
    "What does grep do?", "How do I upgrade my system?", "What is a mirror?", "Explain what a daemon is.",
    "Describe the package vim.", "How do I report a bug?", "What is Python?",
)  # fmt: skip
"""Questions of the row ``answers``."""
RANDOM_IDS = 200


class Held:
    """A grammar that allows one text."""

    def __init__(self, text: Sequence[int], vocab_size: int) -> None:
        self._text = text
        self._words = -(-vocab_size // 32)
        self._place = 0

    def restart(self) -> None:
        """Go back to the start of the text."""
        self._place = 0

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        """Allow the next id, and those after the drafts that are right."""
        masks: list[bytes | None] = []
        for index, token_id in enumerate(self._text[self._place : self._place + len(drafts) + 1]):
            bits = bytearray(4 * self._words)
            bits[token_id >> 3] = 1 << (token_id & 7)
            masks.append(bytes(bits))
            if index < len(drafts) and drafts[index] != token_id:
                break
        return masks

    def accept(self, _token_id: int) -> bool:
        """Advance by an id."""
        self._place += 1
        return self._place == len(self._text)

    def fork(self) -> Held:
        """Return another one at the same place."""
        return copy(self)


def clock(engine: Engine) -> float:
    """Return the time in seconds."""
    return time.process_time() if engine.stats.device == "cpu" else time.perf_counter()


def run(engine: Engine) -> tuple[int, float]:
    """Run all requests to the end; return the steps and the seconds of those that have no prompt in them."""
    steps, seconds = 0, 0.0
    while engine.has_unfinished_requests():
        decodes = all(request.output_token_ids for request in engine.scheduler.requests())
        begin = clock(engine)
        engine.step()
        if decodes:
            steps += 1
            seconds += clock(engine) - begin
    return steps, seconds


def edited_file() -> tuple[list[int], list[int]]:
    """Return a prompt with a file of source text, and the file with one word changed."""
    tokenizer = Tokenizer(find_model(None))
    lines = inspect.getsource(Engine)[:20000]
    file = tokenizer.decode(tokenizer.encode(lines, False)[:FILE_TOKENS], False)
    changed = file.replace("steps_in_flight", "depth", 1)
    asked = f"{file}\n\nThe same file, in which the first steps_in_flight is called depth:\n\n"
    return tokenizer.encode(asked, False), tokenizer.encode(changed, False)


def edit(engine: Engine, policies: Sequence[DraftPolicy], rounds: int) -> dict[str, float]:
    """Measure the row ``edit``."""
    prompt, output = edited_file()
    tokens: list[float] = []
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for times, engine.scheduler.drafting in zip(seconds, policies, strict=True):
            params = SamplingParams(temperature=0, max_tokens=len(output), detokenize=False)
            engine.add_request("r", prompt, params, grammar=Held(output, engine.bounds.vocab_size))
            steps, took = run(engine)
            times.append(took)
            if times is seconds[1]:
                tokens.append((len(output) - 1) / steps)
    plain, drafted = map(statistics.median, seconds)
    return {"tokens_per_step": round(statistics.median(tokens), 2), "speedup": round(plain / drafted, 2)}


def repeats_nothing(
    engine: Engine, policies: Sequence[DraftPolicy], batch: int, tokens: int, rounds: int
) -> dict[str, float]:
    """Measure the row ``random``."""
    draw = random.Random(0)
    allowed = draw.sample(range(engine.bounds.vocab_size), RANDOM_IDS)
    seconds: list[list[float]] = [[], []]
    drafted = engine.stats.num_draft_tokens
    for number in range(rounds):
        for times, engine.scheduler.drafting in zip(seconds, policies, strict=True):
            for row in range(batch):
                params = SamplingParams(
                    temperature=1, seed=number * batch + row, max_tokens=tokens, ignore_eos=True,
                    detokenize=False, logit_bias=dict.fromkeys(allowed, 100.0),
                )  # fmt: skip
                engine.add_request(str(row), draw.choices(allowed, k=64), params)
            times.append(run(engine)[1])
    plain, with_drafts = map(min, seconds)
    drafted = engine.stats.num_draft_tokens - drafted
    return {
        "slowdown": round(with_drafts / plain, 3),
        "drafts_per_token": round(drafted / (rounds * batch * tokens), 3),
    }


def answers(method: str, device: str, rounds: int) -> dict[str, float]:
    """Measure the row ``answers``."""
    options: dict[str, Any] = {"max_model_len": 512, "device": device, "enable_prefix_caching": False}
    plain, drafting = LLM(**options), LLM(**options, speculative_config={"method": method})
    seconds: dict[LLM, list[float]] = {plain: [], drafting: []}
    steps = dict.fromkeys(seconds, 0)
    params = SamplingParams(temperature=0, max_tokens=256)
    for _ in range(rounds):
        texts: dict[LLM, list[Sequence[int]]] = {plain: [], drafting: []}
        for llm, times in seconds.items():
            engine: Any = llm.llm_engine.engine
            begin, before = clock(engine), engine.stats.num_steps
            for question in QUESTIONS:
                asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                (output,) = llm.generate([asked], params, use_tqdm=False)
                texts[llm].append(output.outputs[0].token_ids)
            times.append(clock(engine) - begin)
            steps[llm] += engine.stats.num_steps - before
        assert texts[plain] == texts[drafting], "drafts changed the text"
    tokens = rounds * sum(map(len, texts[plain]))
    stats: Any = drafting.llm_engine.engine.stats
    without, with_drafts = (statistics.median(times) for times in seconds.values())
    return {
        "tokens_per_step": round(tokens / steps[drafting], 2),
        "tokens_per_verification": round(1 + stats.num_accepted_tokens / max(stats.num_drafts, 1), 2),
        "drafts_per_verification": round(stats.num_draft_tokens / max(stats.num_drafts, 1), 2),
        "plain_tokens_per_s": round(tokens / rounds / without, 1),
        "speedup": round(without / with_drafts, 2),
    }


class Wrong(Proposer):
    """A proposer of as many random ids as are wanted; or of fewer, if it is ``mixed``."""

    mixed = False

    def admit(self, slot: int, token_ids: list[int], num_prompt: int) -> None:
        """Ignore the sequence."""

    def launch(self, slots: Sequence[int]) -> None:
        """Prepare nothing."""

    def collect(self, _handle: None, _ids: Sequence[list[int]], wanted: Sequence[int]) -> list[list[int]]:
        """Return small ids."""
        counts = [random.randint(0, count) if self.mixed else count for count in wanted]
        return [[random.randrange(3, 200) for _ in range(count)] for count in counts]


class Fixed(DraftPolicy):
    """A policy that always asks for :attr:`count` drafts."""

    count = DRAFTS

    def wanted(self, _acceptance: Any, _rows: int) -> int:
        """Return the number."""
        return self.count


def step(engine: Any, batch: int, rounds: int) -> dict[str, float]:
    """Measure the row ``step``."""
    proposer = engine.runner.proposer = Wrong()
    for row in range(batch):
        params = SamplingParams(temperature=0, max_tokens=1400, ignore_eos=True, detokenize=False)
        engine.add_request(str(row), [row + 3] * 512, params)
    policy = engine.scheduler.drafting = Fixed(DRAFTS)
    while any(not request.output_token_ids for request in engine.scheduler.requests()):
        engine.step()
    depth, record, find = (
        engine._steps_in_flight,
        engine.runner.graphs.record_if_frequent,
        engine.runner.graphs.find,
    )
    kinds = {"plain": 0, "alone": 0, "k=3": 3, "k=7": 7, "mixed": 3, "uncaptured": 3}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, taken in times.items():
            policy.count = kinds[name]
            engine._steps_in_flight = 1 if name == "alone" else depth
            proposer.mixed = name in ("mixed", "uncaptured")
            if name == "uncaptured":
                engine.runner.graphs.record_if_frequent = lambda batch: None
                engine.runner.graphs.find = lambda batch: find(batch) if batch.max_query_len == 1 else None
            for _ in range(20):  # as many steps as it takes to capture one of a kind
                engine.step()
            for _ in range(8):
                begin = clock(engine)
                engine.step()
                taken.append(clock(engine) - begin)
            engine.runner.graphs.record_if_frequent, engine.runner.graphs.find = record, find
    for row in range(batch):
        engine.finish(str(row))
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "plain_ms": round(1000 * middle["plain"], 3),
        **{name: round(taken / middle["plain"], 3) for name, taken in middle.items() if name != "plain"},
    }


def main() -> None:
    """Measure the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="DIR")
    parser.add_argument("--method", default="eagle3", help="method of the row answers")
    parser.add_argument("--quantization")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", default="1GiB", help="memory of the key/value cache")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--rows", default="edit,random,step")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each figure")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each request of the row random")
    args = parser.parse_args()
    rows, batches = args.rows.split(","), [int(batch) for batch in args.batches.split(",")]
    result: dict[str, Any] = {}
    if "answers" in rows:
        result["answers"] = answers(args.method, args.device, args.rounds)
        print("answers", result["answers"], flush=True)
    if rows == ["answers"]:
        print(json.dumps(result))
        return
    if args.model is None:
        parser.error("rows other than answers need DIR")
    llm = LLM(
        args.model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
        max_num_seqs=64, kv_cache_memory_bytes=args.cache, device=args.device, quantization=args.quantization,
        enable_prefix_caching=False,
        speculative_config={"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_min": 2,
                            "prompt_lookup_max": 5},
    )  # fmt: skip
    engine: Any = llm.llm_engine.engine
    policies = [DraftPolicy(0), engine.scheduler.drafting]
    if "edit" in rows:
        result["edit"] = edit(engine, policies, args.rounds)
        print("edit", result["edit"], flush=True)
    for batch in batches:
        if "random" in rows:
            result[f"random-{batch}"] = repeats_nothing(engine, policies, batch, args.tokens, args.rounds)
            print(f"random-{batch}", result[f"random-{batch}"], flush=True)
    for batch in batches:
        if "step" in rows:
            result[f"step-{batch}"] = step(engine, batch, args.rounds)
            print(f"step-{batch}", result[f"step-{batch}"], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
