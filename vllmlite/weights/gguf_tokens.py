"""Types of a GGUF file's tokens: control tokens, and tokens that end a text.

Converters store a type for each token, often a wrong one, such as "normal" for a chat model's end of turn. As in
llama.cpp, well-known control tokens are therefore recognised by their text, whatever the file says.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ModelError
from vllmlite.weights.gguf import Gguf

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Token types; other types make no difference here."""

ENDS = frozenset((
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
    "<turn|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>",
    "<fim-repo>", "<|file_sep|>",
))  # fmt: skip
"""Control tokens that end a text or a turn in every model that has them."""
ENDS_IF_CONTROL = frozenset(("</s>", "<eos>", "[EOS]", "[EOT]", "[e~[", "<|tool_response>"))
"""End tokens only if the file types them as control tokens, because they may be ordinary text (HTML has ``</s>``)."""
MARKS = frozenset((
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<|code_middle|>", "<|middle|>",
))  # fmt: skip
"""Control tokens for filling in the middle; they do not end a text."""
MESSAGE_ENDS = (frozenset(("<|return|>", "<|call|>")), frozenset(("<|calls|>", "<|flush|>")))
"""Sets of tokens; with all tokens of a set, ``<|end|>`` only ends one of several messages (gpt-oss, Solar Open)."""

Types: TypeAlias = NDArray[np.int32]


def token_types(gguf: Gguf) -> Types:
    """Return the type of each token. Raises ModelError if the file has a different number of types."""
    tokens = gguf.get("tokenizer.ggml.tokens", list, [])
    stored = gguf.get("tokenizer.ggml.token_type", np.ndarray)
    types = np.full(len(tokens), NORMAL, np.int32) if stored is None else stored.astype(np.int32)
    if len(types) != len(tokens):
        raise ModelError(f"{gguf.path}: {len(types)} types for {len(tokens)} tokens")
    types[[i for i, token in enumerate(tokens) if token in ENDS or token in MARKS]] = CONTROL
    if _ends_messages(tokens):
        types[tokens.index("<|end|>")] = USER_DEFINED
    return types


def end_ids(gguf: Gguf) -> list[int]:
    """Return the ids of tokens that end a text: those that the file names, and the well-known ones."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = {gguf.get(key, int) for key in keys if key in gguf.metadata}
    tokens, types = gguf.get("tokenizer.ggml.tokens", list, []), token_types(gguf)
    control = np.flatnonzero(types == CONTROL).tolist()
    return sorted(named | {i for i in control if tokens[i] in ENDS or tokens[i] in ENDS_IF_CONTROL})


def _ends_messages(tokens: list[str]) -> bool:
    known = ENDS.intersection(tokens)
    return "<|end|>" in known and any(together <= known for together in MESSAGE_ENDS)
