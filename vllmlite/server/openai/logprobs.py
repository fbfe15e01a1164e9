"""Log-probabilities in the forms of OpenAI's two endpoints, and vLLM's ``prompt_logprobs``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllmlite.outputs import Logprob
from vllmlite.server.openai.logprobs_protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from vllmlite.tokenizers.detokenizer import Detokenizer
from vllmlite.tokenizers.tokenizer import Tokenizer

LOWEST = -9999.0
"""Replaces minus infinity, which JSON lacks; vLLM's value."""

ALL = -1
"""Value of a number of most likely tokens that means the whole vocabulary."""

Entries = Sequence[Mapping[int, Logprob] | None]
"""One mapping per token, with the token itself first; None for the first token of a prompt."""


def for_completion(
    entries: Entries,
    token_ids: Sequence[int],
    text_offsets: Sequence[int],
    count: int,
    names_are_ids: bool,
    tokenizer: Tokenizer,
    named: Collection[int] = (),
) -> CompletionLogprobs:
    """Return the columns for ``/v1/completions``: each token, the ``count`` most likely ones and the ``named`` ids.

    ``text_offsets`` are the tokens' beginnings, in characters of the choice's text."""
    found: CompletionLogprobs = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": list(text_offsets),
    }  # fmt: skip
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            text = tokenizer.token_text(token_id)
            found["tokens"].append(f"token_id:{token_id}" if names_are_ids else text)
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        chosen = entry[token_id]
        found["tokens"].append(_name(token_id, chosen, names_are_ids))
        found["token_logprobs"].append(_finite(chosen.logprob))
        shown = [
            (i, e) for at, (i, e) in enumerate(entry.items()) if count == ALL or at <= count or i in named
        ]
        found["top_logprobs"].append(_by_name(shown, names_are_ids))
    return found


def for_chat(
    entries: Entries,
    token_ids: Sequence[int],
    count: int,
    names_are_ids: bool,
    tokenizer: Tokenizer,
    named: Collection[int] = (),
) -> ChatLogprobs:
    """Return the entries for ``/v1/chat/completions``: each token with the ``count`` most likely ones at its position
    and the ``named`` ids, best first."""
    content: list[TokenLogprob] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is None:
            continue
        top = [_top(i, e, names_are_ids, tokenizer) for i, e in _likeliest(entry, count, named)]
        content.append({**_top(token_id, entry[token_id], names_are_ids, tokenizer), "top_logprobs": top})
    return {"content": content}


def for_llamacpp(
    entries: Entries, token_ids: Sequence[int], count: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Return llama.cpp's ``completion_probabilities``: as :func:`for_chat`, with token ids."""
    return [
        {
            "id": token_id,
            **_top(token_id, entry[token_id], False, tokenizer),
            "top_logprobs": [{"id": i, **_top(i, e, False, tokenizer)} for i, e in _likeliest(entry, count)],
        }
        for token_id, entry in zip(token_ids, entries, strict=True)
        if entry is not None
    ]


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Return the beginning of each prompt token in ``text``, in characters.

    A special token has a width only if the text spells it out."""
    offsets: list[int] = []
    detokenizer, spelled = Detokenizer(tokenizer, []), 0
    for token_id in token_ids:
        at = detokenizer.position + spelled
        offsets.append(at)
        if tokenizer.is_hidden(token_id, True) and text.startswith(tokenizer.token_text(token_id), at):
            spelled += len(tokenizer.token_text(token_id))
        detokenizer.extend([token_id])
    return offsets


def for_prompt(entries: Entries | None) -> PromptLogprobs | None:
    """Return vLLM's ``prompt_logprobs``: for each token, entries by token id."""
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


def _likeliest(
    entry: Mapping[int, Logprob], count: int, named: Collection[int] = ()
) -> list[tuple[int, Logprob]]:
    """Return the ``count`` most likely tokens and the ``named`` ones, best first; they may not include the sampled
    one."""
    found = [
        (i, e)
        for i, e in entry.items()
        if i in named or (e.rank is not None and (count == ALL or e.rank <= count))
    ]
    return sorted(found, key=lambda item: item[1].rank or 0)


def _top(token_id: int, entry: Logprob, names_are_ids: bool, tokenizer: Tokenizer) -> TopLogprob:
    return {
        "token": _name(token_id, entry, names_are_ids),
        "logprob": _finite(entry.logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _by_name(entries: Sequence[tuple[int, Logprob]], names_are_ids: bool) -> dict[str, float]:
    """Return log-probabilities by token text, or by ``token_id:N`` if ``names_are_ids``; of several tokens with the
    same text, only the first has that text as its key."""
    found: dict[str, float] = {}
    for token_id, entry in entries:
        name = _name(token_id, entry, names_are_ids)
        found[f"token_id:{token_id}" if name in found else name] = _finite(entry.logprob)
    return found


def _name(token_id: int, entry: Logprob, names_are_ids: bool) -> str:
    return f"token_id:{token_id}" if names_are_ids else entry.decoded_token or ""


def _finite(value: float) -> float:
    return max(value, LOWEST)
