"""Fill-in-the-middle prompts, made with the special tokens that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from vllmlite.errors import ParameterError
from vllmlite.server.errors import ApiError
from vllmlite.server.llamacpp.protocol import InfillFile
from vllmlite.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Marks:
    """The fill-in tokens of a model family, placed before the prefix, before the suffix, and before the middle."""

    prefix: str
    suffix: str
    middle: str
    repository: str = ""
    file: str = ""
    """Precedes other files, if the family has such a token."""


FAMILIES = (
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"),  # Qwen
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "", "<|file_separator|>"),  # CodeGemma
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<repo_name>", "<file_sep>"),  # StarCoder 2
    Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Marks("<PRE>", "<SUF>", "<MID>"),  # Refact
    Marks("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
    Marks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    Marks("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),  # Mistral
)


def infill_ids(
    tokenizer: Tokenizer, prefix: str, suffix: str, begin: str, files: Sequence[InfillFile]
) -> list[int]:
    """Return the ids of the prompt for the text between ``prefix`` and ``suffix``, which starts with ``begin``.

    Raises :class:`ApiError` if the model has no fill-in tokens, :class:`ParameterError` if it has none for ``files``.
    """
    marks = _marks(tokenizer)
    ids: list[int] = []
    if files:
        separator = tokenizer.token_id(marks.file) if marks.file else None
        if separator is None:
            raise ParameterError("input_extra", len(files), "the model has no token that separates files")
        repository = tokenizer.token_id(marks.repository) if marks.repository else None
        if repository is not None:
            ids += [repository, *tokenizer.encode("project\n", False)]
        for file in files:
            ids += [separator, *tokenizer.encode(f"{file.filename}\n{file.text}", False)]
        ids += [separator, *tokenizer.encode("filename\n", False)]
    for mark, text in ((marks.prefix, prefix), (marks.suffix, suffix), (marks.middle, begin)):
        mark_id = tokenizer.token_id(mark)
        assert mark_id is not None
        ids += [mark_id, *tokenizer.encode(text, False)]
    return ids


def _marks(tokenizer: Tokenizer) -> Marks:
    for marks in FAMILIES:
        if all(tokenizer.token_id(mark) is not None for mark in (marks.prefix, marks.suffix, marks.middle)):
            return marks
    raise ApiError(
        HTTPStatus.NOT_IMPLEMENTED,
        "the model cannot fill in text: its tokenizer has no fill-in tokens",
    )
