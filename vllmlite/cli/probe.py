"""``python3 -m vllmlite.cli.probe``: probe every backend in this process and print the answers as JSON.

With a model's directory as argument, load that model and print why it fails, if it does; with ``--weights`` before it,
print in which form each backend multiplies its weights. This is a separate program
because it imports torch and initialises drivers, which takes time and may crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT, MODEL_TIMEOUT = 120, 1800
"""Seconds after which a probe of the backends, or of a model, counts as failed."""


def probe() -> list[dict[str, Any]]:
    """Probe the backends in a child process; return one dict per candidate, the preferred one first.

    Keys: ``backend``, ``kind``, ``available``, ``reason``. If the child fails, the only entry has backend ``none``."""
    answer = _run(TIMEOUT)
    if isinstance(answer, str):
        return [{"backend": "none", "kind": None, "available": False, "reason": answer}]
    return list(answer)


def probe_model(path: Path) -> str:
    """Load the model in directory ``path`` in a child process; return why that fails, or ""."""
    answer = _run(MODEL_TIMEOUT, str(path))
    return answer if isinstance(answer, str) else str(answer[0])


def probe_weights(path: Path) -> dict[str, str]:
    """Return how the backends that are available multiply the weights of the quantised model in directory ``path``."""
    answer = _run(TIMEOUT, "--weights", str(path))
    return {"any backend": answer} if isinstance(answer, str) else dict(answer)


def _run(timeout: float, *arguments: str) -> list[Any] | str:
    """Run this module as a program; return the JSON list it prints, or the reason why it failed."""
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, *arguments],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return answers
    except subprocess.TimeoutExpired:
        return f"the probe did not finish within {timeout} seconds"
    except OSError as e:
        return f"the probe cannot be started: {e}"
    except (ValueError, IndexError):
        if done.returncode < 0:
            return f"the probe was killed by {signal.Signals(-done.returncode).name}"
        return (done.stderr.strip().splitlines() or ["the probe printed no answer"])[-1]


def load_model(path: str) -> list[str]:
    """Load the model in this process; return a list with the reason why that fails, or with ""."""
    from vllmlite.config.engine_config import EngineConfig
    from vllmlite.errors import VllmliteError
    from vllmlite.runner.startup import start

    try:
        start(EngineConfig(model=path, skip_tokenizer_init=True, num_gpu_blocks_override=16, max_num_seqs=1))
    except VllmliteError as error:
        return [str(error)]
    return [""]


def probe_backends() -> list[dict[str, Any]]:
    """Probe the backends in this process; return one dict per candidate, as :func:`probe` does."""
    from vllmlite.backends.select import CANDIDATES, BackendRequest
    from vllmlite.errors import BackendError

    answers = []
    for name, kind, make in CANDIDATES:
        try:
            backend = make(BackendRequest(checkpoint_dtype="bfloat16"))
        except BackendError as e:
            available, reason = False, str(e)
        else:
            available, reason = True, backend.details
        answers.append({"backend": name, "kind": kind, "available": available, "reason": reason})
    return answers


def weight_forms(path: str) -> list[tuple[str, str]]:
    """Return the names of the available backends, each with how it multiplies a quantised model's weights."""
    from vllmlite.backends.select import CANDIDATES, BackendRequest
    from vllmlite.errors import BackendError
    from vllmlite.models.plan import plan_model
    from vllmlite.runner import build
    from vllmlite.weights.packing import Packing

    plan, found = plan_model(Path(path)), []
    for name, kind, make in CANDIDATES:
        try:
            backend = make(BackendRequest(checkpoint_dtype=plan.dtype))
        except BackendError:
            continue
        found.append((f"{name} on {kind}", "; ".join(build.weight_forms(plan, Packing(backend)))))
    return found


def _answer(arguments: list[str]) -> list[Any]:
    match arguments:
        case ["--weights", path]:
            return weight_forms(path)
        case [path]:
            return load_model(path)
        case _:
            return probe_backends()


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1:])))
