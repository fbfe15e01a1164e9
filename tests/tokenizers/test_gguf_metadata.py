"""Tokenizers stored in GGUF files encode and decode what their sources do, or are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import HARD, PUBLISHED, byte_fallback, byte_level, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from vllmlite.errors import ModelError
from vllmlite.tokenizers import tokenizer as reading
from vllmlite.tokenizers.gguf_metadata import check_tokenizer, tokenizer_metadata
from vllmlite.weights.gguf import read_gguf
from vllmlite.weights.gguf_tokens import end_ids
from vllmlite.weights.gguf_writer import gguf_checkpoint

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def stored(source: Path, target: Path, rows: int = 307, ends: tuple[int, ...] = (2,)) -> dict[str, Any]:
    """Store the tokenizer of directory ``source`` in the file ``target``, check it, and return its metadata."""
    tokenizer = reading.Tokenizer(source)
    metadata = tokenizer_metadata(tokenizer, source, rows, ends)
    gguf_checkpoint(target, metadata, {}).close()
    check_tokenizer(tokenizer, source, target)
    return {key.removeprefix("tokenizer."): value for key, value in metadata.items()}


@pytest.mark.parametrize(
    ("expressions", "whole", "pre"),
    [
        ([], False, "gpt-2"),
        ([GPT2], False, "gpt-2"),
        ([r"\p{N}", GPT2], False, "smollm"),
        ([PUBLISHED["llama-bpe"]], True, "llama-bpe"),
        ([PUBLISHED["llama-bpe"]], False, "dbrx"),
        ([PUBLISHED["qwen2"]], False, "qwen2"),
        ([PUBLISHED["gpt-4o"]], False, "gpt-4o"),
        ([PUBLISHED["tekken"]], True, "tekken"),
        ([PUBLISHED["seed-coder"]], False, "seed-coder"),
    ],
)
def test_splits_are_found_by_what_they_do(
    expressions: list[str], whole: bool, pre: str, tmp_path: Path
) -> None:
    source = write_tokenizer(tmp_path / "source", byte_level(*expressions, ignore_merges=whole))
    found = stored(source, tmp_path / "x.gguf")
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", pre)
    assert len(found["ggml.tokens"]) == 307 and found["ggml.tokens"][-1] == "[PAD306]"
    types = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert [types[token] for token in ("<|im_end|>", "<tool>", "the", "[PAD306]")] == [3, 4, 1, 5]
    one, other = (reading.Tokenizer(path) for path in (source, tmp_path / "x.gguf"))
    for text in [*HARD, "<|im_start|>the<tool>12<|im_end|>"]:
        assert one.encode(text) == other.encode(text)
    assert one.chat_templates == other.chat_templates and one.special_tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizers_with_byte_fallback(prefix: bool, tmp_path: Path) -> None:
    made = byte_fallback(prefix)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    source = write_tokenizer(tmp_path / "source", made, **names)
    found = stored(source, tmp_path / "x.gguf")
    expected = {"model": "llama", "add_space_prefix": prefix, "add_bos_token": True, "add_eos_token": False,
                "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip
    assert expected.items() <= {key.removeprefix("ggml."): value for key, value in found.items()}.items()
    assert found["ggml.token_type"][:4] == [2, 3, 3, 6]
    one, other = (reading.Tokenizer(path) for path in (source, tmp_path / "x.gguf"))
    for text in [*HARD, "the other 123 the there"]:
        assert one.encode(text) == other.encode(text)
        assert one.decode(one.encode(text)) == other.decode(one.encode(text))


def test_every_end_of_text_is_stored(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source")
    found = stored(source, tmp_path / "x.gguf", ends=(2, 0, 40, 41))
    assert [found[f"ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, 40, 41]
    assert end_ids(read_gguf(tmp_path / "x.gguf")) == [0, 2, 40, 41]
    with pytest.raises(
        ModelError, match=r"ends texts at the tokens \[2, 40, 41, 42\]; accepted: up to three"
    ):
        stored(source, tmp_path / "x.gguf", ends=(2, 40, 41, 42))


def test_named_templates_are_stored(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    source = write_tokenizer(tmp_path / "source", chat_template=templates)
    found = stored(source, tmp_path / "x.gguf")
    assert found["chat_templates"] == ["tool_use"]
    assert reading.Tokenizer(tmp_path / "x.gguf").chat_templates == {
        "default": "{{ 1 }}",
        "tool_use": "{{ 2 }}",
    }


def changed(**parts: Any) -> Tokenizer:
    made = byte_level()
    for name, value in parts.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), "is of type WordLevel; accepted: BPE"),
        (changed(normalizer=normalizers.Lowercase()), "normalises text by Lowercase.*; accepted: NFC"),
        (byte_level(r"\p{L}{2}"), "splits text in a way that GGUF has no name for; accepted: those of default, gpt-2"),
        (changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits text in a way"),
        (
            changed(post_processor=processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])),
            r"encodes .* to \[1, .*; from GGUF, it would be",
        ),
    ],
)  # fmt: skip
def test_what_gguf_cannot_say_is_refused(made: Tokenizer, message: str, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source", made)
    with pytest.raises(ModelError, match=f"the tokenizer cannot be stored as GGUF: it {message}"):
        stored(source, tmp_path / "x.gguf")


def test_spaces_beside_special_tokens_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored(write_tokenizer(tmp_path / "source"), tmp_path / "x.gguf")
    assert not caplog.records
    made = byte_level()
    made.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    stored(write_tokenizer(tmp_path / "source", made), tmp_path / "x.gguf")
    assert "GGUF cannot say how its tokenizer treats spaces beside special tokens" in caplog.text


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source")
    with pytest.raises(ModelError, match="has 267 tokens; the model has embeddings of 200"):
        stored(source, tmp_path / "x.gguf", rows=200)


def test_metadata_are_written_with_the_types_of_gguf(tmp_path: Path) -> None:
    written = {"text": "é", "yes": True, "whole": 7, "broken": 0.5, "list": [1, -2], "texts": ["a", "b"]}
    gguf_checkpoint(tmp_path / "x.gguf", written, {}).close()
    data = (tmp_path / "x.gguf").read_bytes()
    assert data[:4] == b"GGUF" and struct.unpack("<IQQ", data[4:24]) == (3, 0, 6) and len(data) % 32 == 0
    found = dict(read_gguf(tmp_path / "x.gguf").metadata)
    found["list"] = found["list"].tolist()
    assert json.dumps(found) == json.dumps(written)
