"""Chat templates: they render a conversation as a prompt, adapted to what each template supports."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""Roles of messages that instruct the model."""


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """Options for rendering messages as a prompt, named as in vLLM."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    content_format: str = "auto"


class ChatTemplate:
    """A chat template together with a model's special tokens.

    The messages are normalised (:mod:`vllmlite.chat.messages`) and then adapted to the template:

    - The role ``developer`` is kept if the template mentions it; otherwise it becomes ``system``.
    - Several system messages, or one that is not first, stay in place if the template renders all of them there.
      Otherwise they are merged into one system message at the beginning, separated by empty lines.
    - A content list stays a list of text parts if the template renders lists in messages of that role; otherwise it
      becomes text with one part per line. Text becomes a list if the template accepts only lists. Thinking parts stay
      in lists only if the template mentions ``thinking``; they are always in ``reasoning_content`` as well.
    - Absent content is empty; see :class:`~vllmlite.chat.values.NoContent`.

    What a template supports is found out by rendering test conversations whose content is a random marker."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """``special_tokens`` become template variables. Raises :class:`ParameterError` for invalid syntax."""
        self.source = source
        self._special_tokens = special_tokens
        self._template = compiled(source)
        self._warned = False
        self._forms = lru_cache(maxsize=16)(self._probe_forms)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the variables that the template reads but does not set."""
        return frozenset(meta.find_undeclared_variables(ENVIRONMENT.parse(self.source)))

    def mentions(self, word: str) -> bool:
        """Return whether a string constant in the template's expressions, such as a role, equals ``word``."""
        return word in self._constants

    def prompt(
        self,
        messages: Any,
        options: PromptOptions = PromptOptions(),
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt for ``messages``. Raises :class:`ParameterError` if messages or template are unusable."""
        if options.continue_final_message and options.add_generation_prompt:
            raise ParameterError("continue_final_message", True, "needs add_generation_prompt=False")
        if options.content_format not in CONTENT_FORMATS:
            raise ParameterError(
                "chat_template_content_format",
                options.content_format,
                f"must be {', '.join(CONTENT_FORMATS)}",
            )
        check_variables("chat_template_kwargs", variables or {})
        given = {
            **self._special_tokens,
            **plain(variables or {}, "chat_template_kwargs"),
            "tools": _tools(tools),
            "add_generation_prompt": options.add_generation_prompt,
        }
        if given["tools"] and "tools" not in self.variables and not self._warned:
            self._warned = True
            logger.warning(
                "the chat template does not render tools: the model will not see the tools of requests"
            )
        found = self._with_known_roles(normalised(messages))
        if options.continue_final_message and ("tool_calls" in found[-1] or found[-1]["role"] in INSTRUCTING):
            raise ParameterError(
                "continue_final_message",
                True,
                "the last message must have text, no tool calls, and not be a system message",
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
        """Return the messages, merging system messages at the beginning unless the template renders them in place."""
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
        role = min(messages[index]["role"] for index in systems)  # "developer" if any has it
        merged = {"role": role, "content": "\n\n".join(filter(None, texts))}
        return [merged, *(each for each in messages if each["role"] not in INSTRUCTING)]

    def _fitted(self, message: Message, form: str) -> str | list[dict[str, str]]:
        """Return the content of ``message`` as text or parts, whichever the template accepts."""
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
        """Return whether content of messages with ``role`` may be text, and whether it may be a list of parts.

        Tool results are passed as text where possible, as in vLLM, because few templates join their parts well."""
        is_result = role in ("tool", "function")
        if form != "auto":
            as_parts = form == "openai" and not is_result
            return not as_parts, as_parts
        as_text, as_parts = self._forms(role)
        return as_text, as_parts and not (is_result and as_text)

    def _probe_forms(self, role: str) -> tuple[bool, bool]:
        """Return whether the template renders content of ``role`` as text, and as a list of parts."""
        first, second = mark(), mark()
        as_text = first in self._probe(role, first)
        parts = [{"type": "text", "text": text} for text in (first, second)]
        as_parts = re.search(rf"{first}\s*{second}", self._probe(role, parts)) is not None
        return as_text or not as_parts, as_parts

    def _probe(self, role: str, content: Any) -> str:
        """Render a test conversation with one message of ``role`` that has ``content``; return "" if that fails."""
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
    """Return tools as passed to templates, None if there are none. Raises :class:`ParameterError`."""
    tools = plain(given, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) for each in tools)):
        raise ParameterError("tools", given, "must be a list of mappings")
    return tools or None


def _last_text(content: Content) -> str:
    """Return the text of the last text part of ``content``."""
    if isinstance(content, list):
        return next((part["text"] for part in reversed(content) if part["type"] == "text"), "")
    return content or ""


def _with_last_text(message: Message, text: str) -> Message:
    """Return ``message`` with the last text part of its content replaced by ``text``."""
    content: Content = message["content"]
    if not isinstance(content, list):
        return {**message, "content": text}
    last = {"type": "text", "text": text}
    places = [index for index, part in enumerate(content) if part["type"] == "text"]
    if not places:
        return {**message, "content": [*content, last]}
    return {**message, "content": [*content[: places[-1]], last, *content[places[-1] + 1 :]]}
