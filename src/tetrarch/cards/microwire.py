"""A serial EEPROM of 64 words of 16 bits at four wires, Microwire, which can be read alone (Intel's
317453, 5.3; National Semiconductor's NM93C46)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._state import DeviceState, register

__all__ = ["MicrowireState", "drive", "out"]

# The wires: clock, chip select, data in.
CLOCK, SELECT, DATA = 1 << 0, 1 << 1, 1 << 2
WIRES: Final = CLOCK | SELECT | DATA
#: A start bit, two of an operation, six of an address.
COMMAND_BITS: Final = 9
READ: Final = 2
WORD_BITS: Final = 16
ALL_BITS: Final = 64 * WORD_BITS


@dataclass
class MicrowireState(DeviceState):
    """Of a chip, as a part of that of its device."""

    wires: int = register(0, WIRES)
    shifted: int = register(0, (1 << COMMAND_BITS) - 1)
    """What came since it was selected, from the start bit on."""
    said: int = register(0, 2 * ALL_BITS - 1)
    """Bits that it was asked for; the first is none of a word."""


def drive(state: MicrowireState, wires: int) -> None:
    """The levels of the wires from now on."""
    before, state.wires = state.wires, wires & WIRES
    if not wires & SELECT:
        state.shifted = state.said = 0
    elif wires & CLOCK and not before & CLOCK:
        if state.shifted >> (COMMAND_BITS - 1):
            # Behind the last word comes the first.
            state.said = state.said + 1 if state.said < ALL_BITS else 1
        else:
            state.shifted = state.shifted << 1 | bool(wires & DATA)


def out(state: MicrowireState, words: Sequence[int]) -> bool:
    """The level of its data: high while it says nothing, for it is ready."""
    if state.shifted >> (COMMAND_BITS - 3) != 1 << 2 | READ:
        return True
    if state.said == 0:
        return False
    at = (state.shifted & 63) * WORD_BITS + state.said - 1
    return bool(words[at // WORD_BITS % len(words)] >> (WORD_BITS - 1 - at % WORD_BITS) & 1)
