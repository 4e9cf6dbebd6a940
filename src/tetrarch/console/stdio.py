"""The guest's serial line on our own standard input and output."""

from __future__ import annotations

import contextlib
import os
import threading

from tetrarch._readiness import await_room, readable
from tetrarch.console.backend import ConsoleError, Leave, Receive, Resize
from tetrarch.console.terminal import RawTerminal

__all__ = ["StdioConsole"]

# Ctrl-], as telnet has it: rarely needed in a guest, and one key.
LEAVE_KEY = b"\x1d"
_READ_BYTES = 4096


class StdioConsole:
    """A terminal becomes raw; anything else is a plain pipe, both ways."""

    def __init__(self, input_fd: int = 0, output_fd: int = 1) -> None:
        self._in = input_fd
        self._out = output_fd
        self._terminal = RawTerminal(input_fd, self._resized) if _is_tty(input_fd) else None
        self._resize: Resize | None = None
        self._thread: threading.Thread | None = None
        # Wakes the thread; that closes it in the end, as it may sleep on it. _lock guards it.
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)

    @property
    def interactive(self) -> bool:
        return self._terminal is not None

    @property
    def guest_terminal(self) -> str:
        if self._terminal is None:
            return "none"
        rows, columns = self._size()
        # A terminal that does not know its size says 0.
        return f"{rows or 24}x{columns or 80}"

    def _size(self) -> tuple[int, int]:
        size = os.get_terminal_size(self._in)
        return size.lines, size.columns

    def watch_size(self, resize: Resize) -> None:
        self._resize = resize
        self._resized()

    def _resized(self) -> None:
        if self._terminal is not None and self._resize is not None:
            with contextlib.suppress(OSError):  # the terminal may have hung up
                self._resize(*self._size())

    def start(self, receive: Receive, leave: Leave) -> None:
        if self._terminal is not None:
            self._terminal.enter()
        self._thread = threading.Thread(
            target=self._run, args=(receive, leave), name="console-input", daemon=True
        )
        self._thread.start()

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._out, view) :]
            except BlockingIOError:
                # Whoever shares the terminal with us made it non-blocking.
                await_room(self._out)
            except OSError as error:
                raise ConsoleError(
                    f"cannot write the console to standard output: {error.strerror}",
                    mend="keep its reader open, or use --console file=PATH",
                ) from error

    def close(self) -> None:
        with self._lock:
            if self._thread is None:
                self._close_wake()
            elif self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        # receive() may block on a guest that does not read: the thread is a daemon.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(0.2)
        if self._terminal is not None:
            self._terminal.restore()

    def _close_wake(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _run(self, receive: Receive, leave: Leave) -> None:
        try:
            self._read(receive, leave)
        finally:
            with self._lock:
                self._close_wake()

    def _read(self, receive: Receive, leave: Leave) -> None:
        while True:
            try:
                ready = readable(self._in, self._wake)
                if self._wake in ready:
                    return
                data = os.read(self._in, _READ_BYTES)
            except BlockingIOError:
                continue
            except (OSError, ValueError):  # closed, or the terminal hung up
                data = b""
            if not data:
                if self._terminal is not None:
                    leave()
                return
            if self._terminal is not None and LEAVE_KEY in data:
                receive(data[: data.index(LEAVE_KEY)])
                leave()
                return
            with contextlib.suppress(BrokenPipeError):
                receive(data)


def _is_tty(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False
