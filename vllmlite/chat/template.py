"""A chat template: what it supports, found out by trying, and the prompt that it makes of a conversation."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import meta, nodes

from vllmlite.chat.environment import ENVIRONMENT, compiled, render
from vllmlite.chat.messages import CONTENT_FORMATS, Content, check_variables, normalised, plain, text_of
from vllmlite.chat.prefill import mark, open_ended
from vllmlite.chat.values import NO_CONTENT, Arguments
from vllmlite.errors import ParameterError

logger = logging.getLogger(__name__)

Message = dict[str, Any]

INSTRUCTING = ("system", "developer")
"""Roles whose messages tell the model how to answer."""


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """How to make a prompt of messages; the names are vLLM's."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    content_format: str = "auto"


class ChatTemplate:
    """A template with the special tokens of a model.

    The messages are normalised (:mod:`vllmlite.chat.messages`) and then adapted to the template:

    - Role ``developer`` stays if the template names it; otherwise it is ``system``.
    - Several system messages, or one that is not the first message, stay where they are if the template shows all of
      them there. Otherwise they become one system message at the beginning, joined by an empty line.
    - Content that is a list of parts stays one, of text parts alone, if the template shows such lists in messages of
      that role; otherwise it becomes text, a part a line. Text becomes a list if the template takes lists alone.
      Thinking parts stay only in lists of a template that names them; they are in ``reasoning_content`` as well.
    - Absent content is empty; see :class:`~vllmlite.chat.values.NoContent`.

    Which of these a template can do is found out by rendering conversations with marks in their content."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """``special_tokens`` are variables of every rendering. Raises :class:`ParameterError` for bad syntax."""
        self.source = source
        self._special_tokens = special_tokens
        self._template = compiled(source)
        self._warned = False
        self._forms = lru_cache(maxsize=16)(self._probe_forms)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set itself."""
        return frozenset(meta.find_undeclared_variables(ENVIRONMENT.parse(self.source)))

    def mentions(self, word: str) -> bool:
        """Whether ``word`` is one of the constants in the template's expressions, as names of roles and types are."""
        return word in self._constants

    def prompt(
        self,
        messages: Any,
        options: PromptOptions = PromptOptions(),
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for ``messages``. Raises :class:`ParameterError` where they, or the template, are unusable."""
        if options.continue_final_message and options.add_generation_prompt:
            raise ParameterError("continue_final_message", True, "goes with add_generation_prompt=False")
        if options.content_format not in CONTENT_FORMATS:
            raise ParameterError(
                "chat_template_content_format",
                options.content_format,
                f"must be {', '.join(CONTENT_FORMATS)}",
            )
        check_variables("chat_template_kwargs", variables or {})
        given = {
            **self._special_tokens,
            **_clock(),
            **plain(variables or {}, "chat_template_kwargs"),
            "tools": _tools(tools),
            "add_generation_prompt": options.add_generation_prompt,
        }
        if given["tools"] and "tools" not in self.variables and not self._warned:
            self._warned = True
            logger.warning(
                "the chat template shows the model no tools: those of requests are not in its prompts"
            )
        found = self._with_known_roles(normalised(messages))
        if options.continue_final_message and ("tool_calls" in found[-1] or found[-1]["role"] in INSTRUCTING):
            raise ParameterError(
                "continue_final_message",
                True,
                "the last message must be a text, neither tool calls nor instructions",
            )
        found = self._with_systems_in_place(found, options.content_format, given)
        if not options.continue_final_message:
            return self._render(found, options.content_format, given)
        *before, last = found

        def ending_in(text: str) -> str:
            return self._render([*before, _with_last_text(last, text)], options.content_format, given)

        return open_ended(ending_in, _last_text(last["content"]))

    @cached_property
    def _constants(self) -> frozenset[str]:
        constants = (node.value for node in ENVIRONMENT.parse(self.source).find_all(nodes.Const))
        return frozenset(value for value in constants if isinstance(value, str))

    def _render(self, messages: list[Message], form: str, variables: Mapping[str, Any]) -> str:
        fitted = [{**each, "content": self._fitted(each, form)} for each in messages]
        return render(self._template, {**variables, "messages": fitted})

    def _with_known_roles(self, messages: list[Message]) -> list[Message]:
        if self.mentions("developer"):
            return messages
        return [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]

    def _with_systems_in_place(
        self, messages: list[Message], form: str, variables: Mapping[str, Any]
    ) -> list[Message]:
        """The messages with one system message at the beginning, unless the template shows them where they are."""
        systems = [index for index, each in enumerate(messages) if each["role"] in INSTRUCTING]
        if systems in ([], [0]):
            return messages
        marks = {index: mark() for index in systems}
        marked = [
            {**each, "content": marks[index]} if index in marks else each
            for index, each in enumerate(messages)
        ]
        try:
            shown = self._render(marked, form, variables)
        except ParameterError:
            shown = ""
        if all(each in shown for each in marks.values()):
            return messages
        texts = (text_of(messages[index]["content"]) for index in systems)
        role = min(messages[index]["role"] for index in systems)  # a developer's, if there is one
        merged = {"role": role, "content": "\n\n".join(filter(None, texts))}
        return [merged, *(each for each in messages if each["role"] not in INSTRUCTING)]

    def _fitted(self, message: Message, form: str) -> str | list[dict[str, str]]:
        """The content of ``message`` in the form that the template takes."""
        content: Content = message["content"]
        as_text, as_parts = self._takes(message["role"], form)
        if isinstance(content, list) and as_parts:
            kinds = ("text", "thinking") if self.mentions("thinking") else ("text",)
            return [part for part in content if part["type"] in kinds]
        text = text_of(content)
        if as_text:
            return NO_CONTENT if text is None else text
        return [] if text is None else [{"type": "text", "text": text}]

    def _takes(self, role: str, form: str) -> tuple[bool, bool]:
        """Whether content of that role may be text, and whether it may be a list of parts.

        Results of tools are text where they can be, as vLLM has it, for few templates join their parts well."""
        is_result = role in ("tool", "function")
        if form != "auto":
            as_parts = form == "openai" and not is_result
            return not as_parts, as_parts
        as_text, as_parts = self._forms(role)
        return as_text, as_parts and not (is_result and as_text)

    def _probe_forms(self, role: str) -> tuple[bool, bool]:
        """Whether the template shows content of that role as text, and as a list of parts."""
        first, second = mark(), mark()
        as_text = first in self._probe(role, first)
        parts = [{"type": "text", "text": text} for text in (first, second)]
        as_parts = re.search(rf"{first}\s*{second}", self._probe(role, parts)) is not None
        return as_text or not as_parts, as_parts

    def _probe(self, role: str, content: Any) -> str:
        """What the template makes of a conversation with one message of ``role`` that has ``content``."""
        user, asked = {"role": "user", "content": "a"}, {"role": role, "content": content}
        function = {"name": "f", "arguments": Arguments({}, None)}
        call = {"id": "call00001", "type": "function", "function": function}
        calls = {"role": "assistant", "content": NO_CONTENT, "tool_calls": [call]}
        messages = {
            "system": [asked, user],
            "developer": [asked, user],
            "user": [asked],
            "tool": [user, calls, {**asked, "tool_call_id": call["id"]}],
        }.get(role, [user, asked])
        variables = {**self._special_tokens, "tools": None, "add_generation_prompt": False}
        try:
            return render(self._template, {**variables, "messages": messages})
        except ParameterError:
            return ""


def _tools(given: Any) -> list[Any] | None:
    """Tools as a template is given them; None if there are none. Raises :class:`ParameterError`."""
    tools = plain(given, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) for each in tools)):
        raise ParameterError("tools", given, "must be a list of mappings")
    return tools or None


def _clock() -> dict[str, str]:
    """Today's date under the names by which templates of Llama 3 and of Firefunction ask for it, as llama.cpp has
    them."""
    now = datetime.now()
    utc = datetime.now(UTC)
    return {"date_string": now.strftime("%d %b %Y"), "datetime": utc.strftime("%b %d %Y %H:%M:%S GMT")}


def _last_text(content: Content) -> str:
    """The text of the content's last part."""
    if isinstance(content, list):
        return next((part["text"] for part in reversed(content) if part["type"] == "text"), "")
    return content or ""


def _with_last_text(message: Message, text: str) -> Message:
    """``message`` with another text as the last text part of its content."""
    content: Content = message["content"]
    if not isinstance(content, list):
        return {**message, "content": text}
    last = {"type": "text", "text": text}
    places = [index for index, part in enumerate(content) if part["type"] == "text"]
    if not places:
        return {**message, "content": [*content, last]}
    return {**message, "content": [*content[: places[-1]], last, *content[places[-1] + 1 :]]}
