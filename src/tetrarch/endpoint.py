"""Where programs find something of a machine, as it is written down: ``PORT``, ``HOST:PORT`` or a
path; and the socket that listens there."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from tetrarch.errors import HostError, ValueProblem
from tetrarch.sockets import Backlog, ListeningSocket

__all__ = ["Endpoint", "ListeningPort", "listen"]

_TCP = re.compile(r"(?:(\[[^\]]*\]|[^:/]*):)?(-?[0-9]+)")
_LOCALHOST = "127.0.0.1"
_BACKLOG = 16


@dataclass(frozen=True)
class Endpoint:
    """A TCP port, or a Unix socket."""

    path: Path | None = None
    host: str = _LOCALHOST
    port: int = 0

    #: Who comes there.
    WHO: ClassVar[str] = "programs"

    @classmethod
    def parse(cls, value: object) -> Self:
        """Raises ValueProblem."""
        if isinstance(value, cls):
            return value
        nowhere = ValueProblem(f"{value!r} is no place for {cls.WHO}", mend="write PORT or PATH")
        if isinstance(value, bool) or not isinstance(value, (int, str, os.PathLike)):
            raise nowhere
        match = None if isinstance(value, os.PathLike) else _TCP.fullmatch(str(value))
        if match is None:
            text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
            if not text or "\0" in text:
                raise nowhere
            return cls(path=Path(text))
        # Compared as text: a number can have more digits than int() takes.
        port = match[2].lstrip("0") or "0"
        if len(port) > 5 or not 0 <= int(port) <= 0xFFFF:
            raise ValueProblem(f"{match[2]} is no TCP port", mend="give one up to 65535")
        return cls(host=(match[1] or _LOCALHOST).strip("[]"), port=int(port))

    def relative_to(self, directory: Path) -> Self:
        """With its path as it is written in a file of that directory."""
        return self if self.path is None else replace(self, path=directory / self.path)

    def __str__(self) -> str:
        """As ``parse`` takes it."""
        if self.path is not None:
            text = str(self.path)
            return f"./{text}" if _TCP.fullmatch(text) else text
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class ListeningPort:
    """As ``ListeningSocket``, for a TCP port."""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError, and UnicodeError for what can be no host's name."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        name, number, *_ = self._socket.getsockname()
        self.address = str(Endpoint(host=name, port=number))
        self._backlog = Backlog(self._socket, self.address)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        return self._backlog.closed

    def accept(self) -> socket.socket | None:
        client = self._backlog.accept()
        if client is not None:
            with suppress(OSError):  # it was in a hurry, and is gone by now
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def close(self) -> None:
        self._backlog.close()


def listen(place: Endpoint) -> tuple[ListeningSocket | ListeningPort, str]:
    """A socket that listens there, and its address for who is to connect. Raises HostError."""
    if place.path is not None:
        return ListeningSocket(place.path, place.WHO), str(place.path)
    try:
        listener = ListeningPort(place.host, place.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostError(
            f"cannot listen for {place.WHO} on {place}: {reason}", mend="give another port"
        ) from error
    return listener, listener.address
