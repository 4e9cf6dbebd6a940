"""A console for programs: wait for what the guest prints, type what it should read."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tetrarch._patience import patience
from tetrarch.console.backend import Leave, Receive, Resize
from tetrarch.errors import MachineStateError, TetrarchError

__all__ = ["ExpectTimeout", "MemoryConsole"]

# What is kept of a guest that prints without end; a boot log is under 100 KiB.
_KEPT_BYTES_MAX = 4 << 20
# How much of the output an error message shows.
_SHOWN_CHARS = 400


class ExpectTimeout(TetrarchError, TimeoutError):
    """The guest did not print what was expected."""


class MemoryConsole:
    """Keeps the guest's output, and lets a program wait for parts of it.

    Bytes that are not UTF-8 show as U+FFFD in the text that comes back.
    """

    guest_terminal = "none"

    def __init__(self) -> None:
        # _changed guards all below it.
        self._changed = threading.Condition()
        self._output = bytearray()
        self._dropped = 0
        self._read_to = 0
        self._closed = False
        self._receive: Receive | None = None
        self._early: list[bytes] = []
        self._size = (0, 0)
        self._resize: Resize | None = None
        self._why = ""
        self._failure: BaseException | None = None
        self._watchers: list[Callable[[], object]] = []

    def start(self, receive: Receive, leave: Leave) -> None:
        with self._changed:
            self._receive = receive
            early, self._early = self._early, []
        for data in early:
            receive(data)

    def watch_size(self, resize: Resize) -> None:
        with self._changed:
            self._resize = resize
            resize(*self._size)

    def resize(self, rows: int, columns: int) -> None:
        """The terminal has this size now. The guest hears of it from a virtio console."""
        with self._changed:
            self._size = rows, columns
            if self._resize is not None:
                self._resize(rows, columns)

    def write(self, data: bytes) -> None:
        with self._changed:
            self._output += data
            excess = len(self._output) - _KEPT_BYTES_MAX
            if excess > 0:
                # In large steps, so that the buffer is not moved for each byte.
                excess += _KEPT_BYTES_MAX // 4
                del self._output[:excess]
                self._dropped += excess
                self._read_to = max(self._read_to, self._dropped)
            self._tell()

    def end(self, event: object) -> None:
        """Says what ended the machine, before close(): expect() tells it."""
        with self._changed:
            if isinstance(event, BaseException):
                self._failure = event
                self._why = f"{type(event).__name__}: {event}".rstrip(": ")
            else:
                self._why = str(event)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for tell in self._watchers:
            tell()

    def become_shadow(self, why: BaseException) -> None:
        """In a process that was forked from the machine's: there is no more to come."""

        def refuse(data: bytes) -> None:
            raise why

        self._changed = threading.Condition()
        self._receive, self._resize = refuse, None
        self._watchers.clear()
        self.end(why)
        self.close()

    def send(self, data: str | bytes) -> None:
        """Types into the guest; Enter is "\\n". Before the start it is kept until then."""
        raw = data.encode() if isinstance(data, str) else data
        with self._changed:
            receive = self._receive
            if receive is None:
                self._early.append(raw)
                return
        receive(raw)

    def read(self) -> str:
        """What the guest printed since the last read() or expect(). Does not wait."""
        with self._changed:
            return self._take(len(self._output))

    def expect(self, pattern: str | re.Pattern[str], timeout: float = 60.0) -> str:
        """Waits until the guest prints ``pattern``; gives all up to its end.

        A string stands for itself; for a regular expression give a compiled one.
        What comes back is not seen again by the next read() or expect().

        Raises ExpectTimeout when it does not come in ``timeout`` seconds, or at once
        when the machine ended without it, with the exception that ended it as the
        cause; the message shows the end of the output. Raises MachineStateError when it
        is not there and the machine has not been started.
        """
        limit = patience(timeout)
        deadline = None if limit is None else time.monotonic() + limit
        with self._changed:
            while (found := self.find(pattern)) is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise self.missing(pattern, f"{timeout:g} s passed")
                self._changed.wait(left)
            return found

    def find(self, pattern: str | re.Pattern[str]) -> str | None:
        """What ``expect`` would give without waiting; None where it would wait. Raises as it."""
        regex = _compiled(pattern)
        with self._changed:
            text = self._unread().decode("utf-8", "surrogateescape")
            match = regex.search(text)
            if match is not None:
                # The escapes make positions in the text and in the bytes exact.
                length = len(text[: match.end()].encode("utf-8", "surrogateescape"))
                return self._take(self._read_to - self._dropped + length)
            if self._closed:
                why = f"the machine ended ({self._why})" if self._why else "the machine ended"
                raise self.missing(pattern, why) from self._failure
            if self._receive is None:
                raise MachineStateError(
                    "expect() waits for a machine that has not been started",
                    mend="call start() first",
                )
            return None

    @contextmanager
    def watched(self, tell: Callable[[], object]) -> Iterator[None]:
        """Meanwhile ``tell`` is called when there is more output, or no more; it must not wait."""
        with self._changed:
            self._watchers.append(tell)
        try:
            yield
        finally:
            with self._changed:
                self._watchers.remove(tell)

    @property
    def closed(self) -> bool:
        """Whether there is no more to come."""
        return self._closed

    def _repr_html_(self) -> str:
        """For a cell of a notebook: the last lines."""
        from tetrarch.notebook import console_html

        return console_html(self.text)

    @property
    def text(self) -> str:
        """All output that is kept: the last 3 MiB at least."""
        with self._changed:
            return self._output.decode("utf-8", "replace")

    def missing(self, pattern: str | re.Pattern[str], reason: str) -> ExpectTimeout:
        """What ``expect`` raises."""
        shown = pattern if isinstance(pattern, str) else pattern.pattern
        with self._changed:
            tail = self._unread().decode("utf-8", "replace")[-_SHOWN_CHARS:]
        return ExpectTimeout(f"{reason} without {shown!r} on the console, which ends in {tail!r}")

    def _unread(self) -> bytes:
        return bytes(self._output[self._read_to - self._dropped :])

    def _take(self, end: int) -> str:
        start = self._read_to - self._dropped
        self._read_to = self._dropped + end
        return self._output[start:end].decode("utf-8", "replace")


def _compiled(pattern: object) -> re.Pattern[str]:
    if isinstance(pattern, str):
        return re.compile(re.escape(pattern))
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return pattern
    raise TypeError(
        f"expect() takes text or a regular expression compiled from text, not {pattern!r}"
    )
