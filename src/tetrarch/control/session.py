"""One client of the control socket: negotiation, then commands one after the other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from tetrarch.control.commands import COMMANDS
from tetrarch.control.json_stream import JsonStream, NotJson, TooLarge
from tetrarch.control.monitor import Descriptors, Monitor
from tetrarch.control.outgoing import Outgoing
from tetrarch.control.protocol import (
    QmpError,
    Request,
    encode,
    error_reply,
    event_message,
    greeting,
    parse_request,
    reply,
)
from tetrarch.errors import TetrarchError
from tetrarch.machine.breakpoints import Breakpoint
from tetrarch.machine.events import MachineEvent
from tetrarch.machine.log import MachineLog
from tetrarch.machine.machine import Machine

__all__ = ["Session"]

_READ_BYTES = 64 << 10
# With one message; the kernel drops what is more.
_DESCRIPTORS_MAX = 16
# How long a client may take for the last that it was sent.
_LAST_S = 2.0
_NEGOTIATION = "qmp_capabilities"


class Session:
    def __init__(self, connection: socket.socket, machine: Callable[[], Machine | None]) -> None:
        """``machine`` gives it while it is there."""
        self._connection = connection
        self._machine = machine
        self._outgoing = Outgoing(connection)
        self._descriptors = Descriptors()
        self._points: dict[str, Breakpoint] = {}
        self._negotiated = False
        # Held for a command and until its answer is on its way.
        self._turn = threading.Lock()

    def run(self) -> None:
        """Serves the client until one of the two hangs up."""
        self._outgoing.reply(encode(greeting()))
        stream = JsonStream()
        try:
            while data := self._read():
                for text in stream.feed(data):
                    with self._turn:
                        if not self._answer(text):
                            return
        except TooLarge as error:
            self._outgoing.reply(encode(error_reply(QmpError(f"JSON parse error, {error}"))))
        finally:
            self._descriptors.close()
            for point in self._points.values():
                with suppress(TetrarchError):  # the machine has ended, or cannot be stopped
                    point.remove()
            self._outgoing.end(time.monotonic() + _LAST_S)

    def tell(self, event: MachineEvent) -> None:
        """From any thread; never waits."""
        if self._negotiated:
            self._outgoing.event(encode(event_message(event.name, event.data, event.time)))

    def tell_own(self, name: str, data: Mapping[str, Any]) -> None:
        """An event for this client alone."""
        self._outgoing.event(encode(event_message(name, data, time.time())))

    def end(self, deadline: float) -> None:
        """Hangs up, when the client has the answers that it waits for."""
        answered = self._turn.acquire(timeout=max(deadline - time.monotonic(), 0))
        self._outgoing.end(deadline)
        if answered:
            self._turn.release()

    def _read(self) -> bytes:
        try:
            data, sent, _, _ = socket.recv_fds(self._connection, _READ_BYTES, _DESCRIPTORS_MAX)
        except OSError:  # hung up on
            return b""
        self._descriptors.take(sent)
        return data

    def _answer(self, text: bytes | NotJson) -> bool:
        """False: nobody waits for further answers."""
        tag = {}
        try:
            request = parse_request(text)
            tag = request.tag
            answer = reply(self._execute(request))
        except QmpError as error:
            answer = error_reply(error)
        return self._outgoing.reply(encode(answer | tag))

    def _execute(self, request: Request) -> object:
        name = request.execute
        if not self._negotiated:
            self._negotiate(request)
            return None
        if name == _NEGOTIATION:
            raise QmpError("Capabilities negotiation is already complete", "CommandNotFound")
        command, machine = COMMANDS.get(name), self._machine()
        if command is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        if machine is None:
            raise QmpError("the machine has ended")
        try:
            monitor = Monitor(machine, self._descriptors, self._points, self.tell_own)
            return command.execute(monitor, request.arguments)
        except QmpError:
            raise
        except Exception as error:
            log = MachineLog(machine.config.name)
            log.error("%s failed: %s: %s; please report it", name, type(error).__name__, error)
            log.debug("where %s failed", name, exc_info=error)
            raise QmpError(f"{name} failed: {type(error).__name__}: {error}") from error

    def _negotiate(self, request: Request) -> None:
        if request.execute != _NEGOTIATION:
            raise QmpError(
                f"Expecting capabilities negotiation with '{_NEGOTIATION}'", "CommandNotFound"
            )
        unknown = request.arguments.keys() - {"enable"}
        if unknown:
            raise QmpError(f"Parameter '{min(unknown)}' is unexpected")
        # None are offered.
        if request.arguments.get("enable", []) != []:
            raise QmpError("Parameter 'enable' names a capability that was not offered")
        self._negotiated = True
