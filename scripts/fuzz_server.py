#!/usr/bin/env python3
"""Fuzz the server with schemathesis from /openapi.json: no answer may be 5xx, have an undocumented status, or differ
from its documented schema.

    PYTHONPATH=. scripts/fuzz_server.py [--examples N] [--seed N] [OPTION...]

The default is few examples per operation; the bar is ``--examples 500``. Needs schemathesis on the PATH; further
options are passed to it. Serves the built-in model during the run; the exit status is schemathesis's.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
SERVER = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
SMALL = ("--max-model-len", "64", "--max-body-size", "1M", "--disable-uvicorn-access-log")
"""Short answers, so that many fit into a minute."""


def main() -> int:
    """Serve, fuzz, and stop the server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args, rest = parser.parse_known_args()
    program = shutil.which("schemathesis")
    if program is None:
        print("fuzz_server.py: needs schemathesis on the PATH (pip install schemathesis)", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "vllmlite", "serve", "--port", "0", *SERVER, *SMALL]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if " at http" in line)
        url = line.split(" at ")[1].split(",")[0]
        fuzz = [
            program, "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing", "--checks", CHECKS,
            "--max-examples", str(args.examples), "--seed", str(args.seed), "--request-timeout", "120",
            "--suppress-health-check", "all", *rest,
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as directory:  # for files that schemathesis leaves
            fuzzed = subprocess.run(fuzz, cwd=directory).returncode
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    return fuzzed or status


if __name__ == "__main__":
    sys.exit(main())
