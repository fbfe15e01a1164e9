"""Shared parts of the commands that run a model: they start the engine, give sampling defaults, and stream a
request."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllmlite.chat.sources import read_template
from vllmlite.config.arguments import add_engine_arguments
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError, VllmliteError, not_installed
from vllmlite.ranks.launcher import placement
from vllmlite.sampling_params import RequestOutputKind, SamplingParams
from vllmlite.terminal import is_terminal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Generator, Sequence

    from vllmlite.cli.parser import OptionParser
    from vllmlite.llm_engine import LLMEngine, Prompt
    from vllmlite.lora.request import LoRARequest
    from vllmlite.outputs import RequestOutput


@dataclass(slots=True)
class Session:
    """A started engine, the model's display name, and the start time in seconds."""

    engine: LLMEngine
    model_name: str
    load_seconds: float


def add_session_arguments(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add the engine's options except those in ``leave_out``, and ``--verbose``."""
    add_engine_arguments(parser, leave_out)
    parser.add_argument("-v", "--verbose", action="store_true", help="log to standard error")


def engine_config(args: argparse.Namespace, parser: OptionParser) -> EngineConfig:
    """Return the configuration from flags and ``--config``; exit with a usage error if it is invalid."""
    try:
        return EngineConfig.from_namespace(args)
    except ParameterError as e:
        parser.error(str(e))


def print_on_first_rank(config: EngineConfig) -> None:
    """Print nothing from now on if this process is another rank than 0 that a launcher has started: rank 0 prints the
    same."""
    if config.distributed_executor_backend == "external_launcher" and placement(os.environ).rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def start(config: EngineConfig, verbose: bool) -> Session:
    """Start an engine; print one line about it to standard error if that is a terminal or ``verbose``."""
    if verbose:
        logging.basicConfig(level=logging.INFO, format="vllmlite: %(message)s")
    begin = time.monotonic()
    # Spinning OpenMP threads make a step tens of times slower on a machine with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from vllmlite.llm_engine import LLMEngine  # slow import, not needed for --help

        engine = LLMEngine(config)
    except ModuleNotFoundError as e:
        if (e.name or "vllmlite").partition(".")[0] == "vllmlite":
            raise
        raise VllmliteError(f"{not_installed(str(e.name))}; 'vllmlite env' lists what is") from None
    session = Session(
        engine, config.served_model_name or config.model or "built-in model", time.monotonic() - begin
    )
    if verbose or is_terminal(sys.stderr):
        stats = engine.stats()
        print(
            f"vllmlite: {session.model_name} on {stats.backend} ({stats.device}, {stats.dtype}), "
            f"started in {session.load_seconds:.1f} s",
            file=sys.stderr,
        )
    if verbose:
        print(f"vllmlite: {engine.backend_choice}", file=sys.stderr)
    return session


def chat_prompt(
    engine: LLMEngine, messages: list[dict[str, str]], chat_template: str | None
) -> dict[str, Any]:
    """Return ``messages`` rendered with the chat template, encoded without adding special tokens again."""
    tokenizer = engine.get_tokenizer()
    text = tokenizer.apply_chat_template(messages, chat_template=chat_template)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def read_chat_template(given: str | None, parser: OptionParser) -> str | None:
    """Return the chat template in the file ``given``, or ``given`` itself if it is Jinja source or a name."""
    try:
        return read_template(given)
    except ParameterError as e:
        parser.error(str(e))


def stream(
    engine: LLMEngine,
    request_id: str,
    prompt: Prompt,
    params: SamplingParams,
    priority: int = 0,
    interrupted: Sequence[object] = (),
    adapter: LoRARequest | None = None,
) -> Generator[RequestOutput, None, None]:
    """Run one request and yield its outputs, each with the new text only.

    Closing the generator aborts the request, and so does an entry in ``interrupted``, checked before each step."""
    delta = params.clone(output_kind=RequestOutputKind.DELTA)
    engine.add_request(request_id, prompt, delta, lora_request=adapter, priority=priority)
    finished = False
    try:
        while not finished and not interrupted and engine.has_unfinished_requests():
            for output in engine.step():
                finished = output.finished
                yield output
        raise_on_error(engine, request_id)
    finally:
        if not finished:
            engine.abort_request([request_id])


def raise_on_error(engine: LLMEngine, request_id: str) -> None:
    """Raise VllmliteError if the request ended because a step failed."""
    error = engine.take_error(request_id)
    if error is not None:
        raise VllmliteError(f"request {request_id}: a step failed: {error}")


def checked_params(base: SamplingParams, options: dict[str, Any], parser: OptionParser) -> SamplingParams:
    """Return ``base`` with ``options`` applied; exit with a usage error if one is invalid."""
    try:
        return base.clone(**options)
    except ParameterError as e:
        parser.error(str(e))
