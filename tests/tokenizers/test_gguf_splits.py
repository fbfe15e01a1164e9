"""GGUF's pre-tokenizers split difficult texts as the models' own tokenizers do."""

from __future__ import annotations

import unicodedata

import pytest
from tokenizer_files import HARD, PUBLISHED
from tokenizers import Regex, pre_tokenizers

from vllmlite.tokenizers.gguf_splits import SPLITS


def split(pre: str, text: str) -> list[str]:
    sequence = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[pre]]
    )
    return [piece for piece, _ in sequence.pre_tokenize_str(text)]


SAME = {
    "llama-bpe": ["falcon3", "pixtral", "midm-2.0", "lfm2"],
    "qwen2": ["kormo", "deepseek-r1-qwen"],
    "gpt-4o": ["llama4"],
    "seed-coder": [],
    "tekken": [],
}


@pytest.mark.parametrize("text", HARD)
def test_pre_tokenizers_equal_the_published_expressions(text: str) -> None:
    for name, expression in PUBLISHED.items():
        published = pre_tokenizers.Split(Regex(expression), "isolated")
        expected = [piece for piece, _ in published.pre_tokenize_str(text)]
        for pre in (name, *SAME[name]):
            assert split(pre, text) == expected, pre
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)  # its expression is the library's own
    for pre in ("gpt-2", "mellum", "a.x-4.0"):
        expected = [text[begin:end] for _, (begin, end) in gpt2.pre_tokenize_str(text)]
        assert split(pre, text) == expected, pre
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    expected = [text[begin:end] for _, (begin, end) in digits.pre_tokenize_str(text)]
    assert split("starcoder", text) == expected
    for pre in SPLITS:
        assert "".join(split(pre, text)) == text, pre


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-4o", "HTTPServer's 12345", ["HTTPServer's", " ", "123", "45"]),
        ("gpt-4o", "camelCase a//\n", ["camel", "Case", " a", "//\n"]),
        ("seed-coder", "a;\n12", ["a", ";", "\n", "1", "2"]),
        ("deepseek-coder", "x = 12;\nцель", ["x", " = ", "1", "2", ";", "\n", "цель"]),
        ("deepseek-coder", "a 中文b", ["a", " ", "中文", "b"]),
        ("deepseek-llm", "x = 12;\nцель", ["x", " =", " ", "1", "2", ";", "\n", "цель"]),
        ("deepseek-llm", "a 中文b", ["a", " ", "中文", "b"]),
        ("deepseek-v3", "a.b 12345中", ["a", ".b", " ", "123", "45", "中"]),
        ("viking", "ab 12", ["ab", " ", "1", "2"]),
        ("superbpe", "a 1234567", ["a ", "1", "234", "567"]),
        ("qwen35", "नमस्ते", ["नमस्ते"]),
    ],
)
def test_pieces(pre: str, text: str, pieces: list[str]) -> None:
    assert split(pre, text) == pieces


def test_deepseek_s_cased_letters() -> None:
    """Among them are letters that normalisation would change, which copies of the expression have lost."""
    letters = pre_tokenizers.Split(Regex(SPLITS["deepseek-llm"][1]), "isolated")
    for letter in "aZµßǅΩ\u1f7d\u1fbe\u1fd3\u1fdb\u2126\u212aжѮԱႠᏣἏⰀꙀﬀＡ𐐀":
        assert unicodedata.category(letter) in ("Lu", "Ll", "Lt")
        assert len(letters.pre_tokenize_str(f"x{letter}x")) == 1
    for other in "ƻǀʔªͺ中א":
        assert len(letters.pre_tokenize_str(f"x{other}x")) == 3
