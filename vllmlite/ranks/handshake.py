"""How the nodes of an engine come together: node 0 listens at one address, the others join it there.

Both ends prove with HMAC-SHA-256 that they know the same secret, without sending it:

1. node 0 sends a :class:`Challenge`, whose nonce is random;
2. the other sends an :class:`Introduction` with its own nonce, and a code over challenge and introduction;
3. node 0 sends a :class:`Welcome` and a code over all three, or a :class:`Refusal`.

So an old recording proves nothing. The keys of the two directions of the connection are derived from the secret and all
three messages. Versions, the model and the options that must be equal are compared before anything is loaded."""

from __future__ import annotations

import hmac
import logging
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256

from vllmlite.errors import BackendError
from vllmlite.ranks.address import Address
from vllmlite.ranks.encoding import Encoding, EncodingError

logger = logging.getLogger(__name__)

PROTOCOL = 1
"""Version of the messages between hosts."""
ANSWER_SECONDS = 4.0
"""Time in which a message of the other end must have come."""
NAMED_SECONDS = 5.0
"""Time after which the log says who is being waited for; again whenever it has doubled."""
MOST_GUESTS = 32
"""Most connections that node 0 examines at a time."""
MOST_BYTES = 64 << 10
"""Most bytes of a message."""
CODE_BYTES = 32
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Challenge:
    """Node 0's first message."""

    protocol: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who a node is, and what must be equal on all nodes."""

    protocol: int
    version: str
    node: int
    host: str
    pid: int
    model: bytes
    """Digest of the checkpoint."""
    options: dict[str, str]
    """Options that must be equal, as text."""
    nonce: bytes = b""

    def __str__(self) -> str:
        """Name the node."""
        return f"node {self.node} (process {self.pid} on {self.host})"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a node may not join."""

    reason: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """Node 0 accepts a node."""

    host: str
    pid: int
    seed: int


@dataclass(frozen=True, slots=True)
class Joined:
    """An authenticated connection to another node."""

    node: int
    host: str
    connection: socket.socket
    send_key: bytes
    receive_key: bytes
    seed: int
    """The engine's seed, which node 0 has chosen."""


_ENCODING = Encoding(Challenge, Introduction, Refusal, Welcome)


class UnknownSecretError(BackendError):
    """The other end does not know the secret, or is no node at all."""


def _send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket) -> bytes:
    """Return the next message. Raises UnknownSecretError for what cannot be one, and OSError."""

    deadline = time.monotonic() + ANSWER_SECONDS

    def read(size: int) -> bytes:
        content = b""
        while len(content) < size:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(min(size - len(content), MOST_BYTES))
            if not piece:
                raise ConnectionError("the connection was closed")
            content += piece
        return content

    (size,) = _LENGTH.unpack(read(_LENGTH.size))
    if size > MOST_BYTES:
        raise UnknownSecretError("its first bytes are no message of vllmlite")
    return read(size)


def _code(secret: bytes, purpose: str, *messages: bytes) -> bytes:
    digests = b"".join(sha256(message).digest() for message in messages)
    return hmac.digest(secret, purpose.encode() + b"\0" + digests, "sha256")


def _split(content: bytes) -> tuple[bytes, bytes]:
    return content[:-CODE_BYTES], content[-CODE_BYTES:]


def _keys(secret: bytes, *messages: bytes) -> tuple[bytes, bytes]:
    """Return the keys of frames to node 0 and of those from it."""
    return _code(secret, "to node 0", *messages), _code(secret, "from node 0", *messages)


def differences(own: Introduction, other: Introduction) -> str:
    """Return how ``other`` differs from ``own`` in what must be equal, or an empty string."""
    if (other.protocol, other.version) != (own.protocol, own.version):
        return f"vllmlite {other.version} runs on {other}, {own.version} on {own}"
    for name in sorted(own.options.keys() | other.options.keys()):
        here, there = own.options.get(name), other.options.get(name)
        if here != there:
            return f"{name} is {there} on {other}, {here} on {own}: it must be equal"
    if other.model != own.model:
        return f"the model's files on {other} differ from those on {own}"
    return ""


