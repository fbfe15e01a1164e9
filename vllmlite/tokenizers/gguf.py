"""Tokenizers built from a GGUF file's metadata, as objects of the ``tokenizers`` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vllmlite.errors import ModelError
from vllmlite.tokenizers.gguf_splits import BEGIN, SPLITS, WHOLE_WORDS
from vllmlite.weights.gguf import Gguf, read_gguf
from vllmlite.weights.gguf_tokens import CONTROL, USER_DEFINED, token_types

_SPACE = "\u2581"


def gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer of the file at ``path`` and the equivalent of its ``tokenizer_config.json``.

    Raises ModelError for an unsupported kind of tokenizer or bad metadata."""
    gguf = read_gguf(path)
    kind = gguf.get("tokenizer.ggml.model", str)
    if kind not in _MAKERS:
        raise ModelError(
            f"{path}: tokenizer.ggml.model={kind!r}; accepted: {', '.join(_MAKERS)}; or name another tokenizer with "
            "--tokenizer"
        )
    tokens = gguf.get("tokenizer.ggml.tokens", list)
    if not tokens:
        raise ModelError(
            f"{path}: metadata tokenizer.ggml.tokens is absent: name a tokenizer with --tokenizer"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.tokens has a token twice")
    if gguf.get("tokenizer.ggml.add_sep_token", bool, False):
        raise ModelError(f"{path}: tokenizer.ggml.add_sep_token=True; accepted: False")
    types = token_types(gguf)
    try:
        made = _MAKERS[kind](gguf, vocab, tokens)
    except ModelError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path}: not a usable tokenizer: {error}") from None
    made.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i in np.flatnonzero(types == CONTROL)]
    )
    made.add_tokens(
        [
            AddedToken(tokens[i], special=False, normalized=False)
            for i in np.flatnonzero(types == USER_DEFINED)
        ]
    )
    config: dict[str, Any] = {
        f"{name}_token": _token(gguf, tokens, name) for name in ("bos", "eos", "unk", "pad")
    }
    _add_ends(gguf, made, kind, config)
    config["chat_template"] = _chat_templates(gguf)
    return made, config


def _chat_templates(gguf: Gguf) -> dict[str, str]:
    """Return chat templates by name: ``tokenizer.chat_template`` is the default, ``tokenizer.chat_template.NAME``
    others."""
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): name for name in gguf.metadata if name.startswith(f"{key}.")}
    found = {name: gguf.get(place, str) for name, place in {"default": key, **named}.items()}
    return {name: text for name, text in found.items() if text is not None}


def _gpt2(gguf: Gguf, vocab: dict[str, int], tokens: list[str]) -> Tokenizer:
    """Return a byte-level byte-pair encoding tokenizer (GPT-2)."""
    pre = gguf.get("tokenizer.ggml.pre", str, "default")
    if pre not in SPLITS:
        raise ModelError(
            f"{gguf.path}: tokenizer.ggml.pre={pre!r}; accepted: {', '.join(SPLITS)}; or name another tokenizer with "
            "--tokenizer"
        )
    merges = []
    for merge in gguf.get("tokenizer.ggml.merges", list, []):
        left, _, right = merge.partition(" ")
        if f"{left}{right}" not in vocab or left not in vocab or right not in vocab:
            raise ModelError(f"{gguf.path}: tokenizer.ggml.merges: {merge[:80]!r} does not consist of tokens")
        merges.append((left, right))
    made = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[pre]]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _llama(gguf: Gguf, vocab: dict[str, int], tokens: list[str]) -> Tokenizer:
    """Return a SentencePiece byte-pair encoding tokenizer (Kudo and Richardson 2018).

    Of all neighbouring pairs that form a token, the pair whose token has the best score is merged first."""
    scores = gguf.get("tokenizer.ggml.scores", np.ndarray, np.zeros(0))
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise ModelError(f"{gguf.path}: {len(scores)} scores of {len(tokens)} tokens; expected a number each")
    merges = []
    for index in np.argsort(-scores, kind="stable").tolist():
        token = tokens[index]
        if len(token) > MAX_PIECE:
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    unknown = _token(gguf, tokens, "unk") or ("<unk>" if "<unk>" in vocab else None)
    made = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gguf.get("tokenizer.ggml.add_space_prefix", bool, True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Sequence(decoding)
    return made


MAX_PIECE = 512
"""Longest token, in characters, that merges can produce; real vocabularies have at most about a hundred."""
_MAKERS = {"gpt2": _gpt2, "llama": _llama}


def _token(gguf: Gguf, tokens: list[str], name: str) -> str | None:
    """Return the text of the special token ``name`` (bos, eos, unk, pad), or None."""
    key = {"unk": "unknown", "pad": "padding"}.get(name, name)
    index = gguf.get(f"tokenizer.ggml.{key}_token_id", int)
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def _add_ends(gguf: Gguf, made: Tokenizer, kind: str, config: dict[str, Any]) -> None:
    """Make texts begin and end with the special tokens that the file names."""
    begins = kind == "llama" or gguf.get("tokenizer.ggml.pre", str, "default") in BEGIN
    begins = begins and config["bos_token"] is not None
    parts = {
        "bos": gguf.get("tokenizer.ggml.add_bos_token", bool, begins),
        "eos": gguf.get("tokenizer.ggml.add_eos_token", bool, False),
    }
    ends = {name: config[f"{name}_token"] if wanted else None for name, wanted in parts.items()}
    for name, wanted in parts.items():
        if wanted and ends[name] is None:
            raise ModelError(
                f"{gguf.path}: tokenizer.ggml.add_{name}_token is set, but there is no {name} token"
            )
    special = [
        (token, made.token_to_id(token)) for token in dict.fromkeys(ends.values()) if token is not None
    ]
    if special:
        template = [part for part in (ends["bos"], "$A", ends["eos"]) if part is not None]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
