"""Settings that must be made before any test module is imported, and fixtures that test modules share."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllmlite.server.service import Service

# Tiny models on a busy machine: threads that spin while they wait take minutes of it. Read by torch and numpy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Package builds name a proxy that refuses everything, to keep tests from the network; servers here are on loopback.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

# A shell that starts the tests in the background has them ignore what the tests of Ctrl-C send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A service with parsers for reasoning and tool calls; modules that need another define their own."""
    from served import TAKES_APART, serving

    with serving(**TAKES_APART, trust_request_chat_template=True) as service:
        yield service


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of skipped tests by reason at the end of the run."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    if reasons:
        terminalreporter.section(f"{reasons.total()} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5}  {reason.removeprefix('Skipped: ')}")