class Listener:
    """Node 0, while the others join it. Closed as soon as all have, so that nobody can connect later."""

    def __init__(self, address: Address, own: Introduction, secret: bytes, nodes: int, seed: int) -> None:
        """Listen at ``address`` and nowhere else. Raises ParameterError if that is not possible."""
        self._address, self._own, self._secret, self._nodes, self._seed = address, own, secret, nodes, seed
        self._guests = threading.BoundedSemaphore(MOST_GUESTS)
        self._results: queue.Queue[Joined | BackendError] = queue.Queue()
        self._lock = threading.Lock()
        self._names: dict[int, str] = {own.node: str(own)}
        """Nodes that have joined."""
        self._rejected = ""
        """How the last one who does not know the secret was rejected."""
        self._socket = address.listen()

    def gather(self, seconds: float) -> list[Joined]:
        """Return the connections to all other nodes. Raises BackendError, naming those that are missing after
        ``seconds`` and what is wrong with one that knows the secret."""
        thread = threading.Thread(target=self._accept, name="vllmlite-listener", daemon=True)
        thread.start()
        joined: list[Joined] = []
        waiting = _Patience(seconds, lambda: f"waiting at {self._address} for {self._missing()}")
        try:
            while len(joined) < self._nodes - 1:
                try:
                    result = self._results.get(timeout=waiting.next())
                except queue.Empty:
                    if waiting.is_over():
                        raise BackendError(
                            f"{self._missing()} did not join at {self._address} within {seconds:.0f} s"
                        ) from None
                    continue
                if isinstance(result, BackendError):
                    raise result
                joined.append(result)
        except BaseException:
            for each in joined:
                each.connection.close()
            raise
        finally:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        return sorted(joined, key=lambda each: each.node)

    def _missing(self) -> str:
        numbers = [str(node) for node in range(self._nodes) if node not in self._names]
        rejected = f" ({self._rejected})" if self._rejected else ""
        return f"node{'s' * (len(numbers) > 1)} {', '.join(numbers)} of {self._nodes}{rejected}"

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._socket.accept()
            except OSError:
                return  # closed
            if not self._guests.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._examine, args=(connection, peer[0]), daemon=True).start()

    def _examine(self, connection: socket.socket, peer: str) -> None:
        """Let a node in, or say why not."""
        try:
            self._results.put(self._let_in(connection))
        except (OSError, UnknownSecretError, EncodingError) as error:
            connection.close()
            self._rejected = f"a process at {peer} was rejected: {error}"
            logger.warning("%s", self._rejected)
        except BackendError as error:
            connection.close()
            self._results.put(error)
        finally:
            self._guests.release()

    def _let_in(self, connection: socket.socket) -> Joined:
        """Examine a node. Raises BackendError if it knows the secret and differs, UnknownSecretError otherwise."""
        challenge = _ENCODING.encode(Challenge(PROTOCOL, secrets.token_bytes(32)))
        _send(connection, challenge)
        introduction, code = _split(_receive(connection))
        if not hmac.compare_digest(code, _code(self._secret, "node", challenge, introduction)):
            self._refuse(connection, "it does not know the secret")
            raise UnknownSecretError("it does not know the secret")
        other = _ENCODING.decode(introduction)
        if not isinstance(other, Introduction):
            raise UnknownSecretError("its first message is no introduction")
        if found := differences(self._own, other):
            self._refuse(connection, found)
            raise BackendError(found)
        with self._lock:
            if other.node in self._names:
                reason = f"there is a node {other.node} already: {self._names[other.node]}"
            elif not 0 <= other.node < self._nodes:
                reason = f"node_rank={other.node}: must be less than {self._nodes}, the number of nodes"
            else:
                reason = ""
                self._names[other.node] = str(other)
        if reason:
            self._refuse(connection, reason)
            raise UnknownSecretError(f"{other}: {reason}")
        welcome = _ENCODING.encode(Welcome(self._own.host, self._own.pid, self._seed))
        messages = challenge, introduction, welcome
        _send(connection, welcome + _code(self._secret, "welcome", *messages))
        connection.settimeout(None)
        to_hub, from_hub = _keys(self._secret, *messages)
        return Joined(other.node, other.host, connection, from_hub, to_hub, self._seed)

    def _refuse(self, connection: socket.socket, reason: str) -> None:
        with suppress(OSError):
            _send(connection, _ENCODING.encode(Refusal(reason)))


