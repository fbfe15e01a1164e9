"""The address at which the nodes of an engine meet, and the secret that they share."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from vllmlite.errors import BackendError, ParameterError

SECRET_VARIABLE = "VLLMLITE_RANKS_SECRET"
LEAST_SECRET = 16
"""Least bytes of a secret."""


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP port of node 0."""

    host: str
    port: int
    family: int
    resolved: str
    """The numeric address."""

    @classmethod
    def resolve(cls, host: str, port: int) -> Address:
        """Return the address of a host by its name or number. Raises ParameterError if it has none."""
        try:
            family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            raise ParameterError("master_addr", host, f"is no known host: {error}") from None
        return cls(host, port, family, str(found[0]))

    def __str__(self) -> str:
        """Return the address as users write it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this host can reach it."""
        return ipaddress.ip_address(self.resolved.partition("%")[0]).is_loopback

    def listen(self) -> socket.socket:
        """Return a socket that listens there. Raises ParameterError if it is not this host's, or BackendError."""
        found = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((self.resolved, self.port))
            found.listen()
        except OSError as error:
            found.close()
            if error.errno is not None and os.strerror(error.errno) == "Cannot assign requested address":
                raise ParameterError(
                    "master_addr", self.host, "is no address of this host, where node 0 runs"
                ) from None
            raise BackendError(f"node 0 cannot listen at {self}: {error.strerror}: see master_port") from None
        return found

    def connect(self, seconds: float) -> socket.socket:
        """Return a socket that is connected to it. Raises OSError."""
        found = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            found.settimeout(seconds)
            found.connect((self.resolved, self.port))
        except BaseException:
            found.close()
            raise
        return found


def shared_secret(file: str | None, address: Address) -> bytes:
    """Return the secret in ``file`` or in the environment; empty if there is none and ``address`` is this host's own.

    Raises ParameterError if one is needed or if it is too short."""
    name, text = SECRET_VARIABLE, os.environ.get(SECRET_VARIABLE, "").encode()
    if file is not None:
        name = "ranks_secret_file"
        try:
            text = Path(file).expanduser().read_bytes()
        except OSError as error:
            raise ParameterError(name, file, f"cannot be read: {error.strerror}") from None
    secret = text.strip()
    if not secret and file is None and address.is_loopback:
        return b""
    if len(secret) < LEAST_SECRET:
        accepted = f"must have at least {LEAST_SECRET} characters, such as those of `openssl rand -hex 32`"
        if not secret:
            accepted = (
                f"is needed, as other hosts can reach {address}: a secret that all nodes share; it {accepted}"
            )
        raise ParameterError(name, file or ("..." if secret else None), accepted)
    return secret
