"""``vllmlite chat`` on a terminal: line editing, Ctrl-C, Ctrl-D, and what a server may do in the meantime."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from fake_server import FakeServer
from served import ROOT
from starlette.responses import Response

SECONDS = 120
"""How long anything may take before the test fails."""
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """``vllmlite chat``, run on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        """Start the program and wait for its prompt."""
        command = [sys.executable, "-m", "vllmlite", "chat", *arguments]
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.execve(
                sys.executable,
                command,
                {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "NO_COLOR": "1"},
            )
        self.seen = b""
        self._at = 0
        self.expect("> ")

    def expect(self, text: str) -> str:
        """Wait until the output contains ``text``, and return the output before it."""
        assert self._comes(text, SECONDS), f"no {text!r} in {self.seen[self._at :]!r}"
        at = self.seen.find(text.encode(), self._at)
        before, self._at = self.seen[self._at : at], at + len(text.encode())
        return before.decode()

    def send(self, keys: str | bytes) -> None:
        """Type ``text``."""
        os.write(self._terminal, keys.encode() if isinstance(keys, str) else keys)

    def interrupt_prompt(self) -> None:
        """Type Ctrl-C at the prompt, again if nothing comes of it, and wait for the next prompt.

        Python's readline module misses a signal that arrives after it has shown the prompt and before it waits."""
        for _ in range(SECONDS // 10):
            self.send(CTRL_C)
            if self._comes("to leave.", 10):
                break
        self.expect("to leave.")
        self.expect("> ")

    def end(self) -> int:
        """Type Ctrl-D and return the exit status."""
        self.send(CTRL_D)
        while self._read(SECONDS):
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])

    def _comes(self, text: str, seconds: float) -> bool:
        """Read until the output contains ``text``; return False if it does not in this time."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.seen[self._at :]:
            if time.monotonic() > deadline:
                return False
            assert self._read(0.2), f"the program ended: {self.seen[self._at :]!r}"
        return True

    def _read(self, seconds: float) -> bool:
        """Read the available output, waiting a limited time; return False at the end of the output."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return seconds < SECONDS
        try:
            piece = os.read(self._terminal, 1 << 16)
        except OSError:  # what Linux says when nobody holds the other end
            return False
        self.seen += piece
        return bool(piece)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def wait_for_requests(fake: FakeServer, count: int) -> None:
    """Wait until ``fake`` has received this many requests."""
    deadline = time.monotonic() + SECONDS
    while len(fake.bodies) < count:
        assert time.monotonic() < deadline, f"{len(fake.bodies)} requests"
        time.sleep(0.01)


def turns(fake: FakeServer) -> list[str]:
    """The contents of the messages of the last request."""
    return [message["content"] for message in fake.bodies[-1]["messages"]]


def test_an_interrupt_stops_a_servers_answer(fake: FakeServer) -> None:
    terminal = Terminal("--url", fake.url)
    fake.answers(None)
    terminal.send("first\n")
    wait_for_requests(fake, 1)
    terminal.send(CTRL_C)  # before any token
    terminal.expect("> ")
    assert fake.left.wait(SECONDS)
    fake.answers("half\u2028", "é", None)
    terminal.send("second\n")
    terminal.expect("é")
    terminal.send(CTRL_C)
    terminal.expect("> ")
    assert fake.left.wait(SECONDS)
    fake.answers("whole")
    terminal.send("third\n")
    terminal.expect("whole")
    terminal.expect("> ")
    assert turns(fake) == ["second", "half\u2028é", "third"]
    terminal.interrupt_prompt()
    assert terminal.end() == 0


def test_exclusive_calls_of_several_lines(fake: FakeServer) -> None:
    terminal = Terminal("--url", fake.url)
    fake.answers("yes")
    terminal.send("a\\\n")
    terminal.expect("... ")
    terminal.send("b\n")
    terminal.expect("yes")
    terminal.expect("> ")
    assert turns(fake) == ["a\nb"]
    terminal.send("/retry\n")
    terminal.expect("yes")
    terminal.expect("> ")
    assert turns(fake) == ["a\nb"] and len(fake.bodies) == 2
    fake.answers(None)
    terminal.send("/retry\n")
    wait_for_requests(fake, 3)
    terminal.send(CTRL_C)  # the earlier answer stays, and can be had anew
    terminal.expect("> ")
    assert fake.left.wait(SECONDS)
    fake.answers("yes")
    terminal.send("/retry\n")
    terminal.expect("yes")
    terminal.expect("> ")
    assert turns(fake) == ["a\nb"] and len(fake.bodies) == 4
    assert terminal.end() == 0


def test_reasoning_of_a_server_is_shown_but_not_sent_back(fake: FakeServer) -> None:
    terminal = Terminal("--url", fake.url)
    fake.reasoning = "hm"
    fake.answers("\n\nyes")
    for text in ("a", "b"):
        terminal.send(f"{text}\n")
        assert terminal.expect("> ").endswith("hm\r\n\r\nyes\r\n")
    assert turns(fake) == ["a", "\n\nyes", "b"]
    assert terminal.end() == 0


def test_chat_reports_errors_of_a_server_and_continues(fake: FakeServer) -> None:
    terminal = Terminal("--url", fake.url)
    fake.refusal = Response('data: {"error": "no \\u001b[2Jmore"}\n\n')
    terminal.send("more?\n")
    assert "no \N{SYMBOL FOR ESCAPE}[2Jmore" in terminal.expect("> ")
    fake.close()
    terminal.send("anyone?\n")
    assert "error: url=" in terminal.expect("> ")
    assert terminal.end() == 0


def test_an_interrupt_stops_an_engines_answer() -> None:
    terminal = Terminal("--max-tokens", "400", "--ignore-eos", "--dtype", "float32", "--device", "cpu")
    terminal.send("What is dpkg?\n")
    terminal.expect("dpkg?\r\n")
    terminal.expect(" ")
    terminal.send(CTRL_C)
    terminal.expect("> ")
    terminal.send("/help\n")
    terminal.expect("Ctrl-C stops an answer.")
    terminal.expect("> ")
    assert terminal.end() == 0
