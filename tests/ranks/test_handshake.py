"""How nodes meet: who does not know the secret, differs or comes twice is refused, and who is missing is named."""

from __future__ import annotations

import hmac
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from vllmlite.errors import BackendError, ParameterError
from vllmlite.ranks.address import SECRET_VARIABLE, Address, shared_secret
from vllmlite.ranks.handshake import PROTOCOL, Introduction, Joined, Listener, join

SECRET = b"a secret of sixteen bytes or more"
OWN = Introduction(PROTOCOL, "1.0", 0, "first", 1, b"model", {"dtype": "'float32'"})


def other(node: int = 1) -> Introduction:
    return replace(OWN, node=node, host="second", pid=2)


@pytest.fixture
def address() -> Address:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Address.resolve("127.0.0.1", free.getsockname()[1])


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def gathering(
    pool: ThreadPoolExecutor, address: Address, nodes: int = 2, seconds: float = 20
) -> Future[list[Joined]]:
    """Node 0, which listens when this returns."""
    return pool.submit(Listener(address, OWN, SECRET, nodes, 77).gather, seconds)


def close(*joined: Joined) -> None:
    for each in joined:
        each.connection.close()


def test_nodes_that_know_the_secret_come_together(address: Address, pool: ThreadPoolExecutor) -> None:
    late = pool.submit(join, address, other(2), SECRET, 20)  # node 0 does not listen yet
    found = gathering(pool, address, 3)
    second = join(address, other(1), SECRET, 20)
    third = late.result()
    first, last = found.result()
    assert [first.node, last.node, second.node] == [1, 2, 0] and second.seed == 77
    assert (first.send_key, first.receive_key) == (second.receive_key, second.send_key)
    assert len({first.send_key, first.receive_key, last.send_key, last.receive_key}) == 4
    close(first, last, second, third)
    with pytest.raises(OSError):
        address.connect(1)  # nobody else can come


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.9"}, r"vllmlite 0.9 runs on node 1 \(process 2 on second\), 1.0 on node 0"),
        ({"model": b"another"}, r"the model's files on node 1 \(process 2 on second\) differ"),
        ({"options": {"dtype": "'float16'"}}, r"dtype is 'float16' on node 1 .*, 'float32' on node 0"),
        ({"options": {}}, "dtype is None on node 1"),
    ],
    ids=["version", "model", "options", "missing option"],
)
def test_a_node_that_differs_is_named_on_both(
    changes: dict[str, object], message: str, address: Address, pool: ThreadPoolExecutor
) -> None:
    found = gathering(pool, address)
    with pytest.raises(BackendError, match=f"node 0 at .* does not accept node 1 .*: {message}"):
        join(address, replace(other(), **changes), SECRET, 20)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=message):
        found.result()


def test_others_are_refused_and_change_nothing(address: Address, pool: ThreadPoolExecutor) -> None:
    """A wrong secret, a second rank 0, a node that is there already, and one too many."""
    found = gathering(pool, address, 3)
    with pytest.raises(BackendError, match="it does not know the secret"):
        join(address, other(), b"another secret of many bytes", 20)
    first = join(address, other(1), SECRET, 20)
    for node, message in (
        (0, r"there is a node 0 already: node 0 \(process 1 on first\)"),
        (1, r"there is a node 1 already: node 1 \(process 2 on second\)"),
        (3, "node_rank=3: must be less than 3"),
    ):
        with pytest.raises(BackendError, match=message):
            join(address, other(node), SECRET, 20)
    close(first, join(address, other(2), SECRET, 20), *found.result())


def test_garbage_changes_nothing(address: Address, pool: ThreadPoolExecutor) -> None:
    found = gathering(pool, address)
    for content in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!I", 5) + b"short",
        bytes(4),
        b"\xff" * 70_000,
    ):
        with address.connect(5) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
    close(join(address, other(), SECRET, 20), *found.result())


