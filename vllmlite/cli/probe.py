"""``python3 -m vllmlite.cli.probe``: ask every backend whether it can run here, and print its answers as JSON.
With the directory of a model: load it as a server would, and print why that fails.

It is a program of its own because this imports torch and starts drivers, which may take time, or crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT, MODEL_TIMEOUT = 120, 1800
"""Seconds after which a probe of the backends, or of a model, has failed."""


def probe() -> list[dict[str, Any]]:
    """One answer a candidate, best first: ``backend``, ``kind``, ``available``, and a ``reason`` in words.

    Where nothing answers, the only one is of backend ``none``."""
    answer = _asked(TIMEOUT)
    if isinstance(answer, str):
        return [{"backend": "none", "kind": None, "available": False, "reason": answer}]
    return list(answer)


def probe_model(path: Path) -> str:
    """Why the model in directory ``path`` cannot be loaded; empty if it can."""
    answer = _asked(MODEL_TIMEOUT, str(path))
    return answer if isinstance(answer, str) else str(answer[0])


def _asked(timeout: float, *arguments: str) -> list[Any] | str:
    """What the program prints, or why it prints nothing."""
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
        return f"gave no answer in {timeout} seconds"
    except OSError as e:
        return f"cannot be asked: {e}"
    except (ValueError, IndexError):
        if done.returncode < 0:
            return f"died of {signal.Signals(-done.returncode).name} while being asked"
        return (done.stderr.strip().splitlines() or ["gave no answer"])[-1]


def load(path: str) -> list[str]:
    """Why the model cannot be loaded, tried in this process; empty if it can."""
    from vllmlite.config.engine_config import EngineConfig
    from vllmlite.errors import VllmliteError
    from vllmlite.runner.startup import start

    try:
        start(EngineConfig(model=path, skip_tokenizer_init=True, num_gpu_blocks_override=16, max_num_seqs=1))
    except VllmliteError as error:
        return [str(error)]
    return [""]


def ask() -> list[dict[str, Any]]:
    """The answers, asked for in this process."""
    from vllmlite.backends.select import CANDIDATES, Wanted
    from vllmlite.errors import BackendError

    answers = []
    for name, kind, make in CANDIDATES:
        try:
            backend = make(Wanted(checkpoint_dtype="bfloat16"))
        except BackendError as e:
            available, reason = False, str(e)
        else:
            lends = f"lends {', '.join(backend.lent_ops) or 'nothing'} from the reference"
            available, reason = True, "; ".join(filter(None, (backend.details, lends)))
        answers.append({"backend": name, "kind": kind, "available": available, "reason": reason})
    return answers


if __name__ == "__main__":
    print(json.dumps(load(sys.argv[1]) if len(sys.argv) > 1 else ask()))
