"""The 8237A DMA controller of channels 0 to 3, with the PC/AT's page registers (Intel 8237A data
sheet, 1993; IBM PC/AT Technical Reference, DMA).

A device moves its bytes as the channel says: how many, where, and which way. Nothing here uses the
second controller, of 16-bit channels: nobody claims its ports.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from tetrarch._native import GuestMemoryError
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, flag, memory, register

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PAGE_PORTS", "PORTS", "PORT_BASE", "Dma8237", "DmaMemory", "DmaState"]

PORT_BASE: Final = 0x00
PORTS: Final = 16
#: Of channels 0 to 3.
PAGE_PORTS: Final = (0x87, 0x83, 0x81, 0x82)

CHANNELS: Final = 4
#: Behind the channels' addresses and counts.
STATUS_COMMAND: Final = 0x8
REQUEST: Final = 0x9
SINGLE_MASK: Final = 0xA
MODE: Final = 0xB
CLEAR_FLIP_FLOP: Final = 0xC
MASTER_CLEAR: Final = 0xD
CLEAR_MASK: Final = 0xE
ALL_MASK: Final = 0xF

COMMAND_DISABLE: Final = 0x04
MODE_TRANSFER: Final = 0x0C
MODE_TO_MEMORY: Final = 0x04
MODE_FROM_MEMORY: Final = 0x08
MODE_AUTO: Final = 0x10
MODE_DOWN: Final = 0x20

_BOUND: Final = 1 << 16


class DmaMemory(Protocol):
    """What of a machine the controller uses."""

    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...


@dataclass
class DmaState(DeviceState):
    """Addresses and counts as they lie in the ports: two words a channel, low byte first."""

    kind = "dma8237"

    base: bytearray = memory(4 * CHANNELS)
    current: bytearray = memory(4 * CHANNELS)
    modes: bytearray = memory(CHANNELS)
    pages: bytearray = memory(CHANNELS)
    mask: int = register(0xF, 0xF)
    command: int = register(0, 0xFF)
    status: int = register(0, 0xF)
    """Channels that have come to their end, since it was read."""
    high: bool = flag()
    """The flip-flop: the next access is to the high byte of a word."""


class Dma8237:
    """Lock: ``_lock``, held for a device's transfer too: it is one of a bus."""

    def __init__(self, memory: DmaMemory) -> None:
        self.state = DmaState()
        self._memory = memory
        self._lock = threading.Lock()

    # The side of the guest.

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return all_ones(size)
        state = self.state
        with self._lock:
            if offset < 2 * CHANNELS:
                value = state.current[2 * offset + state.high]
                state.high = not state.high
                return value
            if offset == STATUS_COMMAND:
                status, state.status = state.status, 0
                return status
            return state.mask | 0xF0 if offset == ALL_MASK else 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        state = self.state
        with self._lock:
            if offset < 2 * CHANNELS:
                at = 2 * offset + state.high
                state.base[at] = state.current[at] = value
                state.high = not state.high
            elif offset == STATUS_COMMAND:
                state.command = value
            elif offset == SINGLE_MASK:
                bit = 1 << (value & 3)
                state.mask = state.mask | bit if value & 4 else state.mask & ~bit
            elif offset == MODE:
                state.modes[value & 3] = value & 0xFC
            elif offset == CLEAR_FLIP_FLOP:
                state.high = False
            elif offset == MASTER_CLEAR:
                state.high, state.command, state.status, state.mask = False, 0, 0, 0xF
            elif offset == CLEAR_MASK:
                state.mask = 0
            elif offset == ALL_MASK:
                state.mask = value & 0xF
            # REQUEST, by software, is for transfers between places of memory.

    def page(self, channel: int) -> _Page:
        """Address bits 16 to 23 of a channel, a device of one port."""
        return _Page(self, channel)

    # The side of a device.

    def left(self, channel: int) -> int:
        """Bytes until the channel's end; 0 where it does not answer."""
        state = self.state
        with self._lock:
            if state.command & COMMAND_DISABLE or state.mask >> channel & 1:
                return 0
            return self._word(channel, 1) + 1

    def to_memory(self, channel: int, data: bytes) -> None:
        """At most ``left(channel)`` bytes of the device. In a verify transfer none arrives."""
        with self._lock:
            if self.state.modes[channel] & MODE_TRANSFER == MODE_TO_MEMORY:
                down = self.state.modes[channel] & MODE_DOWN
                for address, start, length in self._pieces(channel, len(data)):
                    piece = data[start : start + length]
                    # Where no RAM is, nobody takes them.
                    with suppress(GuestMemoryError):
                        self._memory.write_memory(address, piece[::-1] if down else piece)
            self._advance(channel, len(data))

    def from_memory(self, channel: int, length: int) -> bytes:
        """At most ``left(channel)`` bytes for the device."""
        data = bytearray(b"\xff" * length)
        with self._lock:
            if self.state.modes[channel] & MODE_TRANSFER == MODE_FROM_MEMORY:
                down = self.state.modes[channel] & MODE_DOWN
                for address, start, size in self._pieces(channel, length):
                    try:
                        piece = self._memory.read_memory(address, size)
                    except GuestMemoryError:
                        continue  # no RAM is there: the bus floats
                    data[start : start + size] = piece[::-1] if down else piece
            self._advance(channel, length)
        return bytes(data)

    def _word(self, channel: int, which: int) -> int:
        """The current address, or the current count, which is one less than what is left."""
        at = 4 * channel + 2 * which
        return int.from_bytes(self.state.current[at : at + 2], "little")

    def _pieces(self, channel: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(guest physical address, where in the data, bytes): an address wraps within its page."""
        page, at = self.state.pages[channel] << 16, self._word(channel, 0)
        down = self.state.modes[channel] & MODE_DOWN
        done = 0
        while done < length:
            part = min(length - done, at + 1 if down else _BOUND - at)
            yield page + (at - part + 1 if down else at), done, part
            at = (at - part if down else at + part) % _BOUND
            done += part

    def _advance(self, channel: int, length: int) -> None:
        state, first = self.state, 4 * channel
        step = -length if state.modes[channel] & MODE_DOWN else length
        address = (self._word(channel, 0) + step) % _BOUND
        count = self._word(channel, 1) - length
        state.current[first : first + 4] = address.to_bytes(2, "little") + (
            count % _BOUND
        ).to_bytes(2, "little")
        if count >= 0:
            return
        state.status |= 1 << channel
        if state.modes[channel] & MODE_AUTO:
            state.current[first : first + 4] = state.base[first : first + 4]
        else:
            state.mask |= 1 << channel

    # Life.

    def reset(self) -> None:
        with self._lock:
            self.state.reset()

    def save(self) -> State:
        with self._lock:
            return self.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self.state.load(state)


class _Page:
    def __init__(self, controller: Dma8237, channel: int) -> None:
        self._controller, self._channel = controller, channel

    def read(self, offset: int, size: int) -> int:
        return self._controller.state.pages[self._channel]

    def write(self, offset: int, size: int, value: int) -> None:
        self._controller.state.pages[self._channel] = value & 0xFF
