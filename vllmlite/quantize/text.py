"""Text for calibration: a file's, or what the built-in model writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllmlite.errors import ParameterError
from vllmlite.quantize.calibration import WINDOW
from vllmlite.tokenizers.tokenizer import Tokenizer

BEGINNINGS = (
    "The system", "In this chapter", "When a user", "A file is", "The command line", "Most programs", "This section",
    "To build the package", "The first line", "An archive", "If the option is given", "The network", "Users who",
    "Every release", "The library provides", "A process",
)  # fmt: skip
"""What the built-in model goes on from."""
PER_TEXT = 448


def calibration_tokens(model: Path, file: Path | None, count: int) -> NDArray[np.int32]:
    """Up to ``count`` ids of text, in the tokenizer of ``model``. ParameterError for a file that cannot be read, and
    for one of fewer than a window's tokens."""
    tokenizer = Tokenizer(model)
    text = _written(count) if file is None else _read(file)
    ids = np.array(tokenizer.encode(text)[:count], np.int32)
    if len(ids) < WINDOW:
        raise ParameterError(
            "calibration", str(file), f"holds {len(ids)} tokens; accepted: at least {WINDOW}"
        )
    return ids


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise ParameterError("calibration", str(file), f"cannot be read: {reason}") from error
    if file.suffix != ".jsonl":
        return text
    texts = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            texts.append(entry if isinstance(entry, str) else entry["text"])
        except (ValueError, KeyError, TypeError):
            raise ParameterError(
                "calibration",
                f"{file}:{number}",
                'accepted: JSON text, or an object with the key "text", a line',
            ) from None
    return "\n\n".join(map(str, texts))


def _written(count: int) -> str:
    """English of about ``count`` tokens of the built-in model, the same in every run on a machine."""
    from vllmlite.hub import find_model
    from vllmlite.llm import LLM
    from vllmlite.sampling_params import SamplingParams

    llm = LLM(str(find_model()), device="cpu", dtype="float32", max_model_len=WINDOW, max_num_seqs=64)
    number = -(-count // PER_TEXT) + 1
    prompts = [BEGINNINGS[index % len(BEGINNINGS)] for index in range(number)]
    params = [
        SamplingParams(temperature=1, max_tokens=PER_TEXT, ignore_eos=True, seed=1000 + index)
        for index in range(number)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return "\n\n".join(output.prompt + output.outputs[0].text for output in outputs if output.prompt)
