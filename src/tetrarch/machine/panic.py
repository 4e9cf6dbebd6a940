"""Sees that a Linux guest has panicked and will stay so.

With reboot off (panic=0, the kernel's default) a panic ends in a loop that
never halts and never leaves the kernel (Linux, kernel/panic.c: panic() prints
"---[ end Kernel panic - not syncing: ..." and then delays forever), so the CPU
shows nothing: no triple fault, no halt with interrupts off. The line on the
console is the only sign, and anybody may print such a line: a log file shown
with cat has it too. So the line only raises a suspicion. It holds while

- nothing more comes on the console (a panicked kernel is silent after it),
- the vCPU is busy (an idle guest is not, its shell waits in HLT), and
- the vCPU is found in the kernel, ring 0, again and again.

A kernel with a driver for pvpanic says it itself, which raises the suspicion too: its console may
be another one, and whether it will stay so, or reboot, it does not say.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

__all__ = ["PanicWatch"]

_PANIC_LINE = re.compile(
    rb"^(?:\[ *\d+\.\d+\](?:\[[^]]*\])? )?---\[ end (Kernel panic - not syncing: .*?) \]---\s*$"
)
# A console line is rarely longer; the rest of a longer one is not looked at.
_LINE_BYTES_MAX = 1024
# One check a quarter of a second; this many in a row make a panic of a suspicion.
_INTERVAL_S = 0.25
_CHECKS = 4
# Far above an idle guest and below a spinning one, whose thread has a host CPU or waits for one.
_BUSY_SHARE = 0.5


class PanicWatch:
    """Follows the console's output; calls ``on_panic`` with the panic's message, and ``on_told``
    where the guest itself says that it panicked.

    ``busy_time`` says for how many seconds the vCPU's thread has had work;
    ``in_kernel`` looks where the vCPUs are, None if it cannot see.
    """

    def __init__(
        self,
        busy_time: Callable[[], float],
        in_kernel: Callable[[], bool | None],
        on_panic: Callable[[str], None],
        on_told: Callable[[], None] = lambda: None,
        interval: float = _INTERVAL_S,
    ) -> None:
        self._busy_time = busy_time
        self._in_kernel = in_kernel
        self._on_panic = on_panic
        self._on_told = on_told
        self._interval = interval
        self._line = bytearray()
        # Taken for a change of the two below, but where the suspicion is merely put aside.
        self._lock = threading.Lock()
        self._suspicion: str | None = None
        self._checking = False
        self._closed = threading.Event()
        # Held where a panic is told: after forget() none of before is.
        self._telling = threading.Lock()

    def feed(self, data: bytes) -> None:
        """Takes output of the guest, on one thread."""
        begun, *lines = data.split(b"\n")
        self._extend(begun)
        for part in lines:
            self._end_line()
            self._extend(part)

    def told(self) -> None:
        """By pvpanic, on any thread, as often as the guest likes."""
        if self._suspicion is None:
            self._on_told()
            self._suspect("a kernel panic, told by pvpanic")

    def forget(self) -> None:
        """The guest was reset: what it printed says nothing of the next one."""
        with self._telling:
            self._suspicion = None
        self._line.clear()

    def close(self) -> None:
        self._closed.set()

    def _extend(self, part: bytes) -> None:
        text = part.replace(b"\r", b"")
        if text:
            self._suspicion = None
            self._line += text[: _LINE_BYTES_MAX - len(self._line)]

    def _end_line(self) -> None:
        line = bytes(self._line)
        self._line.clear()
        match = _PANIC_LINE.match(line)
        if match is not None:
            self._suspect(match[1].decode("utf-8", "replace"))

    def _suspect(self, suspicion: str) -> None:
        with self._lock:
            self._suspicion = suspicion
            if self._checking:
                return
            self._checking = True
        threading.Thread(target=self._check, name="panic-watch", daemon=True).start()

    def _check(self) -> None:
        """One thread, however often the guest makes itself suspected."""
        while (suspicion := self._next()) is not None:
            self._look_at(suspicion)

    def _next(self) -> str | None:
        with self._lock:
            self._checking = self._suspicion is not None and not self._closed.is_set()
            return self._suspicion if self._checking else None

    def _look_at(self, suspicion: str) -> None:
        good = 0
        while good < _CHECKS:
            busy_before, wall_before = self._busy_time(), time.monotonic()
            if self._closed.wait(self._interval) or self._suspicion is not suspicion:
                return
            busy = (self._busy_time() - busy_before) / (time.monotonic() - wall_before)
            # Idle, or not to be seen: look again.
            in_kernel = self._in_kernel() if busy >= _BUSY_SHARE else None
            if in_kernel is False:
                self._drop(suspicion)
                return  # a program runs: the line was only text
            good = good + 1 if in_kernel else 0
        with self._telling:
            if not self._closed.is_set() and self._suspicion is suspicion:
                self._on_panic(suspicion)
        self._drop(suspicion)

    def _drop(self, suspicion: str) -> None:
        with self._lock:
            if self._suspicion is suspicion:
                self._suspicion = None
