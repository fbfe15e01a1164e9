"""``vllmlite bench``: throughput and latency of this engine on random prompts."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllmlite.cli import report, session
from vllmlite.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllmlite.cli.parser import OptionParser
    from vllmlite.llm_engine import LLMEngine
    from vllmlite.outputs import RequestOutput

ABOUT = """\
Prompts are random token ids; generation is greedy and does not stop at the end of
text. A table goes to standard error; the last line of standard output is JSON.

  vllmlite bench                                      throughput: all prompts at once
  vllmlite bench --batch 1                            latency: one prompt after another
  vllmlite bench --input-len 100:1024 --output-len 100:1024 --num-prompts 256
  vllmlite bench serve --help                         benchmark a server"""


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    work = parser.add_argument_group("benchmark options", ABOUT)
    for flag, what in (("--input-len", "tokens per prompt"), ("--output-len", "tokens to generate")):
        work.add_argument(
            flag,
            type=length_range,
            default=(128, 128),
            metavar="N",
            help=f"{what}, or FROM:TO (default: 128)",
        )
    work.add_argument(
        "--prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens of a common prefix, added to every prompt (default: 0)",
    )
    work.add_argument(
        "--num-prompts", type=int, default=8, metavar="N", help="number of prompts (default: 8)"
    )
    work.add_argument("--batch", type=int, metavar="N", help="prompts in the engine at a time; default: all")
    work.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="rounds to measure, each with new prompts; the median is reported (default: 1)",
    )
    work.add_argument("--no-warmup", action="store_true", help="do not run a short unmeasured round first")
    session.add_session_arguments(parser)


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Run the rounds, print the report and return the exit status."""
    for name, low in (("num_prompts", 1), ("batch", 1), ("repeat", 1), ("prefix_len", 0)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')}: must be at least {low}")
    config = session.engine_config(args, parser)
    if config.skip_tokenizer_init:
        parser.error("prompts are drawn from the tokenizer's vocabulary: leave out --skip-tokenizer-init")
    started = session.start(config, args.verbose)
    engine = started.engine
    longest = args.prefix_len + args.input_len[1] + args.output_len[1]
    if longest > engine.max_model_len:
        parser.error(
            f"prompt and output of {longest} tokens exceed the context length of {engine.max_model_len}"
        )
    draw = random.Random(config.seed)
    batch = args.batch or args.num_prompts
    if not args.no_warmup:
        warmup = [Work(draw_ids(draw, engine, 16), 4) for _ in range(min(batch, args.num_prompts))]
        measure(started, warmup, batch)
    rounds = [
        measure(started, draw_works(draw, engine, args), batch).statistics() for _ in range(args.repeat)
    ]
    median = sorted(rounds, key=lambda r: r["seconds"])[(len(rounds) - 1) // 2]
    names = ("input_len", "output_len", "prefix_len", "num_prompts", "repeat")
    result = {"benchmark": {**{name: vars(args)[name] for name in names}, "batch": batch}, **median}
    print(_table(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


@dataclass(slots=True)
class Work:
    """A prompt and the number of tokens to generate after it."""

    prompt: list[int]
    num_tokens: int


class Round(report.Run):
    """The results of one round, whose steps are timed outside the engine, as a caller sees them."""

    def __init__(self, started: session.Session) -> None:
        """Start the clock."""
        super().__init__(started)
        self.seconds = 0.0
        self.inter_token: list[float] = []
        self.latency: list[float] = []
        self.in_waves = False

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of :class:`report.Run` with the round's throughput and latencies.

        Prefill and decode speed are None if prompts waited for others, because the phases then overlap."""
        both = self.num_prompt_tokens + self.num_generation_tokens
        phases = (
            {"prefill_tokens_per_second": None, "decode_tokens_per_second": None} if self.in_waves else {}
        )
        return {
            **super().statistics(),
            **phases,
            "seconds": round(self.seconds, 4),
            "requests_per_second": report.rate(self.num_requests, self.seconds),
            "output_tokens_per_second": report.rate(self.num_generation_tokens, self.seconds),
            "total_tokens_per_second": report.rate(both, self.seconds),
            "itl_seconds": report.quantiles(self.inter_token),
            "latency_seconds": report.quantiles(self.latency),
        }


def measure(started: session.Session, works: Sequence[Work], batch: int) -> Round:
    """Run all ``works``, keeping ``batch`` requests in the engine at a time, and return the round."""
    engine = started.engine
    waiting = iter(enumerate(works))
    last: dict[str, float] = {}
    counts: dict[str, int] = {}
    result = Round(started)
    result.in_waves = batch < len(works)

    def add_next() -> None:
        for index, work in waiting:
            params = SamplingParams(
                temperature=0.0,
                max_tokens=work.num_tokens,
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(str(index), {"prompt_token_ids": work.prompt}, params)
            return

    def take(output: RequestOutput, now: float) -> None:
        name, new = output.request_id, len(output.outputs[0].token_ids)
        if name in last and new:
            result.inter_token.extend([(now - last[name]) / new] * new)
        last[name] = now
        counts[name] = counts.get(name, 0) + new
        if output.finished:
            session.raise_on_error(engine, name)
            result.add(output, counts[name])
            if output.metrics is not None:
                result.latency.append(now - output.metrics.arrival_time)
            add_next()

    for _ in range(batch):
        add_next()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.monotonic()
        for output in outputs:
            take(output, now)
    result.seconds = time.monotonic() - result.begin
    return result


def draw_works(draw: random.Random, engine: LLMEngine, args: argparse.Namespace) -> list[Work]:
    """Return the prompts of one round; they have a common prefix of ``--prefix-len`` tokens."""
    prefix = draw_ids(draw, engine, args.prefix_len)
    lengths = [
        (draw.randint(*args.input_len), draw.randint(*args.output_len)) for _ in range(args.num_prompts)
    ]
    return [Work(prefix + draw_ids(draw, engine, length), count) for length, count in lengths]


def draw_ids(draw: random.Random, engine: LLMEngine, count: int) -> list[int]:
    """Return ``count`` random token ids."""
    vocab_size = engine.get_tokenizer().vocab_size
    return [draw.randrange(vocab_size) for _ in range(count)]


def length_range(text: str) -> tuple[int, int]:
    """Parse ``N`` as (N, N), and ``FROM:TO`` as (FROM, TO)."""
    low, _, high = text.partition(":")
    try:
        pair = int(low), int(high or low)
    except ValueError:
        pair = 0, 0
    if not 1 <= pair[0] <= pair[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a positive length nor a range such as 100:1024"
        )
    return pair


def _table(result: dict[str, Any]) -> str:
    def rounded(name: str) -> str:
        return "-" if result[name] is None else f"{result[name]:.1f}"

    return (
        f"{report.table(result)}\n"
        f"{'throughput':<13} {rounded('requests_per_second')} requests/s, {rounded('output_tokens_per_second')} "
        f"output tokens/s, {rounded('total_tokens_per_second')} tokens/s in total\n"
        f"{'ITL':<13} {report.milliseconds(result['itl_seconds'])}\n"
        f"{'latency':<13} {report.milliseconds(result['latency_seconds'])}"
    )
