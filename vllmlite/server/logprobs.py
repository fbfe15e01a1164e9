"""Log-probabilities in the shapes of OpenAI's two endpoints, and vLLM's ``prompt_logprobs``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllmlite.outputs import Logprob
from vllmlite.server.protocol.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not; vLLM's number."""

Entries = Sequence[Mapping[int, Logprob] | None]
"""One mapping a token, the token itself first; None where there is none (the first of a prompt)."""


def for_completion(
    entries: Entries,
    token_ids: Sequence[int],
    count: int,
    offset: int,
    names_are_ids: bool,
    text_of: Callable[[int], str],
) -> CompletionLogprobs:
    """The columns of ``/v1/completions``: the ``count`` likeliest and the token itself; texts begin at ``offset``.

    ``text_of`` tells a token's text where there is no entry to tell it."""
    found: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, entry in zip(token_ids, entries, strict=True):
        found["text_offset"].append(offset)
        if entry is None:
            text = text_of(token_id)
            offset += len(text)
            found["tokens"].append(f"token_id:{token_id}" if names_are_ids else text)
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        chosen = entry[token_id]
        offset += len(chosen.decoded_token or "")
        found["tokens"].append(_name(token_id, chosen, names_are_ids))
        found["token_logprobs"].append(_finite(chosen.logprob))
        found["top_logprobs"].append(
            {_name(i, e, names_are_ids): _finite(e.logprob) for i, e in list(entry.items())[: count + 1]}
        )
    return found


def for_chat(entries: Entries, token_ids: Sequence[int], count: int, names_are_ids: bool) -> ChatLogprobs:
    """The entries of ``/v1/chat/completions``: each token with the ``count`` likeliest of its place, best first."""
    content: list[TokenLogprob] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            continue
        top = [_top(i, e, names_are_ids) for i, e in _likeliest(entry, count)]
        content.append({**_top(token_id, entry[token_id], names_are_ids), "top_logprobs": top})
    return {"content": content}


def for_llamacpp(entries: Entries, token_ids: Sequence[int], count: int) -> list[dict[str, Any]]:
    """llama.cpp's ``completion_probabilities``: the same with the tokens' ids."""
    return [
        {
            "id": token_id,
            **_top(token_id, entry[token_id], False),
            "top_logprobs": [{"id": i, **_top(i, e, False)} for i, e in _likeliest(entry, count)],
        }
        for token_id, entry in zip(token_ids, entries, strict=True)
        if entry is not None
    ]


def for_prompt(entries: Entries | None) -> PromptLogprobs | None:
    """vLLM's ``prompt_logprobs``: token id → entry, a mapping a token."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(i): {"logprob": _finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
            for i, e in entry.items()
        }
        for entry in entries
    ]


def _likeliest(entry: Mapping[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The ``count`` likeliest tokens, best first; the token itself may be another."""
    found = [(i, e) for i, e in entry.items() if e.rank is not None and e.rank <= count]
    return sorted(found, key=lambda item: item[1].rank or 0)


def _top(token_id: int, entry: Logprob, names_are_ids: bool) -> TopLogprob:
    text = entry.decoded_token or ""
    return {
        "token": _name(token_id, entry, names_are_ids),
        "logprob": _finite(entry.logprob),
        "bytes": list(text.encode("utf-8", "replace")),
    }


def _name(token_id: int, entry: Logprob, names_are_ids: bool) -> str:
    return f"token_id:{token_id}" if names_are_ids else entry.decoded_token or ""


def _finite(value: float) -> float:
    return max(value, LOWEST)
