"""Send a load of streamed requests to an OpenAI-compatible server, and time each piece of the answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vllmlite.cli.chat_remote import error_message, error_text
from vllmlite.errors import ParameterError, VllmliteError

WORDS = (
    "the of and to in is that it for was on are as with they be at one have this from or had by but some what there we "
    "can out other were all your when up use word how said an each she which do their time if will way about many then "
    "them would write like so these her long make thing see him two has look more day could go come did my sound no "
).split()
"""Words that are one token each in nearly every tokenizer."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server to measure, with the URL and key to reach it."""

    base_url: str
    uds: str | None
    model: str | None
    api_key: str | None
    chat: bool
    timeout: float


@dataclass(slots=True)
class Load:
    """Request bodies (without ``model``) and the time in seconds at which each is sent."""

    requests: list[dict[str, Any]]
    times: list[float]
    max_concurrency: int | None
    warmups: list[dict[str, Any]]
    """Request bodies sent first, all at once or ``max_concurrency`` at a time, and not measured."""


@dataclass(slots=True)
class Timing:
    """The timing of one request, in seconds, and its error if it failed."""

    ttft: float = 0.0
    latency: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Times between successive pieces; a piece has one or more tokens."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first; 0 if there is at most one."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def plan(args: argparse.Namespace) -> Load:
    """Return the load that the command line describes. Raises ParameterError."""
    draw = random.Random(args.seed)
    prefix = _words(draw, args.random_prefix_len)
    texts = _from_file(args.dataset_path, draw) if args.dataset_path is not None else None
    bodies = []
    for _ in range(args.num_warmups + args.num_prompts):
        text = prefix + _words(draw, draw.randint(*args.random_input_len)) if texts is None else next(texts)
        body: dict[str, Any] = (
            {"messages": [{"role": "user", "content": text}]} if args.chat else {"prompt": text}
        )
        body |= {"max_tokens": draw.randint(*args.random_output_len), "temperature": args.temperature}
        if args.ignore_eos:
            body["ignore_eos"] = True
        bodies.append({**body, "stream": True, "stream_options": {"include_usage": True}, **args.extra_body})
    warmups, requests = bodies[: args.num_warmups], bodies[args.num_warmups :]
    times, now = [], 0.0
    for _ in requests:
        times.append(now)
        if args.request_rate is not None:
            now += draw.gammavariate(args.burstiness, 1 / (args.request_rate * args.burstiness))
    return Load(requests, times, args.max_concurrency, warmups)


async def measure(target: Target, load: Load, done: Callable[[], None]) -> tuple[str, list[Timing], float]:
    """Send the load; return the model's name, one timing per request, and the total seconds. Raises VllmliteError."""
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    transport = httpx.AsyncHTTPTransport(uds=target.uds, limits=httpx.Limits(max_connections=None))
    url = target.base_url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(
        base_url=url, headers=headers, transport=transport, timeout=httpx.Timeout(target.timeout)
    ) as client:
        model = target.model or await _first_model(client, url)
        path = "/v1/chat/completions" if target.chat else "/v1/completions"
        slots = asyncio.Semaphore(load.max_concurrency or max(len(load.requests), len(load.warmups)))

        async def send(body: dict[str, Any]) -> Timing:
            async with slots:
                return await _request(client, path, {"model": model, **body})

        await asyncio.gather(*map(send, load.warmups))
        begin = time.perf_counter()

        async def one(body: dict[str, Any], at: float) -> Timing:
            await asyncio.sleep(begin + at - time.perf_counter())
            timing = await send(body)
            done()
            return timing

        work = [one(body, at) for body, at in zip(load.requests, load.times, strict=True)]
        timings = await asyncio.gather(*work)
        return model, list(timings), time.perf_counter() - begin


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, OSError) as error:
        raise VllmliteError(f"{url}/v1/models: {error}") from None
    except (ValueError, LookupError, TypeError):
        raise VllmliteError(f"{url}/v1/models: names no model: give --model") from None


async def _request(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Timing:
    timing = Timing()
    begin = last = end = time.perf_counter()
    pieces = 0
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                timing.error = error_text(answer)
                return timing
            buffer = b""
            async for data in answer.aiter_raw():
                now = time.perf_counter()
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        timing.error = error_message(chunk["error"])
                        return timing
                    usage = chunk.get("usage")
                    if usage:
                        timing.prompt_tokens = usage.get("prompt_tokens") or 0
                        timing.output_tokens = usage.get("completion_tokens") or 0
                    if chunk["choices"]:
                        end = now  # also for a final piece with only a finish reason: it may stand for tokens
                    if any(brings_tokens(choice) for choice in chunk["choices"]):
                        pieces += 1
                        if pieces == 1:
                            timing.ttft = now - begin
                        else:
                            timing.gaps.append(now - last)
                        last = now
    except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    if not pieces:
        timing.error = timing.error or "the answer has no tokens"
    timing.latency = end - begin
    timing.output_tokens = timing.output_tokens or pieces
    return timing


def brings_tokens(choice: dict[str, Any]) -> bool:
    """Return whether a streamed choice stands for tokens, even if their text is still empty.

    A chat's first piece, which only has the role, and a final piece with only a finish reason do not count."""
    delta = choice.get("delta") or {}
    text = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
    return any(text) or not ("role" in delta or choice.get("finish_reason"))


def _words(draw: random.Random, count: int) -> str:
    return "".join(draw.choice(WORDS) + " " for _ in range(count))


def _from_file(path: str, draw: random.Random) -> Iterator[str]:
    """Return an endless iterator over the prompts of a file: ShareGPT's first turns, or JSON lines with ``prompt``."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
        entries = (
            json.loads(content)
            if content.lstrip().startswith("[")
            else map(json.loads, content.strip().split("\n"))
        )
        texts = [
            entry["prompt"] if "prompt" in entry else entry["conversations"][0]["value"]
            for entry in entries
            if "prompt" in entry or entry.get("conversations")
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ParameterError("dataset_path", path, f"cannot be used: {error}") from None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ParameterError("dataset_path", path, "has no prompts")
    draw.shuffle(texts)

    def over_and_over() -> Iterator[str]:
        while True:
            yield from texts

    return over_and_over()
