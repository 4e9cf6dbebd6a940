"""How a machine ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BY_QUIT", "ExitStatus", "StopReason"]

#: The detail of a stop that the control socket asked for.
BY_QUIT = "by quit at the control socket"


class StopReason(StrEnum):
    POWERED_OFF = "powered-off"
    RESET = "reset"
    CRASHED = "crashed"
    STOPPED = "stopped"
    DEBUG_EXIT = "debug-exit"
    TIMEOUT = "timeout"


_CODES = {
    StopReason.POWERED_OFF: 0,
    StopReason.RESET: 0,
    StopReason.STOPPED: 0,
    StopReason.CRASHED: 3,
    StopReason.TIMEOUT: 124,
}


@dataclass(frozen=True)
class ExitStatus:
    """Why the machine no longer runs."""

    reason: StopReason
    detail: str = ""
    """For a crash, what happened, in one line."""
    value: int | None = None
    """What the guest wrote to the debug-exit port."""
    dump: str = ""
    """For a crash, registers and the bytes at RIP."""

    def __str__(self) -> str:
        """In one sentence, without its end."""
        detail = f": {self.detail}" if self.detail else ""
        match self.reason:
            case StopReason.POWERED_OFF:
                return "the guest powered off"
            case StopReason.RESET:
                return f"the guest reset the machine{detail}"
            case StopReason.CRASHED:
                return f"the guest crashed{detail}"
            case StopReason.DEBUG_EXIT:
                return f"the guest ended with the value {self.value}"
            case StopReason.STOPPED | StopReason.TIMEOUT:
                return f"the guest was stopped{detail}"

    @property
    def code(self) -> int:
        """The exit code of ``tetrarch run``."""
        if self.reason is StopReason.DEBUG_EXIT:
            # As QEMU's isa-debug-exit: never 0, and eight bits are all a process has.
            return (((self.value or 0) << 1) | 1) & 0xFF
        return _CODES[self.reason]

    @property
    def ok(self) -> bool:
        """The guest ended by its own will: power-off or reset."""
        return self.reason in (StopReason.POWERED_OFF, StopReason.RESET)
