"""``vllmlite bench`` and ``vllmlite env``: consistent figures, and facts that do not depend on optional packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CONTEXT, FakeEngine, install, run

import vllmlite
from vllmlite.cli import env, machine, probe, report


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


# bench


def test_bench_prints_one_json_line_last(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--num-prompts",
        "5",
        "--batch",
        "2",
        "--input-len",
        "3:6",
        "--output-len",
        "4",
        "--prefix-len",
        "2",
    ]
    out, err = run(capsys, "bench", *argv, "--repeat", "2")
    result = json.loads(out)
    assert result["benchmark"]["batch"] == 2
    assert result["requests"] == 5
    assert result["generated_tokens"] == 20
    assert 25 <= result["prompt_tokens"] <= 40
    assert result["steps"] == 12
    assert result["prefill_tokens_per_second"] is None
    assert set(result["itl_seconds"]) == {"mean", "p50", "p90", "p99"}
    assert "throughput" in err
    seen = FakeEngine.made[0].seen
    assert len(seen) == 2 + 5 + 5
    assert len({tuple(prompt["prompt_token_ids"][:2]) for prompt, _, _ in seen[2:7]}) == 1
    assert all(params.ignore_eos and params.temperature == 0 for _, params, _ in seen)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--batch", "0"], "at least 1"),
        (["--input-len", "5:4"], "range"),
        (["--input-len", str(CONTEXT)], "exceed the context length"),
        (["prompt"], "unexpected argument 'prompt'"),
    ],
)
def test_bench_usage(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in run(capsys, "bench", *argv, status=2)[1]


def test_quantiles_use_the_nearest_rank() -> None:
    assert report.quantiles([]) == {}
    assert report.quantiles([4.0, 1.0, 3.0, 2.0]) == {"mean": 2.5, "p50": 2.0, "p90": 4.0, "p99": 4.0}
    assert report.rate(3, 0.0) is None


# env


def test_env_prints_json_or_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = json.loads(run(capsys, "env", "--json", "--quick")[0])
    assert facts["vllmlite"] == vllmlite.__version__
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["environment"]["HF_HUB_OFFLINE"] == "1"
    text, _ = run(capsys, "env", "--quick")
    assert vllmlite.__version__ in text and "HF_HUB_OFFLINE  1" in text


def test_env_works_where_nothing_can_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: "")
    monkeypatch.setattr(env, "BUILT_IN", Path("/nonexistent"))
    monkeypatch.setattr(env, "PACKAGES", ("none-such",))
    facts = env.gather(ask_backends=False)
    assert facts["memory"] == {"total": None, "available": None, "limit": None}
    assert facts["built_in_model"] == {}
    assert "not installed   none-such" in env.as_text(facts)


def test_env_shows_the_limits_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "0::/a/b\n",
        "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "/sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/a/b/memory.max": "4294967296\n",
        "/sys/fs/cgroup/memory.max": "max\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.cpu()["core_limit"] == 1.5
    assert machine.memory()["limit"] == 1 << 32


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; sys.exit('No module named x')", "No module named x"),
        ("import os; os.abort()", "the probe was killed by SIGABRT"),
        ("pass", "the probe printed no answer"),
    ],
)
def test_env_reports_a_probe_that_fails(monkeypatch: pytest.MonkeyPatch, program: str, says: str) -> None:
    real = subprocess.run

    def fake_run(argv: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(subprocess, "run", fake_run)
    (answer,) = probe.probe()
    assert not answer["available"]
    assert says in answer["reason"]
