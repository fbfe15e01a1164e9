"""Tokenizers of tests, written as a checkpoint's ``tokenizer.json`` and ``tokenizer_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

HARD = [
    "Hello, world!", "don't DON'T we'LL I'd", "3333333 12 x=1234567", "٣٤٥ ½ ²³ Ⅷ", "a\n\n  b\t\tc \r\n d  ",
    "camelCase HTTPServer XMLHttpRequest", "größer ſ ŒUVRE ǅ ͅ", "ὟώᾼΐΊ ιΩK",
    "日本語の テキスト。 中文，测试！", "한국어 ㄱ",
    "e\u0301tude n\u0303 \u0301", "नमस्ते दुनिया", "สวัสดี", "🙂🙂 👩‍👩‍👧", "https://x.org/a//b?c=d&e", "/\n//\n x/\r\n",
    "if (a[0]) {\n\treturn;\n}", "\u00a0\u2003x", "  ", "",
]  # fmt: skip
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    + SPACES,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    + SPACES,
    "seed-coder": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    + SPACES,
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES,
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES,
}
"""Expressions of published tokenizer.json files."""

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(*expressions: str, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level tokenizer with all bytes, a few merges, and special tokens; 270 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ċ", "Ċ"), ("'", "s"), ("!", "Ċ")]
    vocab = {
        token: index for index, token in enumerate([*SPECIAL, *alphabet, *("".join(pair) for pair in merges)])
    }
    made = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expressions)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens(["<tool>"])
    return made


def byte_fallback(prefix: bool = True) -> Tokenizer:
    """A tokenizer as converted from SentencePiece, with tokens for bytes."""
    space = "\u2581"
    merges = [("t", "h"), ("e", "r"), ("th", "e"), (space, "the"), ("th", "er"), ("1", "2"), (space, space)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["".join(pair) for pair in merges] + [*"ther123", space]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend(space)] if prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", space)])
    decoding: list[Any] = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def write_tokenizer(path: Path, made: Tokenizer | None = None, **config: Any) -> Path:
    """Write a tokenizer, by default :func:`byte_level`'s, to directory ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    (made or byte_level()).save(str(path / "tokenizer.json"))
    own = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(own | config))
    return path
