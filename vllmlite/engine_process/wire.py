"""Messages between the client and the host of an engine: pickled values over a socket pair, each after its length."""

from __future__ import annotations

import pickle
import socket
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from vllmlite.engine.engine_output import EngineOutput
from vllmlite.errors import VllmliteError
from vllmlite.outputs import EngineStats

LENGTH = struct.Struct("!Q")
"""The length in bytes that precedes each message."""


@dataclass(slots=True)
class StepOutputs:
    """The outputs of a step. Outputs that consist of one token and nothing else are sent as ``request_ids`` and
    ``token_ids``."""

    time: float
    """Time at which the step ended, from :func:`time.monotonic`, which is the same clock for all processes."""
    stats: EngineStats
    request_ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    outputs: list[EngineOutput] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A call of a method of the engine."""

    name: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    question: int | None = None
    """Number of the :class:`Answer` that the host sends back; None: the host sends none."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The value that an :class:`EngineCall` returned, or the error that it raised. Answers come in any order."""

    question: int
    value: Any = None
    error: VllmliteError | None = None


class HostHandle(Protocol):
    """The thread or process in which a host runs, as the client sees it."""

    connection: socket.socket
    """The client's end of the socket pair."""

    def wait_for_end(self) -> str:
        """Wait for the host to end, which it does once the connection is closed. Returns a description of how it
        ended."""
        ...


def pack(message: object) -> bytes:
    """Return ``message`` in the form in which it is sent over the socket."""
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(content)) + content


def unpack(stream: BinaryIO) -> Any:
    """Wait for the next message and return it. Raises EOFError after the last."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(head)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError  # the sender was killed
    return pickle.loads(content)


def has_logprobs(output: EngineOutput) -> bool:
    """Return whether an output carries log-probabilities, which belong to one step."""
    return output.logprobs is not None or output.prompt_logprobs is not None
