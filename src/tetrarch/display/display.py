"""What a machine shows, and those who watch it.

Of what the guest has written nothing tells where a VGA's text or a linear frame buffer is shown. So
it is compared with what it was, at a bounded rate, and by who waits for it: where nobody watches,
nobody looks.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from typing import Final, Protocol

from tetrarch.display.changes import Changes, changed_tiles
from tetrarch.display.frame import POINT_BYTES, Cursor, Frame, Rect
from tetrarch.display.screen import Screen
from tetrarch.errors import MachineStateError

__all__ = ["Display", "Shown", "Source", "Watcher"]

#: From one look to the next.
REFRESH_S: Final = 0.04
#: What is shown before the guest shows anything, or while it cannot be shown.
NOTHING: Final = Frame(640, 400, bytes(POINT_BYTES * 640 * 400))

Shown = tuple[Frame, Sequence[Rect] | None]
"""A frame, and which parts are not as in the last one; None where that is not known."""


class Source(Protocol):
    """A device that shows something. Called from any thread, one at a time."""

    def still(self) -> Frame | None:
        """What it shows now, for a picture; None where it shows nothing. Raises MachineStateError
        where it cannot be shown."""

    def look(self) -> Shown | None:
        """The same for who watches: of a frame that is as it was, the same object."""

    def cursor(self) -> Cursor | None:
        """The pointer's picture, which is no part of the frame: the same object while it stays."""


class Display:
    """What the first of a machine's sources shows that shows anything."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        # Guards the rest.
        self._lock = threading.Lock()
        self._watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
        self._frame = NOTHING
        self._cursor: Cursor | None = None
        self._looked = 0.0

    def screen(self) -> Screen:
        """Raises MachineStateError where what is there cannot be shown."""
        for source in self._sources:
            if (frame := source.still()) is not None:
                return frame.screen()
        raise MachineStateError("the machine shows nothing", mend="wait until it has started")

    def watch(self) -> Watcher:
        """For one who wants to know what changes."""
        with self._lock:
            watcher = Watcher(self, self._frame)
            self._watchers.add(watcher)
        return watcher

    @property
    def frame(self) -> Frame:
        """As it was at the last look."""
        return self._frame

    def look(self) -> tuple[Frame, Cursor | None]:
        """What is shown now, or was a moment ago."""
        with self._lock:
            if time.monotonic() - self._looked >= REFRESH_S:
                self._look()
                self._looked = time.monotonic()
            return self._frame, self._cursor

    def _look(self) -> None:
        frame, changed, self._cursor = self._shown()
        last, self._frame = self._frame, frame
        if frame is last:
            return
        same_size = (frame.width, frame.height) == (last.width, last.height)
        if same_size and changed is None:
            changed = list(changed_tiles(last, frame))
        for watcher in self._watchers:
            watcher.changed(frame, changed if same_size and changed is not None else None)

    def _shown(self) -> tuple[Frame, Sequence[Rect] | None, Cursor | None]:
        for source in self._sources:
            try:
                shown = source.look()
            except MachineStateError:
                return self._frame, (), None  # what it showed last stays
            if shown is not None:
                return *shown, source.cursor()
        return NOTHING, None, None


class Watcher:
    """What one who watches has not got yet. From any thread."""

    def __init__(self, display: Display, frame: Frame) -> None:
        self._display = display
        self._lock = threading.Lock()
        self._size = frame.width, frame.height
        self._changes = Changes(*self._size)
        self.again(frame.all)

    def look(self) -> tuple[Frame, Cursor | None]:
        """As ``Display.look``."""
        return self._display.look()

    def changed(self, frame: Frame, parts: Sequence[Rect] | None) -> None:
        """These parts have changed, or None: all, and the size too."""
        with self._lock:
            if parts is None:
                self._size = frame.width, frame.height
                self._changes = Changes(*self._size)
                parts = [frame.all]
            self._changes.add(*parts)

    def again(self, part: Rect) -> None:
        """It wants that anew."""
        with self._lock:
            self._changes.add(part)

    def take(self, frame: Frame, wanted: Rect) -> list[Rect] | None:
        """What has changed there, which it now gets; None where ``frame`` has another size than
        what is shown by now."""
        with self._lock:
            if self._size != (frame.width, frame.height):
                return None
            return self._changes.take(wanted)
