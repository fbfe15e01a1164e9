"""Tokenizers without a ``tokenizer.json``: SentencePiece models, and those that transformers implements in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from vllmlite.errors import ModelError
from vllmlite.models.families import FAMILIES
from vllmlite.tokenizers.tokenizer import Tokenizer

TEXTS = ["Debian is a free operating system.", "naïve  café\n\ttabs", "安装 apt 🎉", "x"]
CORPUS = ["The universal operating system is free software.", "apt installs packages and what they need."]


def test_a_sentencepiece_model_is_loaded(tmp_path: Path) -> None:
    """Ids and texts equal those of SentencePiece itself."""
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
    """CTRL's tokenizer has no other form: ids equal transformers', texts round-trip, and unknown ids are refused."""
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


@pytest.mark.parametrize("family", sorted({family.model_type for family in FAMILIES.values()}))
def test_a_missing_tokenizer_is_reported(family: str, tmp_path: Path) -> None:
    """Also for the families for which transformers creates an empty tokenizer."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(
        ModelError, match=r"no tokenizer\.json, and transformers finds no|has no tokenizer: none of "
    ):
        Tokenizer(tmp_path)


WORDS = ["a", "b", "<eos>", "<in vocabulary>"]
ADDED = {
    "4": {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
          "single_word": False},
    "5": {"content": "<tool>", "special": False, "normalized": False, "lstrip": True, "rstrip": True,
          "single_word": False},
    "2": {"content": "<eos>", "special": True},
}  # fmt: skip


def write_tokenizer(path: Path, **config: Any) -> Path:
    fast = FastTokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    fast.decoder = decoders.Fuse()
    fast.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_tokens_that_only_the_configuration_has_are_added(tmp_path: Path) -> None:
    """Ids and texts equal transformers', and so do the special tokens."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write_tokenizer(tmp_path, added_tokens_decoder=ADDED, eos_token="<eos>", pad_token="<in vocabulary>")
    ours, theirs = Tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("a<|im_end|>b", "a <tool> b", "ab<eos>", "<in vocabulary>a"):
        assert ours.encode(text) == theirs.encode(text)
        for skip in (True, False):
            ids = ours.encode(text)
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode("a<|im_end|><tool>") == [0, 4, 5]
    assert ours.decode([0, 4, 1, 2, 3, 5]) == "ab<tool>"
    assert ours.vocab_size == 6


def test_added_tokens_with_other_ids_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Tokenizer(write_tokenizer(tmp_path, added_tokens_decoder={"9": {"content": "<x>"}}))
    assert "added_tokens_decoder: '<x>' has id 9; the tokenizer gives 4" in caplog.text


@pytest.mark.parametrize(
    "entries",
    [
        ["a"],
        {"x": {}},
        {"9" * 5000: {}},
        {"4": "a"},
        {"4": {"content": 1}},
        {"4": {"content": "a", "special": 1}},
    ],
)
def test_malformed_added_tokens_are_refused(entries: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: added_tokens_decoder: "):
        Tokenizer(write_tokenizer(tmp_path, added_tokens_decoder=entries))
