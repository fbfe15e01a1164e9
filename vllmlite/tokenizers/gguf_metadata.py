"""The metadata with which a GGUF file stores a tokenizer: the inverse of :mod:`vllmlite.tokenizers.gguf`."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from vllmlite.chat.sources import DEFAULT
from vllmlite.errors import ModelError
from vllmlite.tokenizers.gguf_splits import SPLITS, WHOLE_WORDS
from vllmlite.tokenizers.tokenizer import BYTE_TOKEN, Tokenizer
from vllmlite.weights.gguf_tokens import CONTROL, ENDS, NORMAL, USER_DEFINED

logger = logging.getLogger(__name__)

UNKNOWN, UNUSED, BYTE = 2, 5, 6
"""Further token types."""
UNMERGED = -1e9
"""Score of tokens that no merge produces."""
_FRAGMENTS = (
    *"the The THE don't DON'T I'll we've x naïve Ünïcödé été Ελλάδα Привет ДОМ שלום مرحبا नमस्ते สวัสดี".split(),
    *"你好世界 日本語 カタカナ 한국어 e\u0301 \u01c5 ª 1 42 365 20240101 3.14 ٣٤ Ⅻ ½ . , ! ? ... != -> :: / //".split(),
    *"\\ () [x] { } <a> $5 + = ~ ^ ` | @ # _ a_b camelCase HTTPServer 。 、 “ ” — € ™ ° 🙂 🇩🇪 /* */ ' \" 's 'S".split(),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\u00a0", "\u3000", "!\n", "/\n", ";\n\n"),
)
"""Pieces of text that tokenizers split differently."""


def tokenizer_metadata(tokenizer: Tokenizer, source: Path, rows: int, ends: Sequence[int]) -> dict[str, Any]:
    """Return the metadata of ``tokenizer``, which was read from ``source``, for a table with ``rows`` embeddings.

    ``ends`` are the ids that end a text. Raises ModelError for tokenizers that a GGUF file cannot store."""
    fast = tokenizer.fast
    if fast is None:
        raise _refused(source, "is a slow tokenizer of transformers; accepted: one with a tokenizer.json")
    content = json.loads(fast.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(source, f"is of type {model['type']}; accepted: BPE")
    if fast.get_vocab_size() > rows:
        raise _refused(source, f"has {fast.get_vocab_size()} tokens; the model has embeddings of {rows}")
    tokens, types = _tokens(fast, model, rows)
    found: dict[str, Any] = {}
    if model["byte_fallback"]:
        scores = {
            left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(model["merges"])))
        }
        found["tokenizer.ggml.model"] = "llama"
        found["tokenizer.ggml.pre"] = "default"
        found["tokenizer.ggml.scores"] = [scores.get(token, UNMERGED) for token in tokens]
        found["tokenizer.ggml.add_space_prefix"] = (
            fast.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581")
        )
    else:
        found["tokenizer.ggml.model"] = "gpt2"
        found["tokenizer.ggml.pre"] = _split_name(fast, bool(model["ignore_merges"]), source)
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in model["merges"]]
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return found | _special_ids(tokenizer, tokens, ends, source) | _templates(tokenizer)


def check_tokenizer(tokenizer: Tokenizer, source: Path, written: Path) -> None:
    """Raise ModelError if the tokenizer of the GGUF file ``written`` treats text differently from ``tokenizer``.

    A difference that shows only beside special tokens is logged: GGUF cannot say that these strip spaces."""
    try:
        found = Tokenizer(written)
    except ModelError as error:
        raise _refused(source, str(error).removeprefix(f"{written}: ")) from error
    added = tokenizer.fast.get_added_tokens_decoder().values() if tokenizer.fast else ()
    marks = [token.content for token in added]
    for text in probes(1):
        expected, ids = tokenizer.encode(text), found.encode(text)
        difference = f"encodes {text[:40]!r} to {expected[:12]}; from GGUF, it would be {ids[:12]}"
        if expected != ids:
            raise _refused(source, difference)
        if tokenizer.decode(ids) != found.decode(ids):
            raise _refused(source, f"decodes {ids[:12]} differently from how it would from GGUF")
    for text in probes(2, marks):
        if tokenizer.encode(text) != found.encode(text):
            logger.warning(
                "%s: GGUF cannot say how its tokenizer treats spaces beside special tokens", source
            )
            return


def probes(seed: int, marks: Sequence[str] = ()) -> list[str]:
    """Return texts of random fragments in many scripts; with ``marks``, every other fragment is one of these."""
    rng = random.Random(seed)
    texts = [rng.choices(_FRAGMENTS, k=60) for _ in range(40)]
    return ["".join(part for own in text for part in (own, *rng.choices(marks or ("",)))) for text in texts]


def _tokens(fast: FastTokenizer, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each of ``rows`` tokens."""
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in model["vocab"].items():
        tokens[index] = token
        types[index] = BYTE if model["byte_fallback"] and BYTE_TOKEN.fullmatch(token) else NORMAL
    if model["unk_token"] is not None:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    for index, added in fast.get_added_tokens_decoder().items():
        tokens[index] = added.content
        if types[index] != UNKNOWN:
            types[index] = CONTROL if added.special else USER_DEFINED
    return tokens, types


