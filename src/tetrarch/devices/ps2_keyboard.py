"""A PS/2 keyboard: its commands, and scan code set 2 (IBM PS/2 Hardware Interface Technical
Reference, keyboards, 1990)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch.devices import input_codes as codes
from tetrarch.devices._state import flag, register
from tetrarch.devices.input_user import Event, InputModel
from tetrarch.devices.ps2 import ACK, RESEND, TEST_PASSED, Ps2Core, Ps2State

__all__ = ["KEYBOARD", "Ps2KeyboardCore", "Ps2KeyboardState"]

ECHO: Final = 0xEE
ID: Final = (0xAB, 0x83)
RELEASED: Final = 0xF0
#: The bytes of some keys begin with it.
EXTENDED: Final = 0xE0
PAUSE: Final = bytes.fromhex("e1 14 77 e1 f0 14 f0 77")
#: The one that there is.
SCAN_SET: Final = 2

# Commands; some have a byte behind them.
LEDS: Final = 0xED
SET_SCAN_SET: Final = 0xF0
TYPEMATIC: Final = 0xF3


def _by_key(table: str) -> dict[int, int]:
    words = table.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {codes.KEYS[name]: int(code, 16) for name, code in pairs}


#: Set 2 by the number of the key: those that have one byte.
_PLAIN: Final = _by_key("""
esc 76 1 16 2 1e 3 26 4 25 5 2e 6 36 7 3d 8 3e 9 46 0 45 minus 4e equal 55 backspace 66
tab 0d q 15 w 1d e 24 r 2d t 2c y 35 u 3c i 43 o 44 p 4d leftbrace 54 rightbrace 5b enter 5a
leftctrl 14 a 1c s 1b d 23 f 2b g 34 h 33 j 3b k 42 l 4b semicolon 4c apostrophe 52 grave 0e
leftshift 12 backslash 5d z 1a x 22 c 21 v 2a b 32 n 31 m 3a comma 41 dot 49 slash 4a
rightshift 59 kpasterisk 7c leftalt 11 space 29 capslock 58 f1 05 f2 06 f3 04 f4 0c f5 03
f6 0b f7 83 f8 0a f9 01 f10 09 numlock 77 scrolllock 7e kp7 6c kp8 75 kp9 7d kpminus 7b kp4 6b
kp5 73 kp6 74 kpplus 79 kp1 69 kp2 72 kp3 7a kp0 70 kpdot 71 102nd 61 f11 78 f12 07 ro 51
henkan 64 katakanahiragana 13 muhenkan 67 kpequal 0f kpcomma 6d yen 6a
""")
#: Those behind EXTENDED.
_EXTENDED: Final = _by_key("""
kpenter 5a rightctrl 14 kpslash 4a sysrq 7c rightalt 11 home 6c up 75 pageup 7d left 6b right 74
end 69 down 72 pagedown 7a insert 70 delete 71 mute 23 volumedown 21 volumeup 32 power 37
leftmeta 1f rightmeta 27 compose 2f sleep 3f wakeup 5e
""")
_PAUSE_KEY: Final = codes.KEYS["pause"]
_HAS: Final = {*_PLAIN, *_EXTENDED, _PAUSE_KEY}

KEYBOARD: Final = InputModel(
    {name: code for name, code in codes.KEYS.items() if code in _HAS},
    {codes.EV_LED: tuple(codes.LEDS.values())},
)


@dataclass
class Ps2KeyboardState(Ps2State):
    kind = "ps2_keyboard"

    scanning: bool = flag(True)
    """Whether keys are told."""
    leds: int = register(0, 7)
    """As their command has them: Scroll Lock, Num Lock, Caps Lock."""


class Ps2KeyboardCore(Ps2Core):
    state: Ps2KeyboardState

    def __init__(self) -> None:
        self.state = Ps2KeyboardState()

    def write(self, value: int) -> None:
        expects, self.state.expects = self.state.expects, 0
        if expects and value < LEDS:
            self._argument(expects, value)
        else:
            self._command(value)

    def _argument(self, command: int, value: int) -> None:
        if command == LEDS:
            self.state.leds = value & 7
        if command == SET_SCAN_SET and value not in (0, SCAN_SET):
            self._say(RESEND)
        elif command == SET_SCAN_SET and value == 0:
            self._say(ACK, SCAN_SET)
        else:
            self._say(ACK)

    def _command(self, value: int) -> None:
        match value:
            case 0xED | 0xF0 | 0xF3:
                self.state.expects = value
                self._say(ACK)
            case 0xEE:
                self._say(ECHO)
            case 0xF2:
                self._say(ACK, *ID)
            case 0xF4:
                self.state.output.clear()
                self.state.scanning = True
                self._say(ACK)
            case 0xF5 | 0xF6:
                # Both set what there is to set back; the first stops the keys, too.
                self.state.output.clear()
                self.state.scanning = value == 0xF6
                self._say(ACK)
            case 0xFE:
                self._say(self.state.last)
            case 0xFF:
                self.state.reset()
                self._say(ACK, TEST_PASSED)
            case _:
                self._say(RESEND)

    def admit(self, events: Sequence[Event]) -> bool:
        said = bytes(
            byte
            for kind, code, down in events
            if kind == codes.EV_KEY
            for byte in _bytes(code, down)
        )
        return self.state.scanning and self._put(said)

    @property
    def leds(self) -> frozenset[str]:
        names = ("scroll", "num", "caps")
        return frozenset(name for bit, name in enumerate(names) if self.state.leds >> bit & 1)


def _bytes(code: int, down: int) -> bytes:
    if code == _PAUSE_KEY:
        return PAUSE if down else b""  # which tells of both at once
    plain = _PLAIN.get(code)
    prefix, byte = (b"", plain) if plain is not None else (bytes([EXTENDED]), _EXTENDED[code])
    return prefix + (bytes([byte]) if down else bytes([RELEASED, byte]))
