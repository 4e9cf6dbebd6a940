"""One viewer: what it asks for, and what it is sent.

Two threads: one reads, one sends. What the viewer asks for is kept in places of which each holds
the last of its kind, and of the frames there is one for all viewers; so one that is slow keeps
nothing but its own thread waiting.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Final

from tetrarch._readiness import readable
from tetrarch.display.changes import TILE
from tetrarch.display.display import Watcher
from tetrarch.display.frame import Cursor, Frame, Rect
from tetrarch.vnc.hands import ViewerHands
from tetrarch.vnc.handshake import begin, welcome
from tetrarch.vnc.messages import (
    KeyEvent,
    Message,
    MessageReader,
    PointerEvent,
    ScanCode,
    SetDesktopSize,
    SetEncodings,
    SetPixelFormat,
    UpdateRequest,
)
from tetrarch.vnc.updates import (
    SIZE_OF_SERVER,
    SIZE_OF_VIEWER,
    SIZE_PROHIBITED,
    Encoder,
    Pseudo,
    colour_map,
    update_header,
)

__all__ = ["Gone", "Session"]

#: For all of the handshake, a password that somebody types before it among it.
_HANDSHAKE_S: Final = 30.0
#: A viewer that takes nothing for this long is hung up on.
_SEND_S: Final = 20.0
_READ_BYTES: Final = 16 << 10
#: Hands are not faster.
_MESSAGES_A_SECOND: Final = 4000

#: From one look at what is shown to the next, while that changes and while it does not.
_LOOK_S: Final = 0.04
_IDLE_S: Final = 0.1


class Gone(Exception):
    """The viewer has hung up, or was hung up on."""


class Session:
    def __init__(
        self, connection: socket.socket, name: str, watcher: Watcher, hands: ViewerHands
    ) -> None:
        self._connection = connection
        self._name = name
        self._watcher = watcher
        self._hands = hands
        self._encoder = Encoder()
        self._size = 0, 0
        """Of the screen, as the viewer has been told."""
        self._shown = 0, 0
        """Of the frame that it was sent last."""
        self._cursor: Cursor | None = None
        self._told_keys = False
        self._deadline: float | None = time.monotonic() + _HANDSHAKE_S
        self._ended = threading.Event()
        # Guards what the reader leaves for the sender.
        self._news = threading.Condition()
        self._format: SetPixelFormat | None = None
        self._encodings: SetEncodings | None = None
        self._wanted: UpdateRequest | None = None
        self._size_due = self._refuse_size = False

    # The connection, for the handshake

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            left = 0.0 if self._deadline is None else self._deadline - time.monotonic()
            if left <= 0 or not readable(self._connection, timeout=left):
                raise Gone("it takes too long to say what it wants")
            got = self._connection.recv(count - len(data))
            if not got:
                raise Gone("it hung up")
            data += got
        return data

    def write(self, data: bytes) -> None:
        self._connection.sendall(data)

    # Its life

    def let_in(self, password: bytes | None) -> None:
        """Raises Gone, NotRfb, WrongPassword and OSError."""
        self._connection.settimeout(_SEND_S)
        begin(self, password, self._ended)

    def run(self) -> None:
        """Serves the viewer until one of the two hangs up, or it sends what is none of the
        protocol: raises as ``let_in``."""
        self._size = self._shown = welcome(self, self._name, self._first_size)
        sender = threading.Thread(target=self._send, name="vnc-send", daemon=True)
        sender.start()
        try:
            self._receive()
        finally:
            self.end()
            sender.join()
            self._hands.let_go()

    def end(self) -> None:
        """Hangs up. From any thread."""
        self._ended.set()
        with suppress(OSError):  # it was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._news:
            self._news.notify_all()

    def _first_size(self) -> tuple[int, int]:
        frame, _ = self._watcher.look()
        return frame.width, frame.height

    # What it sends

    def _receive(self) -> None:
        reader = MessageReader()
        begun, count = time.monotonic(), 0
        while not self._ended.is_set():
            readable(self._connection)
            data = self._connection.recv(_READ_BYTES)
            if not data:
                raise Gone("it hung up")
            for message in reader.feed(data):
                self._take(message)
                count += 1
            elapsed = time.monotonic() - begun
            if elapsed >= 1:
                begun, count = time.monotonic(), 0
            elif count > _MESSAGES_A_SECOND:
                self._ended.wait(1 - elapsed)

    def _take(self, message: Message) -> None:
        match message:
            case KeyEvent(down, keysym):
                self._hands.key(keysym, down)
            case ScanCode(down, keysym, code):
                self._hands.key(keysym, down, code)
            case PointerEvent(buttons, x, y):
                self._hands.point(x, y, self._size, buttons)
            case _:
                with self._news:
                    self._note(message)
                    self._news.notify_all()

    def _note(self, message: Message) -> None:
        match message:
            case SetPixelFormat():
                self._format = message
            case SetEncodings(encodings):
                self._encodings = message
                self._size_due |= Pseudo.EXTENDED_DESKTOP_SIZE in encodings
            case UpdateRequest(incremental, rect):
                before = self._wanted
                self._wanted = message
                if before is not None:
                    # It gets both at once.
                    whole = incremental and before.incremental
                    self._wanted = UpdateRequest(whole, _around(before.rect, rect))
                if not incremental:
                    self._watcher.again(rect)
            case SetDesktopSize():
                self._refuse_size = True

    # What it gets

    def _send(self) -> None:
        try:
            while self._await_news():
                pause = _LOOK_S
                while not self._answer():
                    with self._news:
                        self._news.wait(pause)
                    pause = min(1.25 * pause, _IDLE_S)
        except OSError:
            pass  # it has hung up, or takes nothing
        finally:
            self.end()

    def _await_news(self) -> bool:
        with self._news:
            self._news.wait_for(
                lambda: self._ended.is_set() or self._wanted is not None or self._refuse_size
            )
        return not self._ended.is_set()

    def _answer(self) -> bool:
        """Whether there is nothing more to be sent until the viewer asks again."""
        if self._ended.is_set():
            return True
        frame, cursor = self._watcher.look()
        with self._news:
            self._settle()
            wanted, refuse, size_due = self._wanted, self._refuse_size, self._size_due
            self._refuse_size = False
        if refuse and self._encoder.knows(Pseudo.EXTENDED_DESKTOP_SIZE):
            size = self._encoder.size(*self._size, SIZE_OF_VIEWER, SIZE_PROHIBITED)
            self.write(update_header(1) + size)
        if wanted is None:
            return True
        resizes = self._encoder.knows(Pseudo.DESKTOP_SIZE, Pseudo.EXTENDED_DESKTOP_SIZE)
        if resizes and (size_due or self._size != (frame.width, frame.height)):
            self._resize(frame)
            return True
        return self._update(frame, cursor, wanted)

    def _settle(self) -> None:
        """Takes over how the viewer wants what it gets from now on. The lock is held."""
        chosen, encodings = self._format, self._encodings
        self._format = self._encodings = None
        if chosen is not None:
            self._encoder.format = chosen.format
            if chosen.colour_map:
                self.write(colour_map())
        if encodings is not None:
            self._encoder.set_encodings(encodings.encodings)

    def _resize(self, frame: Frame) -> None:
        with self._news:
            self._wanted, self._size_due = None, False
        self._size = self._shown = frame.width, frame.height
        self._watcher.again(frame.all)
        self.write(update_header(1) + self._encoder.size(*self._size, SIZE_OF_SERVER))

    def _update(self, frame: Frame, cursor: Cursor | None, wanted: UpdateRequest) -> bool:
        encoder, extras = self._encoder, []
        if encoder.knows(Pseudo.CURSOR) and cursor is not self._cursor:
            self._cursor = cursor
            extras.append(encoder.cursor(cursor))
        if encoder.knows(Pseudo.QEMU_KEYS) and not self._told_keys:
            self._told_keys = True
            extras.append(encoder.qemu_keys())
        parts = self._parts(frame, wanted.rect)
        if not parts and not extras and wanted.incremental:
            return False
        with self._news:
            if self._wanted is wanted:
                self._wanted = None
        shown = frame.of_size(*self._size)
        self.write(update_header(len(extras) + len(parts)) + b"".join(extras))
        for part in parts:
            self.write(encoder.part(shown, part))
        return True

    def _parts(self, frame: Frame, wanted: Rect) -> list[Rect]:
        """What is new there of the screen as the viewer has it."""
        screen = Rect(0, 0, *self._size)
        changed = self._watcher.take(frame, wanted)
        if changed is None:
            return []
        if self._shown != (frame.width, frame.height):
            # It cannot have another size, so all of what it has becomes another.
            self._shown = frame.width, frame.height
            rows = range(0, screen.height, TILE)
            changed = [Rect(0, top, screen.width, TILE) for top in rows]
        return [part for rect in changed if (part := rect.within(screen))]


def _around(one: Rect, other: Rect) -> Rect:
    left, top = min(one.x, other.x), min(one.y, other.y)
    right = max(one.x + one.width, other.x + other.width)
    bottom = max(one.y + one.height, other.y + other.height)
    return Rect(left, top, right - left, bottom - top)
