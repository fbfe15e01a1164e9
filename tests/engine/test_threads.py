"""If the system starts no more threads, the result is an error, not a hang."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vllmlite import EngineConfig, LLMEngine
from vllmlite.engine_process.start import start_thread
from vllmlite.errors import BackendError, EngineDeadError
from vllmlite.sampling_params import SamplingParams

CONFIG = EngineConfig(dtype="float32", max_model_len=64, device="cpu")
SCRIPT = """
import os
from vllmlite.backends.cpu import CpuBackend
from vllmlite.errors import BackendError
for number in range(1, 6):
    os.environ["FAIL_THREAD"] = str(number)
    try:
        CpuBackend(threads=6)
    except BackendError as error:
        assert "cannot be started" in str(error) and "lower threads" in str(error), error
        print(str(error).split(":")[0])
    os.environ["FAIL_THREAD"] = "0"
    CpuBackend(threads=2)
print(CpuBackend(threads=6).threads)
"""


def test_started_threads_end_if_another_cannot_be_started(tmp_path: Path) -> None:
    pytest.importorskip("vllmlite._cpu", reason="vllmlite._cpu is not built")
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path / "failing_threads.so"
    source = Path(__file__).parents[1] / "support/failing_threads.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={"LD_PRELOAD": str(library), "PYTHONPATH": "."},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.stderr == ""
    assert run.stdout.splitlines() == [*(f"thread {n} of 5 cannot be started" for n in range(1, 6)), "6"]


@pytest.mark.parametrize(
    "fails", ["vllmlite-engine", "vllmlite-outputs", "vllmlite-grammars", "vllmlite-calls"]
)
def test_an_engine_whose_threads_cannot_be_started_is_an_error(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if self.name == fails:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    if fails == "vllmlite-engine":
        with pytest.raises(BackendError, match="can't start new thread"):
            LLMEngine(CONFIG, start_thread)
        return
    engine = LLMEngine(CONFIG, start_thread)
    with pytest.raises(EngineDeadError, match="can't start new thread"):
        engine.add_request("x", "Debian is", SamplingParams())
        engine.step()
    engine.close()
