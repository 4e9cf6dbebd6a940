"""A PS/2 mouse with five buttons and a wheel: its commands and packets (IBM PS/2 Hardware Interface
Technical Reference, mouse, 1990; Microsoft's extension for the wheel by a sequence of rates)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch.devices import input_codes as codes
from tetrarch.devices._state import flag, queue, register
from tetrarch.devices.input_user import Event, InputModel
from tetrarch.devices.ps2 import ACK, OUTPUT_MAX, RESEND, TEST_PASSED, Ps2Core, Ps2State

__all__ = ["MOUSE", "Ps2MouseCore", "Ps2MouseState"]

#: Of a mouse with three buttons, with a wheel, and with five buttons, and the rates that are set
#: one after the other to become it.
PLAIN, WHEEL, FIVE_BUTTONS = 0, 3, 4
BECOMES: Final[Mapping[tuple[int, ...], int]] = {
    (200, 100, 80): WHEEL,
    (200, 200, 80): FIVE_BUTTONS,
}

# Commands with a byte behind them.
SET_RESOLUTION: Final = 0xE8
SET_RATE: Final = 0xF3
RATES: Final = (10, 20, 40, 60, 80, 100, 200)

DEFAULT_RATE, DEFAULT_RESOLUTION = 100, 2
#: Of a packet's axes, which have 9 bits, and of its wheel, which has 4.
AXIS: Final = range(-256, 256)
NOTCH: Final = range(-8, 8)

_BUTTONS: Final = {code: bit for bit, code in enumerate(codes.BUTTONS.values())}
MOUSE: Final = InputModel(
    codes.BUTTONS, {codes.EV_REL: (codes.REL_X, codes.REL_Y, codes.REL_WHEEL)}
)


@dataclass
class Ps2MouseState(Ps2State):
    kind = "ps2_mouse"

    reporting: bool = flag()
    remote: bool = flag()
    wrap: bool = flag()
    doubled: bool = flag()
    """Scaling 2:1, which changes what the status says: a driver scales better."""
    rate: int = register(DEFAULT_RATE, 0xFF)
    resolution: int = register(DEFAULT_RESOLUTION, 3)
    identity: int = register(PLAIN, 7)
    rates: deque[int] = queue(3)
    """The last that were set."""
    buttons: int = register(0, 0x1F)


class Ps2MouseCore(Ps2Core):
    state: Ps2MouseState

    def __init__(self) -> None:
        self.state = Ps2MouseState()

    def write(self, value: int) -> None:
        state = self.state
        if state.wrap and value not in (0xEC, 0xFF):
            self._say(value)
            return
        expects, state.expects = state.expects, 0
        if expects == SET_RESOLUTION and value <= 3:
            state.resolution = value
            self._say(ACK)
        elif expects == SET_RATE and value in RATES:
            self._set_rate(value)
            self._say(ACK)
        elif expects:
            self._say(RESEND)
        else:
            self._command(value)

    def _set_rate(self, value: int) -> None:
        state = self.state
        state.rate = value
        state.rates.append(value)
        while len(state.rates) > 3:
            state.rates.popleft()
        state.identity = BECOMES.get(tuple(state.rates), state.identity)

    def _command(self, value: int) -> None:
        state = self.state
        match value:
            case 0xE6 | 0xE7:
                state.doubled = value == 0xE7
                self._say(ACK)
            case 0xE8 | 0xF3:
                state.expects = value
                self._say(ACK)
            case 0xE9:
                self._say(ACK, self._status(), state.resolution, state.rate)
            case 0xEA | 0xF0:
                state.remote = value == 0xF0
                self._say(ACK)
            case 0xEB:
                self._say(ACK, *self._packet(0, 0, 0))
            case 0xEC | 0xEE:
                state.wrap = value == 0xEE
                self._say(ACK)
            case 0xF2:
                self._say(ACK, state.identity)
            case 0xF4 | 0xF5:
                state.reporting = value == 0xF4
                self._say(ACK)
            case 0xF6:
                self._defaults()
                self._say(ACK)
            case 0xFE:
                self._say(state.last)
            case 0xFF:
                buttons = state.buttons
                state.reset()
                state.buttons = buttons
                self._say(ACK, TEST_PASSED, PLAIN)
            case _:
                self._say(RESEND)

    def _defaults(self) -> None:
        state = self.state
        state.reporting = state.remote = state.doubled = False
        state.rate, state.resolution = DEFAULT_RATE, DEFAULT_RESOLUTION

    def _status(self) -> int:
        state = self.state
        left, right, middle = (state.buttons >> bit & 1 for bit in range(3))
        modes = state.remote << 6 | state.reporting << 5 | state.doubled << 4
        return modes | left << 2 | middle << 1 | right

    def _packet(self, x: int, y: int, wheel: int) -> bytes:
        """``y`` counts upwards, ``wheel`` towards the user."""
        state = self.state
        first = state.buttons & 7 | 8 | (x < 0) << 4 | (y < 0) << 5
        packet = [first, x & 0xFF, y & 0xFF]
        if state.identity == WHEEL:
            packet.append(wheel & 0xFF)
        elif state.identity == FIVE_BUTTONS:
            packet.append(wheel & 0x0F | (state.buttons >> 3 & 3) << 4)
        return bytes(packet)

    def admit(self, events: Sequence[Event]) -> bool:
        """A movement takes as many packets as it is far."""
        state = self.state
        before = state.buttons
        moved = {codes.REL_X: 0, codes.REL_Y: 0, codes.REL_WHEEL: 0}
        packets = bytearray()
        for kind, code, value in events:
            if kind == codes.EV_KEY:
                bit = 1 << _BUTTONS[code]
                state.buttons = state.buttons | bit if value else state.buttons & ~bit
            elif kind == codes.EV_REL:
                moved[code] += value
            else:
                packets += self._packets(moved)
        if not state.remote and state.reporting and self._put(bytes(packets)):
            return True
        state.buttons = before
        return False

    def _packets(self, moved: dict[int, int]) -> bytes:
        """Of what has ``moved``, which is none any more then."""
        left = [moved[codes.REL_X], -moved[codes.REL_Y], -moved[codes.REL_WHEEL]]
        if self.state.identity == PLAIN:
            left[2] = 0
        moved.update(dict.fromkeys(moved, 0))
        packets = bytearray()
        while not packets or (any(left) and len(packets) <= OUTPUT_MAX):
            step = [
                min(max(value, span[0]), span[-1])
                for value, span in zip(left, (AXIS, AXIS, NOTCH), strict=True)
            ]
            packets += self._packet(*step)
            left = [value - part for value, part in zip(left, step, strict=True)]
        return bytes(packets)

    @property
    def leds(self) -> frozenset[str]:
        return frozenset()
