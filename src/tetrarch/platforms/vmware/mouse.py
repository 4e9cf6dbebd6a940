"""VMware's pointer: its place comes by the backdoor, and that there is one by a packet of the PS/2
mouse (Linux, drivers/input/mouse/vmmouse.c; QEMU, hw/i386/vmmouse.c).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch.devices._state import DeviceState, State, flag, queue, register
from tetrarch.devices.input_user import ABS_MAX
from tetrarch.platforms.vmware.backdoor import NO_COMMAND, Command, low

if TYPE_CHECKING:
    from tetrarch._native import GuestCall

__all__ = ["VmMouse", "VmMouseState"]

DATA, STATUS, COMMAND, RESTRICT = 39, 40, 41, 86

# What COMMAND is for.
ENABLE, DISABLE = 0x4541_4552, 0x0000_00F5
RELATIVE, ABSOLUTE = 0x4C45_5252, 0x5342_4152

VERSION: Final = 0x3442_554A
ERROR: Final = 0xFFFF_0000
#: Who may use the pointer: the kernel alone.
CPL_0: Final = 1

#: Words that wait, four for each report.
WAITING_MAX: Final = 1024
_REPORT: Final = 4
#: By their bits, as viewers have them: left, middle, right.
_BUTTONS: Final = (0x20, 0x08, 0x10)
_PLACE_MAX: Final = 0xFFFF


@dataclass
class VmMouseState(DeviceState):
    kind = "vmmouse"

    enabled: bool = flag()
    absolute: bool = flag()
    failed: bool = flag()
    """It was asked for what it has not."""
    restriction: int = register(0, 0xFF)
    waiting: deque[int] = queue(WAITING_MAX, 0xFFFF_FFFF)


class VmMouse:
    """Lock: ``_lock``, for the state."""

    def __init__(self) -> None:
        self.state = VmMouseState()
        self._lock = threading.Lock()
        self._notify: Callable[[], object] | None = None

    def connect(self, notify: Callable[[], object]) -> None:
        """``notify`` has the PS/2 mouse say something, without a movement."""
        self._notify = notify

    def commands(self) -> Mapping[int, Command]:
        return {
            DATA: self._guarded(self._data),
            STATUS: self._guarded(self._status),
            COMMAND: self._guarded(self._command),
            RESTRICT: self._guarded(self._restrict),
        }

    def point(self, x: int, y: int, buttons: int, wheel: int) -> bool:
        """The pointer is at this place, of 0 to ABS_MAX each. False where the guest does not want
        to know; a report for which there is no room is lost."""
        pressed = sum(bit for index, bit in enumerate(_BUTTONS) if buttons >> index & 1)
        with self._lock:
            state = self.state
            if not state.enabled or not state.absolute or self._notify is None:
                return False
            if len(state.waiting) + _REPORT <= WAITING_MAX:
                place = (at * _PLACE_MAX // ABS_MAX for at in (x, y))
                # The wheel counts downwards.
                state.waiting.extend((pressed, *place, -wheel & 0xFFFF_FFFF))
        self._notify()
        return True

    def _guarded(self, command: Command) -> Command:
        def run(call: GuestCall) -> int:
            with self._lock:
                if self._notify is None:
                    return NO_COMMAND
                if self.state.restriction == CPL_0 and call.cpl != 0:
                    return NO_COMMAND
                return command(call)

        return run

    def _status(self, call: GuestCall) -> int:
        state = self.state
        error = ERROR if state.failed or not state.enabled else 0
        return error | len(state.waiting)

    def _data(self, call: GuestCall) -> int:
        state, count = self.state, low(call, "rbx")
        if not 1 <= count <= _REPORT or count > len(state.waiting):
            state.failed = True
            state.waiting.clear()
            return ERROR
        words = [state.waiting.popleft() for _ in range(count)]
        for name, word in zip(("rbx", "rcx", "rdx"), words[1:], strict=False):
            call[name] = word
        return words[0]

    def _command(self, call: GuestCall) -> int:
        state = self.state
        asked = low(call, "rbx")
        if asked == ENABLE:
            state.enabled, state.absolute, state.failed = True, False, False
            state.waiting.clear()
            state.waiting.append(VERSION)
        elif asked == DISABLE:
            state.enabled = False
            state.waiting.clear()
        elif asked in (RELATIVE, ABSOLUTE):
            state.absolute = asked == ABSOLUTE
        return 0

    def _restrict(self, call: GuestCall) -> int:
        self.state.restriction = low(call, "rbx") & 0xFF
        return 0

    # Life

    def reset(self) -> None:
        with self._lock:
            self.state.reset()

    def save(self) -> State:
        with self._lock:
            return self.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self.state.load(state)
