"""The phases of a machine's life, and which may follow which."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Final

from tetrarch.errors import MachineStateError
from tetrarch.machine.forked import elsewhere

__all__ = ["PRESS_AGAIN_S", "STOP_GRACE_S", "Allow", "LifeCycle", "Phase", "allow_all"]

Allow = Callable[[str], None]
"""Raises MachineStateError where a change by hand, "set_regs" or "write_memory", is forbidden."""

#: Until a power button is pressed again: a guest that still boots does not see it.
PRESS_AGAIN_S: Final = 10.0
#: As long as systemd waits for a service (DefaultTimeoutStopSec): a system may have some to end.
STOP_GRACE_S: Final = 90.0


class Phase(StrEnum):
    MADE = "made"
    """Not started: devices can be attached, memory be written."""
    RUNNING = "running"
    PAUSED = "paused"
    """Every vCPU between two instructions, and the machine's clock stands."""
    ENDED = "ended"
    """For good: a machine runs once."""


_NEXT = {
    Phase.MADE: {Phase.RUNNING, Phase.ENDED},
    Phase.RUNNING: {Phase.PAUSED, Phase.ENDED},
    Phase.PAUSED: {Phase.RUNNING, Phase.ENDED},
    Phase.ENDED: set[Phase](),
}

_WHY_NOT = {
    Phase.MADE: ("the machine has not been started", "call start() or run() first"),
    Phase.RUNNING: ("the machine was already started and runs", "do it before, or pause() it"),
    Phase.PAUSED: ("the machine is paused", "call resume() first"),
    Phase.ENDED: ("the machine has ended", "make another Machine: each runs once"),
}


def allow_all(what: str) -> None:
    """Nothing is forbidden."""


class LifeCycle:
    """Where a machine is in its life, and for how long it has run."""

    def __init__(self) -> None:
        # Guards all below it; nothing else is taken under it.
        self._lock = threading.Lock()
        self._phase = Phase.MADE
        self._since = 0.0
        self._ran = 0.0
        self._elsewhere = False
        self._forbidden: dict[str, tuple[Collection[Phase], str, str]] = {}

    def forbid(
        self, methods: Collection[str], cause: str, mend: str, phases: Collection[Phase]
    ) -> None:
        """These are not allowed in ``phases``."""
        self._forbidden.update(dict.fromkeys(methods, (phases, cause, mend)))

    def allow(self, what: str) -> None:
        """Raises MachineStateError where ``what`` is forbidden now."""
        phases, cause, mend = self._forbidden.get(what, ((), "", ""))
        if self._phase in phases:
            raise MachineStateError(f"{what}() cannot be: {cause}", mend=mend)

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def running(self) -> bool:
        return self._phase is Phase.RUNNING

    @property
    def uptime(self) -> float:
        """Seconds for which it has run."""
        with self._lock:
            return self._ran + self._current()

    def take_up(self, uptime: float) -> None:
        """A machine that has run for so long in another life."""
        with self._lock:
            self._ran = uptime

    def move(self, to: Phase, what: str) -> None:
        """Enters a phase. Raises MachineStateError for ``what`` where it cannot follow."""
        with self._lock:
            if to not in _NEXT[self._phase]:
                raise self._refusal(what)
            self._ran += self._current()
            self._phase, self._since = to, time.monotonic()

    def end(self) -> None:
        """Enters the last phase, from any."""
        with self._lock:
            self._ran += self._current()
            self._phase = Phase.ENDED

    def become_shadow(self) -> None:
        """In a process that was forked from the machine's: nothing is allowed there."""
        self._lock = threading.Lock()
        self._phase = Phase.ENDED
        self._elsewhere = True

    def require(self, what: str, *phases: Phase) -> None:
        """Raises MachineStateError unless the machine is in one of ``phases``, and where it is
        forbidden in all."""
        self.allow(what)
        if self._phase not in phases or self._elsewhere:
            raise self._refusal(what)

    def _current(self) -> float:
        return time.monotonic() - self._since if self._phase is Phase.RUNNING else 0.0

    def _refusal(self, what: str) -> MachineStateError:
        if self._elsewhere:
            return elsewhere()
        cause, mend = _WHY_NOT[self._phase]
        return MachineStateError(f"{what}() cannot be: {cause}", mend=mend)
