"""Registers of a gigabit PHY, Marvell's M88E1011 (IEEE 802.3, 22.2.4, 28.2.4 and 40.5.1; Intel's
317453, 13.8). Its link has 1000 Mbit/s, and is there as soon as there is a network."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["LOOPBACK", "START", "has_link", "loops", "read", "write"]

CONTROL, STATUS, ID_1, ID_2 = 0, 1, 2, 3
ADVERTISED, PARTNER, EXPANSION, NEXT_PAGE = 4, 5, 6, 7
GIGABIT_CONTROL, GIGABIT_STATUS, EXTENDED_STATUS = 9, 10, 15
# Of the vendor.
SPECIFIC_CONTROL, SPECIFIC_STATUS = 16, 17
INTERRUPTS, EXTENDED_CONTROL, EXTENDED_PAGE, LED_CONTROL = 18, 20, 22, 24
PAGE, PAGED = 29, 30
COUNT: Final = 32

# Control: two that end by themselves, and others.
RESET, RESTART = 1 << 15, 1 << 9
LOOPBACK: Final = 1 << 14
POWER_DOWN: Final = 1 << 11

#: What they are after a reset: negotiation of 1000 Mbit/s, full duplex; all modes and pauses.
_STARTS: Final = {
    CONTROL: 0x1140,
    ADVERTISED: 0x0DE1,
    NEXT_PAGE: 0x2001,
    GIGABIT_CONTROL: 0x0E00,
    SPECIFIC_CONTROL: 0x0068,
    EXTENDED_CONTROL: 0x0D60,
    LED_CONTROL: 0x4100,
}
_WRITABLE: Final = {*_STARTS, INTERRUPTS, EXTENDED_PAGE, PAGE, PAGED}
START: Final = struct.pack(f"<{COUNT}H", *(_STARTS.get(number, 0) for number in range(COUNT)))

#: All modes but T4; negotiation; registers beyond these.
_ABILITIES: Final = 0x7949
_ALWAYS: Final = {ID_1: 0x0141, ID_2: 0x0C20, EXTENDED_STATUS: 0x3000}
#: What is added where the link is up: the end of negotiation; a partner of 1000 Mbit/s without
#: pauses; both receivers well; full duplex at 1000 Mbit/s, resolved.
_LINKED: Final = {
    STATUS: 0x0024,
    PARTNER: 0x41E1,
    EXPANSION: 0x0003,
    GIGABIT_STATUS: 0x3C00,
    SPECIFIC_STATUS: 0xAC00,
}


def _get(registers: bytearray, number: int) -> int:
    value: int = struct.unpack_from("<H", registers, 2 * number)[0]
    return value


def has_link(registers: bytearray, network: bool) -> bool:
    return network and not _get(registers, CONTROL) & POWER_DOWN


def loops(registers: bytearray) -> bool:
    """Whether it gives back what it is given."""
    return bool(_get(registers, CONTROL) & LOOPBACK)


def read(registers: bytearray, number: int, network: bool) -> int:
    """``network``: whether there is one at the other end."""
    if number in _WRITABLE:
        return _get(registers, number)
    value = _ABILITIES if number == STATUS else _ALWAYS.get(number, 0)
    return value | (_LINKED.get(number, 0) if has_link(registers, network) else 0)


def write(registers: bytearray, number: int, value: int) -> bool:
    """Whether the link begins anew by that."""
    if number not in _WRITABLE:
        return False
    before = _get(registers, CONTROL)
    if number == CONTROL and value & RESET:
        # Negotiation and its modes stay as they were set (22.2.4.1.1 leaves that to the PHY).
        value &= ~LOOPBACK
    kept = value & ~(RESET | RESTART) if number == CONTROL else value
    struct.pack_into("<H", registers, 2 * number, kept)
    return number == CONTROL and bool(value & (RESET | RESTART) or (before ^ value) & POWER_DOWN)
