"""Some inputs of ``scripts/fuzz``, and all inputs that it has found to fail."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing import KEPT, TARGETS, check, lines_of, mutated

NUM_INPUTS = 100
"""Damaged inputs of each kind, the same in every run."""


@pytest.mark.parametrize("name", TARGETS)
def test_most_seeds_are_accepted(name: str, tmp_path: Path) -> None:
    seeds = TARGETS[name].seeds()
    accepted = [check(TARGETS[name], tmp_path / "x", seed) for seed in seeds]
    assert sum(accepted) > 0.8 * len(seeds)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target, rng = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    for _ in range(NUM_INPUTS):
        check(target, tmp_path / "x", mutated(rng.choice(seeds), seeds, rng, target.is_json))


@pytest.mark.parametrize(
    "path", sorted(KEPT.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name[:8]}"
)
def test_fuzzer_findings_stay_fixed(path: Path, tmp_path: Path) -> None:
    check(TARGETS[path.parent.name], tmp_path / "x", path.read_bytes())


def test_the_fuzzer_program_runs(tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "scripts" / "fuzz"
    if not program.exists():
        pytest.skip("the tests are apart from the source")
    run = subprocess.run(
        [sys.executable, program, "--minutes", "0.01", "--target", "gguf", "--found", tmp_path],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "gguf: " in run.stdout and " inputs, 0 failures" in run.stdout


def test_the_fuzzer_counts_covered_lines(tmp_path: Path) -> None:
    target = TARGETS["safetensors"]
    seen = lines_of(lambda: check(target, tmp_path / "x", target.seeds()[0]))
    assert any(name.endswith("weights/safetensors.py") for name, _ in seen)