def recorded(address: Address, answer: Callable[[bytes], list[bytes]]) -> threading.Thread:
    """A process that sends what ``answer`` returns for what it has received so far."""
    listener = address.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            for step in (b"", b"introduced"):
                if step:
                    connection.recv(65536)
                for message in answer(step):
                    connection.sendall(struct.pack("!I", len(message)) + message)
            connection.recv(65536)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_a_recording_of_a_handshake_lets_nobody_in(address: Address, pool: ThreadPoolExecutor) -> None:
    """An introduction and a welcome that were valid once are not for another challenge and another nonce."""
    sent: dict[str, list[bytes]] = {"hub": [], "node": []}
    with socket.create_server(("127.0.0.1", 0)) as between:
        proxy = Address.resolve("127.0.0.1", between.getsockname()[1])
        found = gathering(pool, address)
        joining = pool.submit(join, proxy, other(), SECRET, 20)
        near, _ = between.accept()
        far = address.connect(5)
        with near, far:
            for name, source, target in (("hub", far, near), ("node", near, far), ("hub", far, near)):
                (size,) = struct.unpack("!I", source.recv(4))
                sent[name].append(source.recv(size, socket.MSG_WAITALL))
                target.sendall(struct.pack("!I", size) + sent[name][-1])
            close(joining.result(), *found.result())
    again = gathering(pool, address)
    with address.connect(5) as connection:
        connection.recv(65536)
        connection.sendall(struct.pack("!I", len(sent["node"][0])) + sent["node"][0])
        assert b"does not know the secret" in connection.recv(65536)
    close(join(address, other(), SECRET, 20), *again.result())
    challenge, welcome = sent["hub"]
    thread = recorded(address, lambda step: [welcome] if step else [challenge])
    with pytest.raises(BackendError, match="does not know the secret of this node"):
        join(address, other(), SECRET, 20)
    thread.join()


def test_a_strange_process_is_named(address: Address) -> None:
    thread = recorded(address, lambda step: [] if step else [b"220 mail ESMTP"])
    with pytest.raises(BackendError, match=r"the process at 127.* is not node 0 of this version of vllmlite"):
        join(address, other(), SECRET, 20)
    thread.join()


def test_missing_nodes_are_named(address: Address, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BackendError, match=r"nodes 1, 2 of 3 did not join at 127.0.0.1:\d+ within 0 s"):
        Listener(address, OWN, SECRET, 3, 0).gather(0.1)
    with pytest.raises(BackendError, match=r"node 0 cannot be reached at .* within 0 s: Connection refused"):
        join(address, other(), SECRET, 0.1)


def test_an_address_that_cannot_be_used_is_named(address: Address) -> None:
    with pytest.raises(ParameterError, match=r"master_addr='no\.such\.host\.invalid': is no known host"):
        Address.resolve("no.such.host.invalid", 1)
    with pytest.raises(ParameterError, match=r"master_addr='192\.0\.2\.1': is no address of this host"):
        Address.resolve("192.0.2.1", 1).listen()
    with address.listen(), pytest.raises(BackendError, match=r"cannot listen at .*: Address already in use"):
        address.listen()


def test_a_secret_is_needed_off_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = Address.resolve("127.0.0.1", 1), Address.resolve("192.0.2.1", 1)
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    assert shared_secret(None, near) == b""
    with pytest.raises(ParameterError, match=r"is needed, as other hosts can reach 192\.0\.2\.1:1"):
        shared_secret(None, far)
    file = tmp_path / "secret"
    for content, good in ((b"short", False), (b"", False), (SECRET + b"\n", True)):
        file.write_bytes(content)
        for address in (near, far):
            if good:
                assert shared_secret(str(file), address) == SECRET
                continue
            with pytest.raises(ParameterError, match="at least 16 characters") as raised:
                shared_secret(str(file), address)
            assert "short" not in str(raised.value)
    monkeypatch.setenv(SECRET_VARIABLE, SECRET.decode())
    assert shared_secret(None, far) == SECRET
    with pytest.raises(ParameterError, match="ranks_secret_file='/none': cannot be read"):
        shared_secret("/none", far)


def test_the_codes_are_hmac_sha_256() -> None:
    """The code of an introduction is over the digests of challenge and introduction, with its purpose."""
    from vllmlite.ranks.handshake import _code

    content = b"node\0" + sha256(b"challenge").digest() + sha256(b"introduction").digest()
    assert _code(SECRET, "node", b"challenge", b"introduction") == hmac.digest(SECRET, content, "sha256")
