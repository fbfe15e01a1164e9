"""``python3 -m vllmlite.cli.probe``: ask every backend whether it can run here, and print its answers as JSON.

It is a program of its own because asking imports torch and starts drivers, which may take time, or crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 120
"""Seconds after which a probe has failed."""


def probe() -> list[dict[str, Any]]:
    """One answer a candidate, best first: ``backend``, ``kind``, ``available``, and a ``reason`` in words.

    Where nothing answers, the only one is of backend ``none``."""
    program = [sys.executable, "-m", __name__]
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            program,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return answers
    except subprocess.TimeoutExpired:
        reason = f"gave no answer in {TIMEOUT} seconds"
    except OSError as e:
        reason = f"cannot be asked: {e}"
    except (ValueError, IndexError):
        if done.returncode < 0:
            reason = f"died of {signal.Signals(-done.returncode).name} while being asked"
        else:
            reason = (done.stderr.strip().splitlines() or ["gave no answer"])[-1]
    return [{"backend": "none", "kind": None, "available": False, "reason": reason}]


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
    print(json.dumps(ask()))