def join(address: Address, own: Introduction, secret: bytes, seconds: float) -> Joined:
    """Join node 0, which may start within ``seconds``. Raises BackendError, saying why it is not possible."""
    problem = "no answer"
    waiting = _Patience(seconds, lambda: f"waiting for node 0 at {address}: {problem}")
    while True:
        try:
            connection = address.connect(min(waiting.next(), ANSWER_SECONDS))
        except OSError as error:
            problem = error.strerror or str(error) or type(error).__name__
            if waiting.is_over():
                raise BackendError(
                    f"node 0 cannot be reached at {address} within {seconds:.0f} s: {problem}; check master_addr and "
                    "master_port, and that node 0 runs"
                ) from None
            time.sleep(0.2)
            continue
        try:
            return _introduced(connection, address, own, secret)
        except ConnectionError:  # it has just ended, or all have joined
            connection.close()
            problem = "it closed the connection"
            if waiting.is_over():
                raise BackendError(f"node 0 at {address} closed the connection") from None
            time.sleep(0.2)
        except TimeoutError:
            connection.close()
            raise BackendError(
                f"the process at {address} does not answer as node 0 of vllmlite does"
            ) from None
        except BaseException:
            connection.close()
            raise


def _introduced(connection: socket.socket, address: Address, own: Introduction, secret: bytes) -> Joined:
    """Return an authenticated connection to node 0."""
    strange = f"the process at {address} is not node 0 of this version of vllmlite"
    try:
        challenge = _receive(connection)
        found = _ENCODING.decode(challenge)
        if not isinstance(found, Challenge) or found.protocol != PROTOCOL:
            raise BackendError(strange)
        introduction = _ENCODING.encode(replace(own, nonce=secrets.token_bytes(32)))
        _send(connection, introduction + _code(secret, "node", challenge, introduction))
        answer = _receive(connection)
        with suppress(EncodingError):
            refusal = _ENCODING.decode(answer)
            if isinstance(refusal, Refusal):
                raise BackendError(f"node 0 at {address} does not accept {own}: {refusal.reason}")
        welcome, code = _split(answer)
        messages = challenge, introduction, welcome
        if not hmac.compare_digest(code, _code(secret, "welcome", *messages)):
            raise BackendError(f"the process at {address} does not know the secret of this node")
        greeting = _ENCODING.decode(welcome)
    except (UnknownSecretError, EncodingError):
        raise BackendError(strange) from None
    if not isinstance(greeting, Welcome):
        raise BackendError(strange)
    connection.settimeout(None)
    to_hub, from_hub = _keys(secret, *messages)
    return Joined(0, greeting.host, connection, to_hub, from_hub, greeting.seed)


class _Patience:
    """A deadline, before which the log says now and then what is being waited for."""

    def __init__(self, seconds: float, what: Callable[[], str]) -> None:
        self._what = what
        self._begin = time.monotonic()
        self._end, self._say = self._begin + seconds, self._begin + NAMED_SECONDS

    def next(self) -> float:
        """Return how long to wait before the next look."""
        now = time.monotonic()
        if self._say <= now < self._end:
            logger.warning("%s", self._what())
            self._say = now + (now - self._begin)
        return max(min(self._say, self._end) - now, 0.01)

    def is_over(self) -> bool:
        return time.monotonic() >= self._end
