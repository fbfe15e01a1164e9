"""What the router on Ray knows of a request: the text of its prompt, whichever API it is for."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("yaml")

from vllmlite.engine.routing import Prefix
from vllmlite.ray_serve.http import BLOCK_BYTES, make_request, prompt_prefix

LONG = "A text that is longer than a block. " * 20
EMPTY = Prefix(0, ())


def prefix(**fields: object) -> Prefix:
    return prompt_prefix(json.dumps({"model": "m", **fields}).encode())


def common(one: Prefix, other: Prefix) -> int:
    """The number of blocks that two prompts share."""
    return sum(a == b for a, b in zip(one.hashes, other.hashes, strict=False))


@pytest.mark.parametrize("field", ["prompt", "input", "messages", "system"])
def test_prompts_that_begin_alike_share_blocks_whatever_their_sampling(field: str) -> None:
    def content(text: str) -> object:
        return [{"role": "user", "content": text}] if field == "messages" else text

    one = prefix(**{field: content(LONG + "one")}, temperature=0)
    other = prefix(**{field: content(LONG + "other")}, seed=7, max_tokens=3)
    assert common(one, other) == len(LONG) // BLOCK_BYTES
    assert one.length >= len(LONG)


def test_a_conversation_continues_its_prefix() -> None:
    turn = [{"role": "user", "content": LONG}]
    after = [*turn, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": LONG}]
    assert common(prefix(messages=turn), prefix(messages=after)) == len(LONG) // BLOCK_BYTES


def test_other_models_and_other_cache_salts_share_nothing() -> None:
    one = prefix(prompt=LONG)
    assert common(one, prefix(prompt=LONG)) == len(one.hashes) > 1
    assert common(one, prefix(prompt=LONG, cache_salt="alice")) == 0
    assert common(prefix(prompt=LONG, cache_salt="bob"), prefix(prompt=LONG, cache_salt="alice")) == 0
    assert common(one, prefix(prompt=LONG, model="another")) == 0


BODIES = [b"", b"{", b"[1]", b"7", b"\xff", b"[" * 100_000, b'{"model": "m"}', b'{"prompt": null}']


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_without_a_prompt_has_no_prefix(body: bytes) -> None:
    assert prompt_prefix(body) == EMPTY


def test_text_that_is_not_unicode_has_a_prefix() -> None:
    assert prompt_prefix(b'{"prompt": "\\ud800"}').length > 0


def test_a_request_leaves_the_objects_of_its_process_behind() -> None:
    scope = {
        "type": "http",
        "path": "/v1/completions",
        "headers": [(b"a", b"b")],
        "app": object(),
        "state": {},
    }
    assert make_request(scope, b"").scope == {
        "type": "http",
        "path": "/v1/completions",
        "headers": [(b"a", b"b")],
    }
