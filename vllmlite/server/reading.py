"""Read the outputs of a sequence as parts of an answer: content, reasoning, tool calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput
from vllmlite.sampling_params import SamplingParams, ThinkingMarks
from vllmlite.server.config import ServerConfig
from vllmlite.server.generation import Generation
from vllmlite.server.openai.chat_protocol import ChatPrompt
from vllmlite.server.parsers.harmony import Harmony
from vllmlite.server.parsers.parts import (
    CallArguments,
    CallBegin,
    Content,
    Parser,
    Part,
    Reasoning,
    merged,
)
from vllmlite.server.parsers.reasoning import STYLES, ThinkParser
from vllmlite.server.service import Service
from vllmlite.server.tools import ToolUse
from vllmlite.tokenizers.tokenizer import Tokenizer


class Reader:
    """Reads one sequence, completely or incrementally."""

    def __init__(self, parser: Parser | None, tools: ToolUse) -> None:
        """Parse text with ``parser``; without one all text is content."""
        self.parser = parser
        self.called = False
        """Whether there was a tool call."""
        self._tools = tools
        self._reasoning: list[str] = []
        self._pending_call: list[Part] = []
        """A call whose arguments are still empty or just an opening brace; it is emitted when they continue or end."""

    def read(self, completion: CompletionOutput) -> list[Part]:
        """Add an output; return the parts that are certain now."""
        if self.parser is None:
            return [Content(completion.text)] if completion.text else []
        parts = self.parser.feed(completion.text) if completion.text else []
        ended = completion.finish_reason is not None
        cut = ended and completion.finish_reason != "stop"
        if ended:
            parts += self.parser.finish(cut)
        if not self._tools.parallel:
            parts = [
                part for part in parts if not isinstance(part, (CallBegin, CallArguments)) or not part.index
            ]
        parts = self._without_pending_call(parts)
        if ended and not cut:
            parts += self._pending_call
        self.called = self.called or any(isinstance(part, CallBegin) for part in parts)
        self._reasoning += [part.text for part in parts if isinstance(part, Reasoning)]
        return merged(parts)

    def _without_pending_call(self, parts: list[Part]) -> list[Part]:
        """Hold back a call at the end of ``parts`` whose arguments are still empty or just an opening brace.

        If the output is cut off there, a client might mistake it for a call without arguments."""
        found: list[Part] = []
        for part in parts:
            if isinstance(part, CallBegin):
                found += self._pending_call
                self._pending_call = [part]
                continue
            if isinstance(part, CallArguments) and self._pending_call:
                self._pending_call.append(part)
                if _arguments(self._pending_call).strip() in ("", "{"):
                    continue
                part = self._pending_call.pop()
            found += [*self._pending_call, part]
            self._pending_call = []
        return found

    def reasoning_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the number of reasoning tokens so far."""
        text = "".join(self._reasoning)
        return len(tokenizer.encode(text, False)) if text else 0

    def finish_reason(self, reason: str | None) -> str | None:
        """Return OpenAI's finish reason: ``tool_calls`` if the model ended after calls, unless one was named."""
        return "tool_calls" if reason == "stop" and self.called and self._tools.choice != "named" else reason


@dataclass(slots=True)
class Reading:
    """The parts of a whole answer, merged."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[CallBegin, str]] = field(default_factory=list)
    """For each call its beginning and its arguments."""

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Reading:
        """Merge all parts of an answer."""
        found = cls()
        for part in parts:
            match part:
                case Content(text):
                    found.content += text
                case Reasoning(text):
                    found.reasoning += text
                case CallBegin() as call:
                    found.calls.append((call, ""))
                case CallArguments(index, text):
                    call, arguments = found.calls[index]
                    found.calls[index] = call, arguments + text
        return found


def _arguments(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, CallArguments))


async def begin(
    service: Service,
    kind: str,
    talk: ChatPrompt,
    params: SamplingParams,
    tools: ToolUse,
    raw_reasoning: bool = False,
    **details: Any,
) -> tuple[Generation, list[Reader]]:
    """Start answering a conversation; return the generation and a reader for each answer.

    ``raw_reasoning`` leaves the reasoning in the content, with its markers. ``details`` are passed to
    :meth:`Service.generate`."""
    config = service.config
    truncation = service.engine.llm_engine.truncation(params)
    prompt = await service.encode_chat(talk, tools.shown, truncation)
    params = after_reasoning(config, service.tokenizer, params, prompt["prompt"])
    generation = await service.generate(kind, [prompt], params, **details)
    readers = [reader_for(config, tools, params, prompt["prompt"], raw_reasoning) for _ in range(params.n)]
    return generation, readers


async def begin_batch(
    service: Service,
    kind: str,
    talks: Sequence[ChatPrompt],
    params: SamplingParams,
    tools: ToolUse,
    raw_reasoning: bool,
    **details: Any,
) -> tuple[Generation, list[Reader]]:
    """Start answering several conversations, once each and with the same ``params``; return the generation and a reader
    for each conversation. The other arguments are those of :func:`begin`."""
    config = service.config
    truncation = service.engine.llm_engine.truncation(params)
    prompts = []
    for talk in talks:
        prompts.append(await service.encode_chat(talk, tools.shown, truncation))
        await asyncio.sleep(0)  # let other tasks run
    each = [after_reasoning(config, service.tokenizer, params, prompt["prompt"]) for prompt in prompts]
    if any(one != each[0] for one in each):
        raise ParameterError(
            "messages",
            len(talks),
            "in some conversations the reasoning is opened or closed, in others not: with structured output, send them "
            "separately",
        )
    generation = await service.generate(kind, prompts, each[0], **details)
    readers = [reader_for(config, tools, each[0], prompt["prompt"], raw_reasoning) for prompt in prompts]
    return generation, readers


def reader_for(
    config: ServerConfig, tools: ToolUse, params: SamplingParams, prompt: str, raw_reasoning: bool = False
) -> Reader:
    """Return a reader for one answer to ``prompt``. An answer structured from its first token on has no reasoning."""
    parser = tools.parser()
    structure = params.structured_outputs
    if raw_reasoning:
        return Reader(parser, tools)
    if config.reasoning_parser == "openai_gptoss" and structure is None:
        parser = Harmony()
    elif config.reasoning_parser is not None and (structure is None or structure.after is not None):
        parser = ThinkParser(STYLES[config.reasoning_parser], prompt, parser)
    return Reader(parser, tools)


def after_reasoning(
    config: ServerConfig, tokenizer: Tokenizer, params: SamplingParams, prompt: str
) -> SamplingParams:
    """Return ``params`` with the structure applied after the reasoning that the answer to ``prompt`` may begin with.

    If the reasoning markers are not single tokens, the answer begins with the structure."""
    structure = params.structured_outputs
    if config.reasoning_parser is None or structure is None:
        return params
    style = STYLES[config.reasoning_parser]
    opened = style.opened_by(prompt)
    opening, closing = (tokenizer.encode(mark, False) for mark in (style.opening, style.closing))
    reasons = style.implied if opened is None else opened
    if opened is False or len(closing) != 1 or (len(opening) != 1 and not reasons):
        return params
    marks = ThinkingMarks(closing[0], None if reasons else opening[0])
    return params.clone(structured_outputs=replace(structure, after=marks))


def reads_marks(config: ServerConfig, tools: ToolUse) -> bool:
    """Return whether a parser looks for markers in answers; they may be special tokens, which must be kept then."""
    return config.reasoning_parser is not None or tools.choice == "auto"
