"""What waits to be sent to one client, and the thread that sends it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from typing import Final

__all__ = ["Outgoing"]

# A client that reads nothing gets no further replies, then no events: it is hung up on.
_REPLIES_MAX: Final = 16
_EVENTS_MAX: Final = 1024


class Outgoing:
    """Messages in their order. Events never wait for the client; replies do."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        # Guards what follows.
        self._changed = threading.Condition()
        self._messages: deque[bytes] = deque()
        self._ended = False
        """No more are taken."""
        self._broken = False
        """No more are sent: the client has gone, or does not read."""
        self._thread = threading.Thread(target=self._send, name="control-send", daemon=True)
        self._thread.start()

    def reply(self, message: bytes) -> bool:
        """Waits while many are unsent. False: the client has gone."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            return self._put(message)

    def event(self, message: bytes) -> None:
        """Without waiting: a client that has let too many lie is hung up on."""
        with self._changed:
            if len(self._messages) < _EVENTS_MAX:
                self._put(message)
            else:
                self._break()

    def end(self, deadline: float) -> None:
        """Sends what is there, if the client takes it in time, and closes the connection."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(max(deadline - time.monotonic(), 0))
        with self._changed:
            self._break()
        self._connection.close()

    def _has_room(self) -> bool:
        return len(self._messages) < _REPLIES_MAX or self._ended or self._broken

    def _put(self, message: bytes) -> bool:
        if self._ended or self._broken:
            return False
        self._messages.append(message)
        self._changed.notify_all()
        return True

    def _break(self) -> None:
        """Also wakes the threads that read and send."""
        self._broken = True
        self._changed.notify_all()
        with contextlib.suppress(OSError):  # it has gone
            self._connection.shutdown(socket.SHUT_RDWR)

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages or self._ended or self._broken)
                if self._broken or not self._messages:
                    return
                message = self._messages.popleft()
                self._changed.notify_all()
            try:
                self._connection.sendall(message)
            except OSError:
                with self._changed:
                    self._break()
                return