def _split_name(fast: FastTokenizer, whole_words: bool, source: Path) -> str:
    """Return the name of the expressions that split texts as ``fast`` does before merging."""
    texts = probes(0)
    normalise = fast.normalizer.normalize_str if fast.normalizer is not None else str
    expected = [fast.pre_tokenizer.pre_tokenize_str(text) for text in texts] if fast.pre_tokenizer else []
    if [normalise(text) for text in texts] != texts and not _composes(fast):
        raise _refused(source, f"normalises text by {fast.normalizer}; accepted: NFC")
    for name, expressions in SPLITS.items():
        if (name in WHOLE_WORDS) != whole_words:
            continue
        splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
        candidate = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        if all(candidate.pre_tokenize_str(text) == own for text, own in zip(texts, expected, strict=False)):
            return name
    raise _refused(
        source, f"splits text in a way that GGUF has no name for; accepted: those of {', '.join(SPLITS)}"
    )


def _composes(fast: FastTokenizer) -> bool:
    """Return whether the normaliser is NFC, which llama.cpp leaves out: almost all text is composed already."""
    return bool(json.loads(fast.to_str())["normalizer"] == {"type": "NFC"})


def _special_ids(
    tokenizer: Tokenizer, tokens: Sequence[str], ends: Sequence[int], source: Path
) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found: dict[str, Any] = {}
    for name, key in names.items():
        index = tokenizer.token_id(tokenizer.special_text(f"{name}_token") or "")
        if index is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = index
    named = [index for index in ends if tokens[index] not in ENDS]
    eos = found.setdefault("tokenizer.ggml.eos_token_id", ends[0] if ends else None)
    if eos is None:
        del found["tokenizer.ggml.eos_token_id"]
    others = [index for index in named if index != eos]
    if len(others) > 2:
        raise _refused(
            source, f"ends texts at the tokens {list(ends)}; accepted: up to three that are not well known"
        )
    for key, index in zip(("eot", "eom"), others, strict=False):
        found[f"tokenizer.ggml.{key}_token_id"] = index
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    found["tokenizer.ggml.add_bos_token"] = whole[:1] != bare[:1]
    found["tokenizer.ggml.add_eos_token"] = whole[-1:] != bare[-1:]
    return found


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    templates = dict(tokenizer.chat_templates)
    found: dict[str, Any] = {}
    if DEFAULT in templates:
        found["tokenizer.chat_template"] = templates.pop(DEFAULT)
    if templates:
        found["tokenizer.chat_templates"] = list(templates)
        found |= {f"tokenizer.chat_template.{name}": text for name, text in templates.items()}
    return found


def _refused(source: Path, reason: str) -> ModelError:
    return ModelError(f"{source}: the tokenizer cannot be stored as GGUF: it {reason}")
