"""Tokenising the corpus, sampling, replaying the training, and writing the model's files."""

import hashlib
import json
import math
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
from tokenizers import Tokenizer

from . import tokenizer as bpe
from .chat import Turn, render
from .corpus import Corpus, Document, is_held_out, number
from .model import Llama, Shape
from .sources import RESULT
from .training import Log, Recipe, Tokens, train

REPLAYED: Final = 3
QUESTIONS: Final = (
    "What is Debian?", "What is a package?", "How do I install a package?", "What does apt do?", "What is systemd?",
    "What is the kernel?", "Hello!", "Who are you?", "What is the difference between stable and unstable?",
    "What is dpkg?",
    "How do I remove nginx?", "What is openssh-server?", "How do I report a bug?", "What does the command ls do?",
)  # fmt: skip
BEGINNINGS: Final = (
    "Debian is",
    "The package manager",
    "To install a package,",
    "The Linux kernel",
    "When the system boots,",
)


def tokenise(corpus: Corpus, vocabulary: int, directory: Path) -> dict[str, Any]:
    """Train the tokenizer, write the tokenised corpus to `directory`, and return its part of the manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    learnt = [document for document in corpus.documents if not is_held_out(document)]
    tokenizer = bpe.train((document.text for document in learnt), vocabulary)
    tokenizer.save(str(directory / "tokenizer.json"))
    held_out = [document for document in corpus.documents if is_held_out(document)]
    arrays: dict[str, Any] = {}
    for name, documents in (("learnt", learnt), ("held_out", held_out)):
        encoded = tokenizer.encode_batch([_ended(document) for document in documents])
        arrays[f"{name}_ids"] = np.concatenate([np.asarray(each.ids, np.uint16) for each in encoded])
        arrays[f"{name}_bounds"] = np.cumsum([0, *(len(each.ids) for each in encoded)])
        arrays[f"{name}_repeats"] = np.asarray([document.repeats for document in documents])
    np.savez_compressed(directory / "tokens.npz", **arrays)
    once = np.diff(arrays["learnt_bounds"])
    facts = {
        "sha256": corpus.sha256,
        "documents": len(learnt),
        "bytes": sum(len(document.text.encode()) for document in learnt),
        "tokens": int(once.sum()),
        "tokens_per_epoch": [int((once * repeats).sum()) for repeats in arrays["learnt_repeats"].T],
        "held_out_documents": len(held_out),
        "held_out_bytes": sum(len(_ended(document).encode()) for document in held_out),
        "held_out_tokens": len(arrays["held_out_ids"]),
    }
    (directory / "corpus.json").write_text(
        json.dumps(facts | {"sources": [asdict(source) for source in corpus.sources]}, indent=1)
    )
    return facts


def _ended(document: Document) -> str:
    """The document with the end-of-text token; every second plain text also begins with one."""
    begin = bpe.END_OF_TEXT if document.kind == "text" and number(document.text) % 2 else ""
    return f"{begin}{document.text}{bpe.END_OF_TEXT}"


def load_tokens(directory: Path) -> tuple[Tokens, Tokens, Tokens]:
    """The tokenised corpus: first stage, second stage, held-out documents."""
    arrays = np.load(directory / "tokens.npz")
    ids, bounds, repeats = arrays["learnt_ids"], arrays["learnt_bounds"], arrays["learnt_repeats"]
    held_out = Tokens(
        arrays["held_out_ids"],
        arrays["held_out_bounds"],
        np.ones(len(arrays["held_out_bounds"]) - 1, np.int64),
    )
    return Tokens(ids, bounds, repeats[:, 0]), Tokens(ids, bounds, repeats[:, 1]), held_out


def save_weights(model: Llama, path: Path) -> None:
    """Write the weights in bf16."""
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()
    }
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def load_weights(shape: Shape, path: Path) -> Llama:
    """The model in fp32, with the weights of a file written by `save_weights`."""
    model = Llama(shape)
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


@torch.no_grad()
def continue_text(model: Llama, tokenizer: Tokenizer, text: str, most: int = 120) -> str:
    """The greedy continuation of a text, up to an end token."""
    ids = tokenizer.encode(text).ids
    begin = len(ids)
    device = next(model.parameters()).device
    while len(ids) < begin + most:
        token = int(model(torch.tensor([ids], device=device))[0, -1].argmax())
        if token in (0, 2):
            break
        ids.append(token)
    return str(tokenizer.decode(ids[begin:]))


def samples(model: Llama, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The model's answers to a few questions, and its continuations of a few beginnings."""
    asked = [(question, render([Turn(question, "")]).removesuffix("<|im_end|>\n")) for question in QUESTIONS]
    return [
        {"prompt": prompt, "text": continue_text(model, tokenizer, text)}
        for prompt, text in [*asked, *((beginning, beginning) for beginning in BEGINNINGS)]
    ]


