"""``vllmlite bench serve``: throughput and latency of a running server with the OpenAI API."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllmlite.cli import report
from vllmlite.cli.bench import length_range
from vllmlite.cli.screen import visible
from vllmlite.errors import VllmliteError, not_installed

if TYPE_CHECKING:
    from vllmlite.cli.bench_load import Load, Timing
    from vllmlite.cli.parser import OptionParser

ABOUT = """\
Requests are streamed and timed as a client sees them. A table goes to standard
error; the last line of standard output is a JSON object.

  vllmlite bench serve                                all at once, on port 8000
  vllmlite bench serve --max-concurrency 16           sixteen at a time
  vllmlite bench serve --request-rate 4 --plot x.svg  four a second, at random
  vllmlite bench serve --dataset-path talk.json       ShareGPT's conversations
  vllmlite bench serve --goodput ttft:300 tpot:50     requests within latency limits"""

GOODPUT = {"ttft": "ttft", "tpot": "tpot", "e2el": "latency"}
"""Latencies that ``--goodput`` can limit: vLLM's name of each, and the attribute of :class:`Timing`."""


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    server = parser.add_argument_group("server options", ABOUT)
    server.add_argument(
        "--base-url", metavar="URL", default="http://127.0.0.1:8000", help="the server (default: %(default)s)"
    )
    server.add_argument("--uds", metavar="PATH", help="Unix socket that the server listens on")
    server.add_argument("--model", metavar="NAME", help="name of the model; default: the server's first")
    server.add_argument("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY")
    server.add_argument("--chat", action="store_true", help="use /v1/chat/completions, not /v1/completions")
    server.add_argument(
        "--timeout", type=float, metavar="S", default=600.0, help="seconds a request may take (default: 600)"
    )
    work = parser.add_argument_group("load options")
    work.add_argument(
        "--num-prompts", type=_positive, default=100, metavar="N", help="requests (default: 100)"
    )
    work.add_argument(
        "--num-warmups",
        type=_whole,
        default=0,
        metavar="N",
        help="unmeasured requests sent first (default: 0)",
    )
    work.add_argument(
        "--request-rate",
        type=float,
        metavar="R",
        help="requests a second, at random times; default: all at once",
    )
    work.add_argument(
        "--burstiness", type=float, default=1.0, metavar="X",
        help="1: a Poisson process; below, burstier; above, more even (default: 1)",
    )  # fmt: skip
    work.add_argument(
        "--max-concurrency", type=_positive, metavar="N", help="maximum number of concurrent requests"
    )
    work.add_argument("--dataset-path", metavar="FILE", help="ShareGPT's JSON, or JSON lines with prompt")
    work.add_argument(
        "--random-input-len", "--input-len", type=length_range, default=(128, 128), metavar="N",
        help="words of a random prompt, about one token each, or FROM:TO (default: 128)",
    )  # fmt: skip
    work.add_argument(
        "--random-output-len", "--output-len", type=length_range, default=(128, 128), metavar="N",
        help="tokens to generate, or FROM:TO (default: 128)",
    )  # fmt: skip
    work.add_argument(
        "--random-prefix-len",
        type=_whole,
        default=0,
        metavar="N",
        help="words of a common prefix, added to every random prompt (default: 0)",
    )
    work.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="generate past the end of text, if the server supports it (default: on)",
    )  # fmt: skip
    work.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default: 0, greedy")
    work.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of random prompts and times (default: 0)"
    )
    work.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON",
        help='further fields of each request: \'{"top_p": 0.9, "cache_prompt": false}\'',
    )  # fmt: skip
    output = parser.add_argument_group("output options")
    output.add_argument(
        "--metric-percentiles", type=_percentiles, default=(50.0, 90.0, 99.0), metavar="P,...",
        help="percentiles of every latency (default: 50,90,99)",
    )  # fmt: skip
    output.add_argument(
        "--goodput", nargs="+", type=_objective, default=[], metavar="NAME:MS",
        help="count the requests whose ttft, tpot and e2el are at most the given milliseconds",
    )  # fmt: skip
    output.add_argument(
        "--save-result", metavar="FILE", help="write the result with every request's timing as JSON"
    )
    output.add_argument("--plot", metavar="FILE", help="draw the distributions of latencies as SVG")


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Send the load and print the report; return 1 if any request failed."""
    for name, value in (
        ("request_rate", args.request_rate),
        ("burstiness", args.burstiness),
        ("timeout", args.timeout),
    ):
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')}: must be greater than 0")
    try:
        from vllmlite.cli import bench_load
    except ModuleNotFoundError as error:
        raise VllmliteError(not_installed(str(error.name))) from None
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    target = bench_load.Target(args.base_url, args.uds, args.model, key, args.chat, args.timeout)
    load = bench_load.plan(args)
    progress = report.Progress(len(load.requests), beside_output=False)
    model, timings, seconds = asyncio.run(bench_load.measure(target, load, progress.advance))
    result = statistics(args, model, load, timings, seconds)
    for path, text in _files(args, result, timings):
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise VllmliteError(f"{path}: {error.strerror}") from None
    print(table(result), file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def statistics(
    args: argparse.Namespace, model: str, load: Load, timings: list[Timing], seconds: float
) -> dict[str, Any]:
    """Return the results as a JSON-serialisable dict, with the names of vLLM's ``bench serve``."""
    good = [timing for timing in timings if timing.error is None]
    first = next((timing.error for timing in timings if timing.error is not None), None)
    prompt_tokens, output_tokens = sum(t.prompt_tokens for t in good), sum(t.output_tokens for t in good)
    fast = [t for t in good if all(getattr(t, GOODPUT[name]) <= most for name, most in args.goodput)]

    times = {
        "ttft": [t.ttft for t in good],
        "tpot": [t.tpot for t in good if t.output_tokens > 1],
        "itl": [gap for t in good for gap in t.gaps],
        "e2el": [t.latency for t in good],
    }
    return {
        "benchmark": {
            "model": model,
            "chat": args.chat,
            "num_prompts": len(load.requests),
            "num_warmups": args.num_warmups,
            "request_rate": args.request_rate,
            "burstiness": args.burstiness,
            "max_concurrency": args.max_concurrency,
            "dataset": args.dataset_path or "random",
            "goodput": {name: round(1000 * most, 6) for name, most in args.goodput},
        },
        "duration": round(seconds, 4),
        "completed": len(good),
        "failed": len(timings) - len(good),
        "first_error": first,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": report.rate(len(good), seconds),
        "request_goodput": report.rate(len(fast), seconds) or 0.0 if args.goodput else None,
        "output_throughput": report.rate(output_tokens, seconds),
        "total_token_throughput": report.rate(prompt_tokens + output_tokens, seconds),
    } | {
        f"{'median' if statistic == 'p50' else statistic}_{name}_ms": round(1000 * value, 3)
        for name, values in times.items()
        for statistic, value in report.quantiles(values, (50, *args.metric_percentiles)).items()
    }


