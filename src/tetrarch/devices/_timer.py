"""A thread that waits for a device's next event, while there is one to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

__all__ = ["TimerThread"]

NS: Final = 1_000_000_000
# Bounded both ways: the machine's clock may stand still meanwhile.
MIN_WAIT_S: Final = 0.000_1
MAX_WAIT_S: Final = 1.0


class TimerThread:
    def __init__(
        self,
        name: str,
        lock: threading.Lock,
        clock_ns: Callable[[], int],
        next_event: Callable[[int], int | None],
        tick: Callable[[], None],
    ) -> None:
        """``next_event`` is called with the device's ``lock`` held and with the time, and says when
        the next event is due, on the machine's clock; ``tick`` takes what is due, without it."""
        self._name = name
        self._clock_ns = clock_ns
        self._next_event = next_event
        self._tick = tick
        self._changed = threading.Condition(lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def arm(self, now: int) -> None:
        """Something has changed. The lock is held."""
        if self._thread is not None:
            self._changed.notify_all()
        elif not self._closed and self._next_event(now) is not None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            self._tick()
            with self._changed:
                now = self._clock_ns()
                due = self._next_event(now)
                if self._closed or due is None:
                    self._thread = None
                    return
                if due > now:
                    self._changed.wait(min(max((due - now) / NS, MIN_WAIT_S), MAX_WAIT_S))