def replay(recipe: Recipe, shape: Shape, directory: Path, report: Any = print) -> list[float]:
    """The losses of the first steps on a CPU in fp32, with an eighth of the recipe's batch size: a minute or two."""
    smaller = replace(recipe, tokens_per_step=recipe.tokens_per_step // 8)
    _, log = train(
        smaller,
        shape,
        *load_tokens(directory),
        torch.device("cpu"),
        stop_after=REPLAYED,
        rows_at_once=4,
        report=report,
    )
    return log.losses


def write_package(
    target: Path,
    corpus: Path,
    trained: Path,
    recipe: Recipe,
    shape: Shape,
    snapshot: str,
    replayed: Sequence[float],
) -> None:
    """Write the model's files and its manifest, from a corpus directory and a training directory."""
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    bpe.save(tokenizer, target, shape.max_position_embeddings)
    (target / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    generation = {
        "bos_token_id": 0,
        "eos_token_id": [0, 2],
        "pad_token_id": 0,
        "max_new_tokens": 256,
        "do_sample": False,
    }
    for name, contents in (("config.json", shape.config()), ("generation_config.json", generation)):
        (target / name).write_text(json.dumps(contents, indent=2) + "\n", "utf-8")
    run = json.loads((trained / "train.json").read_text())
    del run["recipe"]
    facts = json.loads((corpus / "corpus.json").read_text())
    sources = facts.pop("sources")
    model = load_weights(shape, target / "model.safetensors")
    loss = run["held_out"][-1][1]
    manifest = {
        "name": "vllmlite-demo",
        "licence": RESULT,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "files": {name: sha256(target / name) for name in _FILES},
        "snapshot": snapshot,
        "corpus": facts,
        "recipe": asdict(recipe),
        "shape": asdict(shape),
        "training": run,
        "held_out": {
            "nats_per_token": loss,
            "bits_per_byte": round(
                loss * facts["held_out_tokens"] / facts["held_out_bytes"] / math.log(2), 4
            ),
        },
        "replay": {"steps": len(replayed), "losses": list(replayed), "tolerance": 0.02},
        "tools": tools(),
        "samples": samples(model, tokenizer),
        "sources": sources,
    }
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tools() -> dict[str, str]:
    """The versions of Python and of the packages that training uses."""
    return {
        "python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
        "tokenizers": tokenizers.__version__, "safetensors": str(safetensors.__version__),
    }  # fmt: skip


def save_run(model: Llama, recipe: Recipe, log: Log, device: str, directory: Path) -> None:
    """Write the weights and the record of a training run."""
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(model, directory / "model.safetensors")
    record = {"recipe": asdict(recipe), "device": device, "tools": tools()} | asdict(log)
    (directory / "train.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def recipe_of(directory: Path) -> Recipe:
    """The recipe of a training run."""
    return Recipe(**json.loads((directory / "train.json").read_text())["recipe"])


def copyright_stanza(manifest: dict[str, Any]) -> str:
    """The paragraph of ``debian/copyright`` for the model: every package that its text comes from, with version and
    licence."""
    packages = ", ".join(f"{s['package']} {s['version']} ({s['licence']})" for s in manifest["sources"])
    made_from = (
        "The weights and the tokenizer were made by scripts/train_demo_model.py, and are under the strictest of the "
        "licences of what they were made from: the questions and answers in scripts/demo_model/answers.py, which are "
        "vllmlite's own, and documentation and descriptions out of these Debian packages, each checked against its own "
        f"copyright file: {packages}. What drafts for the model was trained on the model's own answers alone."
    )
    lines = textwrap.wrap(made_from, 79, break_on_hyphens=False, break_long_words=False)
    head = (
        "Files: vllmlite/data/*",
        "Copyright: 2026 The vllmlite authors",
        f"License: {manifest['licence']}",
    )
    return "\n".join((*head, "Comment:", *(f" {line}" for line in lines), ""))
