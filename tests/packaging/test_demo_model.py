"""The built-in demo model: its files are complete, small, free, and match its manifest."""

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

import vllmlite

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from demo_model.release import copyright_stanza
from demo_model.sources import ALLOWED, MANUALS, RESULT, cleared_licences, is_allowed

DATA = Path(vllmlite.__file__).parent / "data" / "demo"
FORM = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
MANIFEST: dict[str, Any] = json.loads((DATA / "manifest.json").read_text("utf-8"))
CONFIG: dict[str, Any] = json.loads((DATA / "config.json").read_text("utf-8"))


def header() -> dict[str, Any]:
    with (DATA / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        contents: dict[str, Any] = json.loads(file.read(length))
    return {name: entry for name, entry in contents.items() if name != "__metadata__"}


def test_the_files_match_the_manifest() -> None:
    for name, digest in MANIFEST["files"].items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name
    assert {path.name for path in DATA.iterdir()} == {*MANIFEST["files"], "manifest.json"}


def test_sizes() -> None:
    parameters = 0
    for entry in header().values():
        assert entry["dtype"] == "BF16"
        first, *rest = entry["shape"]
        parameters += first * (rest[0] if rest else 1)
    assert parameters == MANIFEST["parameters"] <= 10_000_000
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 16 * 2**20


def test_config_suits_every_backend() -> None:
    assert CONFIG["model_type"] == "llama"
    assert CONFIG["tie_word_embeddings"] is True
    assert CONFIG["max_position_embeddings"] >= 1024
    assert CONFIG["hidden_size"] % 128 == CONFIG["intermediate_size"] % 128 == CONFIG["vocab_size"] % 128 == 0
    assert CONFIG["head_dim"] % 32 == 0
    names = header()
    assert len(names) == 2 + 9 * CONFIG["num_hidden_layers"]
    assert names["model.embed_tokens.weight"]["shape"] == [CONFIG["vocab_size"], CONFIG["hidden_size"]]


def test_end_tokens() -> None:
    tokens = json.loads((DATA / "tokenizer.json").read_text("utf-8"))
    special = {entry["content"]: entry["id"] for entry in tokens["added_tokens"] if entry["special"]}
    generation = json.loads((DATA / "generation_config.json").read_text("utf-8"))
    assert special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert len(tokens["model"]["vocab"]) == CONFIG["vocab_size"]
    assert generation["eos_token_id"] == CONFIG["eos_token_id"] == [0, 2]


def test_licences() -> None:
    assert MANIFEST["licence"] == RESULT == "GPL-3+"
    assert not any("gfdl" in name or name in ("gpl-2", "gpl-3") or "cc-by" in name for name in ALLOWED)
    assert all(is_allowed(manual.licence) for manual in MANUALS)
    packages = [source["package"] for source in MANIFEST["sources"]]
    assert len(packages) == len(set(packages)) > 1000
    for source in MANIFEST["sources"]:
        assert source["version"] and source["files"] and source["bytes"] and len(source["sha256"]) == 64
        assert is_allowed(source["licence"]), source


@pytest.mark.parametrize(
    "expression",
    [
        "GPL-2+",
        "GPL-2.0-or-later",
        "GPL-2+ with OpenSSL exception",
        "Expat and BSD-3-clause",
        "Artistic or GPL-1+",
    ],
)
def test_licences_let_in(expression: str) -> None:
    assert is_allowed(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "GPL-2",
        "GPL-2.0-only",
        "GPL-2+ and GPL-2",
        "GFDL-1.3+",
        "GPL-3+ and GFDL-NIV-1.2+",
        "Artistic",
        "CC-BY-NC-4.0",
        "",
    ],
)
def test_licences_kept_out(expression: str) -> None:
    assert not is_allowed(expression)


@pytest.mark.parametrize(
    ("stanzas", "cleared"),
    [
        ("Files: *\nLicense: GPL-2+\n\nFiles: doc/*\nLicense: Expat\n", ("Expat", "GPL-2+")),
        ("Files: *\nLicense: Artistic or GPL-1+\n\nLicense: Artistic\n Text.\n", ("Artistic or GPL-1+",)),
        ("Files: *\nLicense: GPL-2+\n\nFiles: doc/*\nLicense: GFDL-1.3+\n", None),
        ("Files: *\nLicense: Artistic\n", None),
        ("Files: *\nLicense:\n All rights reserved.\n", None),
    ],
)
def test_a_copyright_file_is_accepted_only_as_a_whole(stanzas: str, cleared: tuple[str, ...] | None) -> None:
    assert cleared_licences(FORM + stanzas) == cleared
    assert cleared_licences(stanzas) is None  # not machine-readable


def test_samples_of_the_demo_model_mention_debian() -> None:
    samples = {sample["prompt"]: sample["text"] for sample in MANIFEST["samples"]}
    assert samples["What is Debian?"].startswith("Debian is a free operating system")
    assert "apt install" in samples["How do I install a package?"]
    assert MANIFEST["held_out"]["bits_per_byte"] < 1.5


def test_debian_copyright_names_every_source() -> None:
    debian = Path(__file__).resolve().parents[2] / "debian" / "copyright"
    if not debian.exists():
        pytest.skip("no debian directory: an upstream tarball")
    assert copyright_stanza(MANIFEST).strip() in debian.read_text("utf-8")