def table(result: dict[str, Any]) -> str:
    """Return ``result`` as a table for people."""

    def shown(name: str) -> str:
        return "-" if result[name] is None else f"{result[name]:.1f}"

    def times(name: str) -> str:
        found = {key: value for key, value in result.items() if key.endswith(f"_{name}_ms")}
        return ", ".join(f"{key.split('_')[0]} {value:.1f} ms" for key, value in found.items()) or "-"

    rows = {
        "requests": f"{result['completed']} in {result['duration']:.2f} s, {result['failed']} failed"
        + (f" ({visible(result['first_error'])})" if result["first_error"] else ""),
        "tokens": f"{result['total_input_tokens']} in, {result['total_output_tokens']} out",
        "throughput": f"{shown('request_throughput')} requests/s, {shown('output_throughput')} "
        f"output tokens/s, {shown('total_token_throughput')} tokens/s in total",
        "goodput": f"{shown('request_goodput')} requests/s within "
        + ", ".join(f"{name} {most:g} ms" for name, most in result["benchmark"]["goodput"].items()),
        "TTFT": times("ttft"),
        "TPOT": times("tpot"),
        "ITL": times("itl"),
        "E2E": times("e2el"),
    }
    if not result["benchmark"]["goodput"]:
        del rows["goodput"]
    return "\n".join(f"{name:<13} {value}" for name, value in rows.items())


def _files(args: argparse.Namespace, result: dict[str, Any], timings: list[Timing]) -> list[tuple[str, str]]:
    files = []
    if args.save_result is not None:
        whole = {**result, "requests": [asdict(timing) for timing in timings]}
        files.append((args.save_result, json.dumps(whole) + "\n"))
    if args.plot is not None:
        from vllmlite.cli.bench_plot import distributions

        good = [timing for timing in timings if timing.error is None]
        panels = {
            "time to first token (TTFT)": [timing.ttft for timing in good],
            "time between tokens (ITL)": [gap for timing in good for gap in timing.gaps],
            "whole request (E2E)": [timing.latency for timing in good],
        }
        rate = result["output_throughput"] or 0
        about = f"{result['benchmark']['model']}: {result['completed']} requests, {rate:.0f} tokens/s"
        files.append((args.plot, distributions(about, panels)))
    return files


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of percentiles such as 50,90,99.9")
    return values


def _objective(text: str) -> tuple[str, float]:
    """Parse ``NAME:MS`` into a name in :data:`GOODPUT` and a limit in seconds."""
    name, _, limit = text.partition(":")
    try:
        seconds = float(limit) / 1000
    except ValueError:
        seconds = 0.0
    if name not in GOODPUT or not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(GOODPUT)} with milliseconds, such as ttft:300"
        )
    return name, seconds
