"""The user's terminal in raw mode, and back again on every way out.

A program that dies with the terminal raw leaves its user a shell that echoes
nothing. Three nets catch that: close() in a finally clause, an atexit hook for
what gets past it, and for the deaths that run no code of ours (SIGKILL, a
segmentation fault) a guardian: a child process that holds the other end of a
pipe and puts the terminal back when the pipe ends without a farewell.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import signal
import termios
import threading
import tty
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["RawTerminal"]

_FAREWELL = b"."
# termios.tcgetattr(3): [iflag, oflag, cflag, lflag, ispeed, ospeed, cc].
_Attributes = list[Any]


class RawTerminal:
    """Raw mode on one terminal, from enter() until restore().

    ``resized`` is called meanwhile when the terminal has another size, if enter() was called on
    the main thread.
    """

    def __init__(self, fd: int, resized: Callable[[], None] = lambda: None) -> None:
        self._fd = fd
        self._resized = resized
        self._saved: _Attributes | None = None
        self._guardian: _Guardian | None = None
        self._old_handlers: dict[signal.Signals, Any] = {}

    def enter(self) -> None:
        if self._saved is not None:
            return
        saved: _Attributes = termios.tcgetattr(self._fd)
        self._guardian = _Guardian(self._fd, saved)
        self._saved = saved
        atexit.register(self.restore)
        # A shell that had us stopped has set the terminal as it likes it.
        if _on_main_thread():
            for number, handler in (
                (signal.SIGCONT, self._continued),
                (signal.SIGWINCH, self._changed),
            ):
                self._old_handlers[number] = signal.signal(number, handler)
        _set_raw(self._fd)

    def restore(self) -> None:
        saved, self._saved = self._saved, None
        if saved is None:
            return
        # Elsewhere the handler stays, and does nothing any more.
        if _on_main_thread():
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            self._old_handlers.clear()
        with contextlib.suppress(termios.error):  # the terminal may have hung up
            _set_attributes(self._fd, saved)
        atexit.unregister(self.restore)
        if self._guardian is not None:
            self._guardian.dismiss()

    def _continued(self, signum: int, frame: FrameType | None) -> None:
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                _set_raw(self._fd)
            self._resized()  # a shell that had us stopped may have told nobody

    def _changed(self, signum: int, frame: FrameType | None) -> None:
        if self._saved is not None:
            self._resized()


class _Guardian:
    """A child process that outlives us if we die without a word."""

    def __init__(self, fd: int, saved: _Attributes) -> None:
        reader, self._writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            # Only os._exit may leave this branch: the parent's stack is not ours.
            try:
                os.close(self._writer)
                _guard(reader, fd, saved)
            finally:
                os._exit(0)
        os.close(reader)

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._writer, _FAREWELL)
        os.close(self._writer)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _guard(reader: int, fd: int, saved: _Attributes) -> None:
    # Its own process group, so that a signal to the parent's group spares it;
    # from there tcsetattr raises SIGTTOU, which must be ignored to succeed.
    os.setpgid(0, 0)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU, signal.SIGCONT):
        signal.signal(signum, signal.SIG_IGN)
    # It must not hold a pipe open that somebody waits on for its end.
    keep = {reader, fd}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))
    if os.read(reader, 1) != _FAREWELL:
        with contextlib.suppress(termios.error):  # the terminal may have hung up
            _set_attributes(fd, saved)


def _set_raw(fd: int) -> None:
    _again_if_interrupted(lambda: tty.setraw(fd, termios.TCSANOW))


def _set_attributes(fd: int, attributes: _Attributes) -> None:
    _again_if_interrupted(lambda: termios.tcsetattr(fd, termios.TCSANOW, attributes))


def _again_if_interrupted(set_attributes: Callable[[], object]) -> None:
    """A job in the background is stopped in tcsetattr(3), and comes back from it with EINTR
    when it is in the foreground again. PEP 475 leaves the module termios out."""
    while True:
        try:
            set_attributes()
            return
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                raise


def _on_main_thread() -> bool:
    # Signal handlers can only be set there.
    return threading.current_thread() is threading.main_thread()
