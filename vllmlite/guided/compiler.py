"""Compilation of grammars in child processes with limits on time and memory.

A short schema or expression can describe an automaton that does not fit any machine. The first grammar starts a
compiler process, which imports xgrammar, receives the tokenizer's vocabulary and forks a child for each grammar. The
child compiles the grammar, and either dies at a limit or answers with a :class:`Prepared` grammar. Several children run
at once, so that a quick grammar does not wait for a slow one. The receiver compiles the prepared grammar again with
:func:`compile_prepared`, now known to stay within the limits. xgrammar's serialised form of a compiled grammar is not
sent: it contains the whole automaton once for each rule, so its size grows quadratically (482 MB for a grammar that
compiles in 3 s), and reading it takes longer than compiling. The compiler process ends after :data:`IDLE_SECONDS`
without work.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllmlite.errors import ParameterError, VllmliteError
from vllmlite.guided import gbnf
from vllmlite.guided.json_grammar import grammar_of, with_grammars

PLACE_IN_SOURCE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
"""The time and source line with which xgrammar's C++ part begins its errors."""
START_SECONDS = 120
"""Time limit for starting the compiler process: importing xgrammar may import torch."""
COMPILE_SECONDS = 10
"""CPU time limit of a compilation; CPU time does not depend on the load of the machine."""
WAIT_FACTOR = 4
"""The wall-clock limit of a child, as a multiple of its CPU time limit."""
COMPILE_BYTES = 1 << 30
"""Maximum bytes of address space that a compilation may add to the process."""
RESULT_BYTES = 128 << 20
"""Maximum size of a compiled grammar in memory."""
PARALLEL = 4
"""Number of grammars that are compiled at once."""
TRIED_TOKENS = 8
MASK_SECONDS = 0.1
"""Maximum CPU time per mask, averaged over the first TRIED_TOKENS tokens."""
GRACE_SECONDS = 10
"""Seconds after a child's wall-clock limit at which the compiler process itself is given up."""
IDLE_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Prepared:
    """A grammar known to compile within the limits, in a form that :func:`compile_prepared` accepts."""

    kind: str
    """``grammar`` (serialised by xgrammar, not compiled), ``structural_tag`` or ``lark``."""
    text: str


def compile_prepared(compiler: Any, prepared: Prepared) -> Any:
    """Compile ``prepared`` with an ``xgrammar.GrammarCompiler`` and return xgrammar's compiled grammar."""
    from xgrammar import Grammar

    if prepared.kind == "grammar":
        return compiler.compile_grammar(Grammar.deserialize_json(prepared.text))
    if prepared.kind == "structural_tag":
        return compiler.compile_structural_tag(prepared.text)
    return compiler.compile_lark(prepared.text)


class Vocabulary:
    """The tokenizer's vocabulary, for which grammars are compiled."""

    def __init__(self, texts: Sequence[str], kind: str, size: int, eos_ids: Sequence[int]) -> None:
        """``texts[id]`` is the token as the tokenizer writes it; ``kind`` is RAW, BYTE_LEVEL or BYTE_FALLBACK; ``size``
        is the number of ids of the model."""
        self.texts = list(texts)
        self.kind = kind
        self.size = size
        self.eos_ids = list(eos_ids)

    def tokenizer_info(self) -> Any:
        """Return the vocabulary as an ``xgrammar.TokenizerInfo``."""
        import xgrammar

        kind = xgrammar.VocabType[self.kind]
        return xgrammar.TokenizerInfo(
            self.texts, kind, vocab_size=self.size, stop_token_ids=self.eos_ids or None
        )

    def compiler(self) -> Any:
        """Return an ``xgrammar.GrammarCompiler`` for this vocabulary."""
        return compiler_for(self.tokenizer_info())


def compiler_for(tokenizer_info: Any) -> Any:
    """Return an ``xgrammar.GrammarCompiler`` without a cache and without threads."""
    import xgrammar

    return xgrammar.GrammarCompiler(tokenizer_info, max_threads=1, cache_enabled=False)


