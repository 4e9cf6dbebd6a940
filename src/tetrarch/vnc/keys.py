"""Keys as viewers name them, and as devices of ours do.

Keysyms are X11's (X Window System Protocol, appendix A; xorgproto, include/X11/keysymdef.h): for
characters of Latin-1 their codes, for others 0x01000000 and their number, and for keys without one
a number of 0xFF00 and above. What key gives a character is a matter of the layout, which is that of
the United States here. Scan codes are those of set 1.
"""

from __future__ import annotations

from typing import Final

from tetrarch.devices.input_codes import CHARACTERS, KEYS

__all__ = ["SHIFT_KEYS", "key_of_keysym", "key_of_scan_code"]

SHIFT_KEYS: Final = frozenset({KEYS["leftshift"], KEYS["rightshift"]})


def _by_number(table: str) -> dict[int, int]:
    words = table.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {int(number, 16): KEYS[name] for name, number in pairs}


#: Keysyms without 0xFF before them.
_FUNCTION: Final = _by_number("""
backspace 08 tab 09 linefeed 0a enter 0d pause 13 scrolllock 14 sysrq 15 esc 1b compose 20
henkan 23 hangeul 31 hanja 34 home 50 left 51 up 52 right 53 down 54 pageup 55 pagedown 56 end 57
sysrq 61 insert 63 compose 67 pause 6b numlock 7f
kpenter 8d kp7 95 kp4 96 kp8 97 kp6 98 kp2 99 kp9 9a kp3 9b kp1 9c kp5 9d kp0 9e kpdot 9f
kpasterisk aa kpplus ab kpcomma ac kpminus ad kpdot ae kpslash af
kp0 b0 kp1 b1 kp2 b2 kp3 b3 kp4 b4 kp5 b5 kp6 b6 kp7 b7 kp8 b8 kp9 b9 kpequal bd
f1 be f2 bf f3 c0 f4 c1 f5 c2 f6 c3 f7 c4 f8 c5 f9 c6 f10 c7 f11 c8 f12 c9 f13 ca f14 cb f15 cc
f16 cd f17 ce f18 cf f19 d0 f20 d1 f21 d2 f22 d3 f23 d4 f24 d5
leftshift e1 rightshift e2 leftctrl e3 rightctrl e4 capslock e5 leftmeta e7 rightmeta e8
leftalt e9 rightalt ea leftmeta eb rightmeta ec delete ff
""")
#: ISO_Level3_Shift, and Tab with Shift.
_ISO: Final = {0xFE03: KEYS["rightalt"], 0xFE20: KEYS["tab"]}
_UNICODE: Final = 0x0100_0000

#: Of these the numbers are Linux's too; then come those with 0xE0 before them, as 0x80 and above.
_PLAIN: Final = frozenset({*range(0x01, 0x54), 0x56, 0x57, 0x58})
_EXTENDED: Final = _by_number("""
kpenter 9c rightctrl 9d mute a0 volumedown ae volumeup b0 homepage b2 kpslash b5 sysrq b7
rightalt b8 sysrq 54 pause c6 home c7 up c8 pageup c9 left cb right cd end cf down d0 pagedown d1
insert d2 delete d3 leftmeta db rightmeta dc compose dd power de sleep df wakeup e3
ro 73 katakanahiragana 70 henkan 79 muhenkan 7b yen 7d kpcomma 7e kpequal 59
""")


def key_of_keysym(keysym: int) -> tuple[int, bool | None] | None:
    """The key, and whether Shift is to be down with it; None: that is of no matter. None where no
    key has it."""
    if keysym >> 8 == 0xFF:
        code = _FUNCTION.get(keysym & 0xFF)
        return None if code is None else (code, None)
    if keysym in _ISO:
        return _ISO[keysym], None
    character = keysym - _UNICODE if keysym > _UNICODE else keysym
    keys = CHARACTERS.get(chr(character)) if 0x20 <= character < 0x7F else None
    if keys is None:
        return None
    return KEYS[keys[-1]], None if keys == ("space",) else len(keys) > 1


def key_of_scan_code(code: int) -> int | None:
    return code if code in _PLAIN else _EXTENDED.get(code)
