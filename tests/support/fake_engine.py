"""A fake engine for tests of the command line, which loads no model and continues every prompt with numbered words."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Mapping
from typing import Any

import pytest

from vllmlite import cli
from vllmlite.config.engine_config import EngineConfig
from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput, EngineStats, Logprob, RequestMetrics, RequestOutput
from vllmlite.sampling_params import RequestOutputKind, SamplingParams

CONTEXT = 1000


class FakeTokenizer:
    vocab_size = 100
    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(f"<{i}>" for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], chat_template: str | None = None) -> str:
        return (chat_template or "") + "".join(f"{m['role']}: {m['content']}\n" for m in messages)


class FakeEngine:
    """Generates a token per step for each request: `` w0``, `` w1``, …; the second completion has `` W0``."""

    made: list[FakeEngine] = []  # noqa: RUF012
    interrupt_at: int | None = None
    words: list[str] | None = None
    """The words that it generates instead of these."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.tokenizer = None if config.skip_tokenizer_init else FakeTokenizer()
        self.default_sampling_params = SamplingParams(temperature=0.7)
        self.max_model_len = CONTEXT
        self.backend_choice = "fake on cpu; torch declined: not needed"
        self.requests: dict[str, tuple[RequestOutput, SamplingParams, int]] = {}
        self.seen: list[tuple[Any, SamplingParams, int]] = []
        self.aborted: list[str] = []
        self.num_steps = 0
        self.fails = config.model == "fails"
        FakeEngine.made.append(self)

    def get_tokenizer(self) -> FakeTokenizer:
        assert self.tokenizer is not None
        return self.tokenizer

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: object = None,
        priority: int = 0,
    ) -> None:
        assert lora_request is None
        text = (
            prompt.get("prompt")
            if isinstance(prompt, Mapping)
            else prompt
            if isinstance(prompt, str)
            else None
        )
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None if text else prompt
        ids = self.get_tokenizer().encode(text or "") if ids is None else ids
        if len(ids) >= CONTEXT:
            raise ParameterError("prompt", f"{len(ids)} tokens", f"must be shorter than {CONTEXT}")
        self.seen.append((prompt, params, priority))
        outputs = [CompletionOutput(i, "", []) for i in range(params.n)]
        metrics = RequestMetrics(time.monotonic(), time.monotonic())
        self.requests[request_id] = (
            RequestOutput(request_id, text, ids, outputs, False, metrics=metrics),
            params,
            0,
        )

    def step(self) -> list[RequestOutput]:
        self.num_steps += 1
        if self.num_steps == FakeEngine.interrupt_at:
            signal.raise_signal(signal.SIGINT)
        given = []
        for request_id, (output, params, count) in list(self.requests.items()):
            delta = params.output_kind is RequestOutputKind.DELTA
            count += 1
            output.finished = count == params.max_tokens or self.fails
            assert output.metrics is not None
            output.metrics.first_token_time = output.metrics.first_token_time or time.monotonic()
            for completion in output.outputs:
                word = (
                    f" {'wW'[completion.index]}{count - 1}" if self.words is None else self.words[count - 1]
                )
                completion.text = word if delta else completion.text + word
                completion.token_ids = [count] if delta else [*completion.token_ids, count]
                if params.logprobs is not None:
                    completion.logprobs = [{i: Logprob(-1.0, 1, "w")} for i in completion.token_ids]
                if output.finished:
                    completion.finish_reason = "error" if self.fails else "length"
                    output.metrics.finished_time = time.monotonic()
            self.requests[request_id] = (output, params, count)
            if output.finished:
                del self.requests[request_id]
            if output.finished or delta:
                given.append(output)
        return given

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            del self.requests[request_id]

    def take_error(self, request_id: str) -> str | None:
        return "RuntimeError: no more" if self.fails else None

    def stats(self) -> EngineStats:
        return EngineStats(
            num_blocks=64, block_size=16, num_steps=self.num_steps, backend="fake", device="cpu"
        )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the command line use :class:`FakeEngine`, with a terminal as its standard input."""
    import vllmlite.llm_engine

    FakeEngine.made.clear()
    monkeypatch.setattr(FakeEngine, "interrupt_at", None)
    monkeypatch.setattr(vllmlite.llm_engine, "LLMEngine", FakeEngine)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def run(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> tuple[str, str]:
    """Run a command line, check that it exits with ``status``, and return its standard output and standard error."""
    assert cli.main(argv) == status
    out, err = capsys.readouterr()
    return out, err
