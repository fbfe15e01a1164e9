"""Tokenizers without a ``tokenizer.json``: SentencePiece's models, and those of transformers that are plain Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vllmlite.errors import ModelError
from vllmlite.tokenizer import Tokenizer

TEXTS = ["Debian is a free operating system.", "naïve  café\n\ttabs", "安装 apt 🎉", "x"]
CORPUS = ["The universal operating system is free software.", "apt installs packages and what they need."]


def test_a_model_of_sentencepiece(tmp_path: Path) -> None:
    """What is written is what SentencePiece itself writes, and reads."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *TEXTS] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False})
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids).removeprefix(" ") == theirs.decode(ids)


def test_a_tokenizer_in_plain_python(tmp_path: Path) -> None:
    """CTRL's, which has no other form: ids of transformers, text that comes out as it went in, unknown ids refused."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["the", "free", "system", "packages"]
    letters = sorted({letter for word in words for letter in word})
    parts = [part for letter in letters for part in (f"{letter}@@", letter)]
    vocab = {part: i for i, part in enumerate(["<unk>", *parts, *words])}
    merges, known = ["#version: 0.2"], set(letters)
    for word in words:
        for end in range(2, len(word) + 1):
            left, right = word[: end - 1], word[end - 1 : end] + ("</w>" if end == len(word) else "")
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
            known.add(left)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join([*merges, ""]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ctrl"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    theirs = transformers.CTRLTokenizer.from_pretrained(tmp_path)
    assert not theirs.is_fast
    ours = Tokenizer(tmp_path)
    for text in ("the free system", "packages", "free the packages"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text) and 0 not in ids
        assert ours.decode(ids) == text


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"no tokenizer\.json, and transformers finds no tokenizer either"):
        Tokenizer(tmp_path)


def test_without_transformers_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModelError, match=r"no tokenizer\.json, and .* transformers is not .*vllmlite\[torch\]"
    ):
        Tokenizer(tmp_path)
