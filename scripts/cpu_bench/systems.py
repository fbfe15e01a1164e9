"""The systems to compare: engines with vLLM's interface, llama.cpp's benchmarks, and the machine's limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from cpu_bench.models import Models

HERE = Path(__file__).resolve().parent


class System:
    """A system whose speed is measured; raises RuntimeError if it cannot do the work."""

    def prepare(self, work: str, **options: Any) -> None:
        """Prepare everything that is not to be measured."""

    def rest(self) -> None:
        """Use no CPU until the next call."""

    def measure(self, work: str, **options: Any) -> float:
        """Return one figure."""
        raise NotImplementedError

    def close(self) -> None:
        """Release resources."""


class Engine(System):
    """``engine.py`` in its own process, stopped (SIGSTOP) while idle, because vLLM's workers spin."""

    def __init__(
        self,
        python: Sequence[str],
        module: str,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._argv = [*python, str(HERE / "engine.py"), module, json.dumps(dict(options))]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the engine)

    def prepare(self, work: str, **options: Any) -> None:
        """Start the engine and do the work once to warm up caches and graphs, unless it takes long."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._argv, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._log, text=True, start_new_session=True,
            )  # fmt: skip
            self._answer(self._process)
        if work != "mixed":
            self.measure(work, **options)

    def rest(self) -> None:
        """Stop the process and its children."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def measure(self, work: str, **options: Any) -> float:
        """Return the engine's answer."""
        process = self._process
        if process is None or process.stdin is None:
            raise RuntimeError("the engine has not started")
        os.killpg(process.pid, signal.SIGCONT)
        print(json.dumps({"work": work, **options}), file=process.stdin, flush=True)
        return float(self._answer(process)["value"])

    def close(self) -> None:
        """End the process and its children."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self.close()
            self._log.seek(0)
            raise RuntimeError(last_line(self._log.read()))
        self.rest()
        found: dict[str, float] = json.loads(line)
        return found


class Step(Engine):
    """The engine with a model too small to take time: the cost per step of scheduling, Python and text processing."""

    def __init__(self, python: Sequence[str], model: Path) -> None:
        super().__init__(python, "vllmlite", {"model": str(model), "load_format": "dummy", "backend": "cpu"})

    def measure(self, work: str, **options: Any) -> float:
        """Return microseconds per decode step of one sequence, text included."""
        return 1e6 / super().measure("decode", batch=1, context=16, steps=1000, detokenize=True)


class LlamaBench(System):
    """llama.cpp's ``llama-bench`` for one sequence and ``llama-batched-bench`` for several, with one GGUF file."""

    def __init__(
        self, bench: Sequence[str] | None, batched: Sequence[str] | None, gguf: str, threads: int
    ) -> None:
        self._bench, self._batched = bench, batched
        self._common = ["-m", gguf, "-t", str(threads)]

    def measure(self, work: str, **options: Any) -> float:
        """Return tokens per second."""
        if work == "prefill":
            return self._single(["-p", str(options["length"]), "-n", "0"])
        if options["batch"] == 1:
            return self._single(["-p", "0", "-n", "32"])
        if self._batched is None:
            raise RuntimeError("--llama-batched-bench is not given")
        sizes = ["-npp", str(options["context"]), "-ntg", "24", "-npl", str(options["batch"])]
        argv = [*self._batched, *self._common, *sizes, "-c", "2048", "--output-format", "jsonl"]
        answers = [line for line in _run(argv).splitlines() if line.startswith("{")]
        return float(json.loads(answers[-1])["speed_tg"])

    def _single(self, sizes: list[str]) -> float:
        if self._bench is None:
            raise RuntimeError("--llama-bench is not given")
        return float(
            json.loads(_run([*self._bench, *self._common, *sizes, "-r", "1", "-o", "json"]))[0]["avg_ts"]
        )


class Made(System):
    """A system whose files are created by ``make`` when first needed."""

    def __init__(self, make: Callable[[], object], system: System) -> None:
        self._make, self._system = make, system

    def prepare(self, work: str, **options: Any) -> None:
        """Create the files, then prepare the system."""
        self._make()
        self._system.prepare(work, **options)

    def rest(self) -> None:
        """Call the system's :meth:`System.rest`."""
        self._system.rest()

    def measure(self, work: str, **options: Any) -> float:
        """Return the system's figure."""
        return self._system.measure(work, **options)

    def close(self) -> None:
        """Call the system's :meth:`System.close`."""
        self._system.close()


class Limits(System):
    """Tokens per second that the machine's memory bandwidth and arithmetic allow, measured by ``cpu_probe.cpp``."""

    def __init__(self, models: Models, threads: int, directory: Path) -> None:
        self._models, self._threads = models, threads
        self._binary = directory / "cpu_probe"

    def prepare(self, work: str, **options: Any) -> None:
        """Compile the probe, and create the checkpoint whose bytes are counted."""
        source = HERE.parent / "cpu_probe.cpp"
        options_ = ["-O2", "-std=c++20", "-march=native", "-pthread"]
        if not self._binary.exists():
            _run(["c++", *options_, str(source), "-o", str(self._binary)])
        if work == "decode":
            self._models.decode_bytes(options["weights"])

    def measure(self, work: str, **options: Any) -> float:
        """Return the limit of ``decode`` (weights, batch), ``prefill`` or ``attention`` (context)."""
        probed = json.loads(_run([str(self._binary), str(self._threads)]))
        read, products = probed["read_gb_s"] * 1e9, probed["bf16_gflop_s"] * 1e9
        if work == "prefill":
            if not products:
                raise RuntimeError("this CPU has no products of bfloat16")
            return float(products / self._models.prefill_flops())
        if work == "decode":
            return float(options["batch"] * read / self._models.decode_bytes(options["weights"]))
        return float(read / (options["context"] * self._models.kv_bytes()))


class Programs(System):
    """Measurements given as functions, by the names of work."""

    def __init__(self, **functions: Callable[..., float]) -> None:
        self._functions = functions

    def measure(self, work: str, **options: Any) -> float:
        """Return the function's result."""
        return self._functions[work](**options)


def _run(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{argv[0]}: {last_line(done.stderr)}")
    return done.stdout


def last_line(text: str) -> str:
    """Return the last non-empty line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a word"
