"""A small client of QMP: one command at a time, as a program or the command line needs it.

with Client(path) as client:
    print(client.execute("query-status"))
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from tetrarch._patience import patience
from tetrarch.errors import HostError, TetrarchError

__all__ = ["Client", "ControlError"]

_READ_BYTES = 64 << 10
_CONNECT_S = 10.0


class ControlError(TetrarchError):
    """What a machine answers to a command that it does not execute."""

    def __init__(self, description: str, error_class: str) -> None:
        super().__init__(description)
        self.error_class = error_class
        """As QMP names it: GenericError, CommandNotFound, DeviceNotFound, DeviceNotActive."""


class Client:
    """A connection with the control socket of a machine, ready for commands.

    Raises HostError where nobody answers there, and from every method once the machine has
    hung up.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = _CONNECT_S) -> None:
        """``timeout``: seconds until it is to be ready."""
        self._path = os.fspath(path)
        self._buffer = bytearray()
        self._events: deque[dict[str, Any]] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(self._path)
            first = self._message(timeout)
            if isinstance(refusal := first.get("error"), dict):
                raise HostError(str(refusal.get("desc")))
            self.greeting: dict[str, Any] = first.get("QMP", {})
            """Version and capabilities of the machine's side."""
            self.execute("qmp_capabilities", timeout=timeout)
        except ControlError:
            self._socket.close()
            raise
        except (OSError, HostError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or getattr(error, "cause", None) or error
            raise HostError(
                f"no machine answers at {self._path}: {reason}", mend="see whether it still runs"
            ) from error

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        descriptors: Sequence[int] = (),
    ) -> Any:
        """What the command returns. ``descriptors`` go with it, for getfd and add-fd.

        Raises ControlError where the machine refuses it, TimeoutError after ``timeout`` seconds:
        then the connection is of no more use.
        """
        message: dict[str, Any] = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        deadline = _deadline(timeout)
        try:
            self._socket.settimeout(patience(timeout))
            text = json.dumps(message).encode() + b"\n"
            sent = socket.send_fds(self._socket, [text], descriptors) if descriptors else 0
            self._socket.sendall(text[sent:])
        except TimeoutError:
            raise
        except OSError:  # what it said before it hung up is still to be read
            pass
        while True:
            answer = self._message(deadline - time.monotonic())
            if "return" in answer:
                return answer["return"]
            if (error := answer.get("error")) is not None:
                raise ControlError(error["desc"], error["class"])
            self._events.append(answer)

    def next_event(self, *names: str, timeout: float | None = None) -> dict[str, Any]:
        """The next event, of those ``names`` if any are given: others are dropped.

        Raises TimeoutError if none comes in ``timeout`` seconds.
        """
        deadline = _deadline(timeout)
        while True:
            if self._events:
                event = self._events.popleft()
            else:
                event = self._message(deadline - time.monotonic())
            if not names or event.get("event") in names:
                return event

    def fileno(self) -> int:
        """For who waits for an event among other things: there is something to be read. What
        ``execute`` has read is there already: ``next_event(timeout=0)``."""
        return self._socket.fileno()

    def close(self) -> None:
        """Also for a thread that waits here: it gets a HostError."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _message(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"nothing came from {self._path}")
            self._socket.settimeout(patience(left))
            try:
                data = self._socket.recv(_READ_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                raise HostError(
                    f"the machine at {self._path} has hung up", mend="it has ended: see its log"
                )
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise HostError(f"what listens at {self._path} speaks no QMP", mend="name another")
        return message


def _deadline(timeout: float | None) -> float:
    limit = patience(timeout)
    return math.inf if limit is None else time.monotonic() + limit
