"""Chat templates give the text that transformers gives, or an error."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from chat_templates import CONVERSATIONS, PARTS_ALONE, SPECIAL, TEMPLATES, TOOLS
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from vllmlite.chat.template import ChatTemplate, PromptOptions
from vllmlite.errors import ParameterError

transformers = pytest.importorskip("transformers", reason="needs transformers, to compare with")

of_newer_transformers = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 24),
    reason="transformers before 5.24 renders it otherwise",
)

DATE = "01 Feb 2025"
DOCUMENTS = [{"title": "dpkg", "text": "Installs packages."}]


@pytest.fixture(scope="module")
def theirs() -> Any:
    inner = FastTokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def expected(theirs: Any, template: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """The text that transformers renders, or None if it fails."""
    try:
        text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except Exception:
        return None
    assert isinstance(text, str)
    return text


def as_clients_send_them(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of their tool calls as JSON strings."""
    sent = deepcopy(messages)
    for message in sent:
        for made in message.get("tool_calls", ()):
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"], ensure_ascii=False)
    return sent


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each content as a list of one text part."""
    return [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=of_newer_transformers if "gpt-oss" in name else ()) for name in TEMPLATES],
)
def test_rendered_text_equals_transformers(theirs: Any, name: str) -> None:
    ours = ChatTemplate(TEMPLATES[name], SPECIAL)
    asks: list[tuple[bool, Any, dict[str, Any]]] = [
        (True, None, {"date_string": DATE}),
        (True, TOOLS, {"date_string": DATE, "enable_thinking": False, "controls": {"length": "long"}}),
        (False, None, {"date_string": DATE, "documents": DOCUMENTS}),
    ]
    refused = 0
    for conversation, messages in CONVERSATIONS.items():
        sent = as_clients_send_them(messages)
        if name == PARTS_ALONE:
            messages = in_parts(messages)
        for prompted, tools, variables in asks:
            wanted = expected(
                theirs, TEMPLATES[name], messages, add_generation_prompt=prompted, tools=tools, **variables
            )
            try:
                found = ours.prompt(sent, PromptOptions(prompted), tools, variables)
            except ParameterError as error:
                assert wanted is None and error.field == "messages", (conversation, error)
                refused += 1
            else:
                assert wanted in (None, found), conversation
    assert refused < len(asks) * len(CONVERSATIONS)


@pytest.mark.parametrize(
    "source",
    [
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}",
        "{% if date_string is not defined %}{% if strftime_now is defined %}{% set date_string = "
        "strftime_now('%Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}",
        "{{ date_string | default('none') }} {{ datetime }}{{ today }}",
        "{{ tools | tojson(separators=(',', ':')) }}{{ tools | tojson(sort_keys=true, indent=1) }}",
        "{{ messages | tojson(ensure_ascii=true) }}{{ dict(a=1) }}{{ dict([('a', 2)]).items() | list }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{%- generation -%} {{ m.content }}{{ loop.index }} {%- endgeneration -%}{% endfor %}",
        "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ namespace({'self': 3}, b=4).b }}",
        "{{ raise_exception('No.') }}",
        pytest.param("{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}", marks=of_newer_transformers),
        pytest.param("{{ namespace(__call__=1) }}", marks=of_newer_transformers),
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ ''.__class__ }}",
        "{% include 'x' %}",
        "{{ messages[0].content.format_map({}) }}",
        "{{ strftime_now('%Y') | length }}{{ none is none }}{{ x is defined }}{{ x is undefined }}{{ 1 is none }}",
    ],
)
def test_the_jinja_environment_equals_transformers(theirs: Any, source: str) -> None:
    messages = CONVERSATIONS["characters beyond ASCII"]
    wanted = expected(theirs, source, messages, add_generation_prompt=False, tools=TOOLS)
    if wanted is None:
        with pytest.raises(ParameterError):
            ChatTemplate(source, SPECIAL).prompt(messages, PromptOptions(False), TOOLS)
    else:
        assert ChatTemplate(source, SPECIAL).prompt(messages, PromptOptions(False), TOOLS) == wanted


def test_tools_that_the_template_ignores_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate(TEMPLATES["chatml"], SPECIAL)
    for _ in range(2):
        template.prompt(CONVERSATIONS["a question"], tools=TOOLS)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "does not render tools" in caplog.text