class GrammarCompiler:
    """Client of the compiler process. Thread-safe."""

    def __init__(
        self, vocabulary: Vocabulary, seconds: int = COMPILE_SECONDS, memory: int = COMPILE_BYTES
    ) -> None:
        """Set the limits of each grammar: ``seconds`` of CPU time and bytes of ``memory``. The first call of
        :meth:`compile` starts the process."""
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._starting = threading.Lock()

    def compile(self, kind: str, source: Any) -> Prepared:
        """Compile ``source`` within the limits. Raises :class:`ParameterError` if it is invalid or exceeds them."""
        with self._starting:
            if self._process is None or self._process.poll() is not None:
                self._start()
            control = self._control
        assert control is not None
        ours, theirs = socket.socketpair()
        try:
            with Connection(ours.detach()) as connection:
                with theirs:
                    socket.send_fds(control, [b"+"], [theirs.fileno()])
                connection.send_bytes(json.dumps([kind, source]).encode())
                if not connection.poll(self._seconds * WAIT_FACTOR + GRACE_SECONDS):
                    raise TimeoutError
                found = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise VllmliteError("the process that compiles grammars has ended") from None
        if "error" in found:
            raise ParameterError("structured_outputs", {kind: source}, found["error"])
        return Prepared(found["kind"], found["text"])

    def close(self) -> None:
        """End the process."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        path = [str(Path(__file__).resolve().parents[2]), *sys.path]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vllmlite.guided.compiler", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
                start_new_session=True,  # Ctrl-C must not reach it
            )
        self._control = ours
        setting = {**vars(self._vocabulary), "seconds": self._seconds, "memory": self._memory}
        try:
            with Connection(os.dup(ours.fileno())) as connection:
                connection.send_bytes(json.dumps(setting).encode())
                ready = connection.poll(START_SECONDS) and connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.close()
            raise VllmliteError("the process that compiles grammars did not start")


def main(descriptor: int) -> None:
    """Run the compiler process: fork a child for each connection received over the socket ``descriptor``, until it is
    closed or idle too long."""
    with Connection(os.dup(descriptor)) as connection:
        setting = json.loads(connection.recv_bytes())
        seconds, memory = setting.pop("seconds"), setting.pop("memory")
        compiler = Vocabulary(**setting).compiler()
        connection.send_bytes(b"ready")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(fileno=descriptor) as control:
        control.settimeout(IDLE_SECONDS)
        with suppress(TimeoutError):
            while fds := socket.recv_fds(control, 1, 1)[1]:
                if os.fork() == 0:
                    control.close()
                    with suppress(EOFError, OSError):  # the client has ended
                        _serve(Connection(fds[0]), compiler, seconds, memory)
                    os._exit(0)
                os.close(fds[0])


def _serve(connection: Connection, compiler: Any, seconds: int, memory: int) -> None:
    """Compile one grammar in a child process, and send an error if the child dies at a limit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kind, source = json.loads(connection.recv_bytes())
    child = os.fork()
    if child == 0:
        # The default action of these signals ends the process even inside native code.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(seconds * WAIT_FACTOR)
        _limit(resource.RLIMIT_AS, _address_space() + memory)
        answer = json.dumps(_answer(compiler, kind, source)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        connection.send_bytes(answer)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        limit = f"{seconds} s of processor time" if late else f"{memory >> 20} MiB"
        error = {"error": f"takes more than {limit} to compile and try: simplify it"}
        connection.send_bytes(json.dumps(error).encode())


def _answer(compiler: Any, kind: str, source: Any) -> dict[str, str]:
    try:
        prepared = _prepared(compiler, kind, source)
        compiled = compile_prepared(compiler, prepared)
        if (fault := _fault(compiled)) is not None:
            return {"error": fault}
    except MemoryError:
        os._exit(1)
    except Exception as error:  # xgrammar's own kinds, and RuntimeError of its C++ part
        if "bad_alloc" in str(error):
            os._exit(1)
        return {"error": f"has no grammar: {' '.join(PLACE_IN_SOURCE.sub('', str(error)).split())[-300:]}"}
    size = compiled.memory_size_bytes
    if size > RESULT_BYTES:
        return {"error": f"is compiled to {size} bytes, over the limit of {RESULT_BYTES}: simplify it"}
    return {"kind": prepared.kind, "text": prepared.text}


def _prepared(compiler: Any, kind: str, source: Any) -> Prepared:
    from xgrammar import Grammar

    if kind == "structural_tag":
        return Prepared(kind, json.dumps(with_grammars(source)))
    if kind == "grammar" and "::=" not in source:
        if hasattr(compiler, "compile_lark"):
            return Prepared("lark", source)
        raise ValueError("has no rule name ::= ..., and this version of xgrammar does not read Lark's form")
    if kind == "json":
        grammar = grammar_of(source)
    elif kind == "regex":
        grammar = Grammar.from_regex(source)
    elif kind == "choice":
        words = " | ".join(json.dumps(word, ensure_ascii=False) for word in source)
        grammar = Grammar.from_ebnf(f"root ::= {words}")
    else:
        grammar = Grammar.from_ebnf(gbnf.readable(source))
    return Prepared("grammar", grammar.serialize_json())


def _fault(compiled: Any) -> str | None:
    """Return the reason why a grammar is refused (it allows no first token, or its first masks take too long), or None.
    The engine computes one mask per token, and all other requests wait for it."""
    import numpy as np
    import xgrammar

    info = compiled.tokenizer_info
    mask = np.empty((1, -(-info.vocab_size // 32)), np.int32)
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=not info.stop_token_ids)
    begun = time.process_time()
    for number in range(TRIED_TOKENS):
        if not matcher.fill_next_token_bitmask(mask):
            mask[:] = -1
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: info.vocab_size])
        if not number and not allowed.size:
            return "allows no output that the model could write"
        if time.process_time() - begun > MASK_SECONDS * TRIED_TOKENS:
            return f"takes more than {MASK_SECONDS} s a token to follow: simplify it"
        if not allowed.size or not matcher.accept_token(int(allowed[allowed.size // 2])):
            break
        if matcher.is_terminated():
            break
    return None


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]))
