"""Request bodies that would block the event loop, and so every stream: measured as they arrive, and refused with status
400."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from hypothesis import given
from hypothesis import strategies as st
from served import ask, serving

from vllmlite.chat.messages import MAX_ARGUMENTS, normalised
from vllmlite.errors import ParameterError
from vllmlite.server.body import MAX_NODES, MAX_VALUES, Structure
from vllmlite.server.conversation import is_small
from vllmlite.server.protocol.base import MAX_MESSAGES, MAX_TOOLS
from vllmlite.server.service import Service

CHAT, MESSAGES, RESPONSES, COMPLETION = "/v1/chat/completions", "/v1/messages", "/v1/responses", "/completion"
HI = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def plain() -> Iterator[Service]:
    with serving() as service:
        yield service


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='\\"{}[],:a€😀\x01'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='\\"{[,:é'), inner),
    max_leaves=20,
)


def _nodes(value: Any) -> int:
    if isinstance(value, list):
        return 1 + sum(map(_nodes, value))
    if isinstance(value, dict):
        return 1 + sum(1 + _nodes(each) for each in value.values())
    return 0


def _commas(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    items = list(value.values()) if isinstance(value, dict) else value
    return max(len(items) - 1, 0) + sum(map(_commas, items))


@given(VALUES, st.booleans(), st.integers(1, 7))
def test_counts_do_not_depend_on_where_pieces_are_cut(value: Any, ascii_only: bool, size: int) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    structure = Structure()
    for start in range(0, len(raw), size):
        structure.add(raw[start : start + size])
    assert (structure.nodes, structure.commas) == (_nodes(value), _commas(value))
    assert structure.fault() is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-le"])
def test_an_encoding_that_hides_structure_is_refused(encoding: str) -> None:
    structure = Structure()
    structure.add(json.dumps({"a": '"'}).encode(encoding))
    assert "UTF-8" in (structure.fault() or "")


def test_is_small_counts_text_and_values() -> None:
    assert is_small([[{"role": "user", "content": "hello"}], None, {}], 4096)
    for data in ("a" * 4097, ["a"] * 4000, {"a": {"b": ["a" * 5000]}}, [{str(i): 1 for i in range(4000)}]):
        assert not is_small(data, 4096)


def test_arguments_of_a_call_are_bounded() -> None:
    text = json.dumps({"a": "b" * MAX_ARGUMENTS})
    call = {"function": {"name": "f", "arguments": text}}
    with pytest.raises(ParameterError, match=f"tool_calls.0.function.arguments.*at most {MAX_ARGUMENTS}"):
        normalised([HI, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"prompt": "caf\xe9"}', "not JSON in UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 15"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON in UTF-8: .*digits"),
        # Python 3.14 reads deeper nesting than older versions: then the list is no object.
        (b"[" * 50_000 + b"]" * 50_000, "the body is nested too deeply|valid dictionary"),
        (b'{"prompt": "a",}', "the body is not JSON: .* at character"),
        ('{"prompt": "a"}'.encode("utf-16"), "not JSON in UTF-8: it has NUL bytes"),
    ],
    ids=["bytes", "digits", "depth", "comma", "utf-16"],
)
def test_a_body_that_cannot_be_parsed_is_told_why(plain: Service, body: bytes, reason: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
        assert re.search(reason, answer.json()["error"]["message"]), answer.text

    ask(plain, work)


def test_huge_bodies_are_refused_in_the_form_of_each_api(plain: Service) -> None:
    function = {"type": "function", "function": {"name": "f"}}
    cases: list[tuple[str, dict[str, Any], str, str | None]] = [
        (CHAT, {"messages": [HI] * (MAX_MESSAGES + 1)}, f"at most {MAX_MESSAGES} items", "messages"),
        (MESSAGES, {"messages": [HI] * (MAX_MESSAGES + 1), "max_tokens": 1}, f"{MAX_MESSAGES} items", None),
        (RESPONSES, {"input": [HI] * (MAX_MESSAGES + 1)}, f"at most {MAX_MESSAGES} items", "input"),
        (CHAT, {"messages": [HI], "tools": [function] * (MAX_TOOLS + 1)}, f"{MAX_TOOLS} items", "tools"),
        (CHAT, {"messages": [HI] * 200_000}, f"more than {MAX_NODES} objects", None),
        (CHAT, {"messages": [HI], "tools": [function] * 50_000}, f"more than {MAX_NODES} objects", None),
        (MESSAGES, {"messages": [[]] * MAX_NODES, "max_tokens": 1}, f"more than {MAX_NODES} objects", None),
        (RESPONSES, {"input": "a", **{f"f{i}": 1 for i in range(MAX_NODES)}}, f"{MAX_NODES} objects", None),
        (COMPLETION, {"prompt": [1] * (MAX_VALUES + 2)}, f"more than {MAX_VALUES} values", None),
        (COMPLETION, {"prompt": [1, "a"] * 200_000}, "exceeds the available context size", "prompt"),
    ]

    async def work(client: httpx.AsyncClient) -> None:
        for path, body, reason, param in cases:
            answer = await client.post(path, json=body)
            error = answer.json()["error"]
            assert answer.status_code == 400 and reason in error["message"], (path, answer.text[:300])
            assert error.get("param") == param
            assert (answer.json().get("type") == "error") == (path == MESSAGES)
        answer = await client.post(CHAT, json={"messages": [HI], "max_tokens": 1})
        assert answer.status_code == 200, answer.text

    ask(plain, work)
