"""From the outputs of a sequence to the parts of an answer: content, reasoning, tool calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllmlite.errors import ParameterError
from vllmlite.outputs import CompletionOutput
from vllmlite.sampling_params import SamplingParams, ThinkingMarks
from vllmlite.server.config import ServerConfig
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
from vllmlite.server.service import Generation, Service
from vllmlite.server.tools import ToolUse
from vllmlite.tokenizers.tokenizer import Tokenizer


class Reader:
    """Reads one sequence, in one piece or as it comes."""

    def __init__(self, parser: Parser | None, tools: ToolUse) -> None:
        """Without a ``parser`` all is content."""
        self.parser = parser
        self.called = False
        """Whether there has been a call."""
        self._tools = tools
        self._reasoning: list[str] = []
        self._announced: list[Part] = []
        """A call whose arguments have not begun: it is told with their first key, or with the end of its braces."""

    def read(self, completion: CompletionOutput) -> list[Part]:
        """The parts that are certain now."""
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
        parts = self._begun(parts)
        if ended and not cut:
            parts += self._announced
        self.called = self.called or any(isinstance(part, CallBegin) for part in parts)
        self._reasoning += [part.text for part in parts if isinstance(part, Reasoning)]
        return merged(parts)

    def _begun(self, parts: list[Part]) -> list[Part]:
        """Return ``parts`` without a call at their end whose arguments are still nothing or an opening brace.

        A client might take a call that is cut there for a call without arguments, and it would tell nothing else."""
        found: list[Part] = []
        for part in parts:
            if isinstance(part, CallBegin):
                found += self._announced
                self._announced = [part]
                continue
            if isinstance(part, CallArguments) and self._announced:
                self._announced.append(part)
                if _arguments(self._announced).strip() in ("", "{"):
                    continue
                part = self._announced.pop()
            found += [*self._announced, part]
            self._announced = []
        return found

    def reasoning_tokens(self, tokenizer: Tokenizer) -> int:
        """Tokens of the reasoning so far."""
        text = "".join(self._reasoning)
        return len(tokenizer.encode(text, False)) if text else 0

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's reason: an answer that ends of itself in calls ends for them, unless one was named."""
        return "tool_calls" if reason == "stop" and self.called and self._tools.choice != "named" else reason


@dataclass(slots=True)
class Reading:
    """A whole answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[CallBegin, str]] = field(default_factory=list)
    """(beginning, arguments) of each."""

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Reading:
        """All of an answer's parts together."""
        found = cls()
        for part in parts:
            match part:
                case Content(text):
                    found.content += text
                case Reasoning(text):
                    found.reasoning += text
                case CallBegin() as begun:
                    found.calls.append((begun, ""))
                case CallArguments(index, text):
                    begun, arguments = found.calls[index]
                    found.calls[index] = begun, arguments + text
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
    """Have a conversation answered: its generation, and a reader of each answer. ``raw_reasoning`` leaves reasoning in
    the content, with its marks; ``details`` are the service's."""
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
    """:func:`begin` for several conversations, each answered once with the same ``params``."""
    config = service.config
    truncation = service.engine.llm_engine.truncation(params)
    prompts = []
    for talk in talks:
        prompts.append(await service.encode_chat(talk, tools.shown, truncation))
        await asyncio.sleep(0)  # a turn for others
    each = [after_reasoning(config, service.tokenizer, params, prompt["prompt"]) for prompt in prompts]
    if any(one != each[0] for one in each):
        raise ParameterError(
            "messages",
            len(talks),
            "some conversations have their reasoning opened or closed and others have not: with a structure of the "
            "output, send them one by one",
        )
    generation = await service.generate(kind, prompts, each[0], **details)
    readers = [reader_for(config, tools, each[0], prompt["prompt"], raw_reasoning) for prompt in prompts]
    return generation, readers


def reader_for(
    config: ServerConfig, tools: ToolUse, params: SamplingParams, prompt: str, raw_reasoning: bool = False
) -> Reader:
    """A reader of one answer to ``prompt``. What a grammar shapes from its first token on holds no reasoning."""
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
    """``params`` whose structure holds after the reasoning that the answer to ``prompt`` may begin with.

    Where the marks of reasoning are no tokens of the model, the answer begins with the structure."""
    structure = params.structured_outputs
    if config.reasoning_parser is None or structure is None:
        return params
    style = STYLES[config.reasoning_parser]
    opened = style.opened_by(prompt)
    opening, closing = (tokenizer.encode(mark, False) for mark in (style.opening, style.closing))
    begun = style.implied if opened is None else opened
    if opened is False or len(closing) != 1 or (len(opening) != 1 and not begun):
        return params
    marks = ThinkingMarks(closing[0], None if begun else opening[0])
    return params.clone(structured_outputs=replace(structure, after=marks))


def reads_marks(config: ServerConfig, tools: ToolUse) -> bool:
    """Whether a parser looks for marks in answers, which may be special tokens: these must be left in the text."""
    return config.reasoning_parser is not None or tools.choice == "auto"
