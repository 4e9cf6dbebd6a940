"""The 16550A UART: where it is on a PC, and its state.

The registers and the two ways of the bytes are Rust, since a guest's console calls them for each
byte: ``crates/devices``. tests/devices has a model in Python that they are compared with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tetrarch._native import SerialPort
from tetrarch.devices._state import DeviceState, State, flag, queue, register

__all__ = ["GSI", "PORTS", "PORT_BASE", "Uart16550", "UartState"]

PORT_BASE: Final = 0x3F8
PORTS: Final = 8
GSI: Final = 4

FIFO_SIZE: Final = 16
#: What a saved state may hold of input that the guest has not taken.
LINE_BYTES_MAX: Final = 1 << 20

IER_MASK: Final = 0x0F
FCR_STORED: Final = 0xC9
MCR_MASK: Final = 0x1F

LSR_FE: Final = 0x08
LSR_BI: Final = 0x10

#: 115200 baud from the usual 1.8432 MHz.
RESET_DIVISOR: Final = 1


@dataclass
class UartState(DeviceState):
    kind = "uart16550"
    version = 2

    ier: int = register(0, IER_MASK)
    fcr: int = register(0, FCR_STORED)
    lcr: int = register(0, 0xFF)
    mcr: int = register(0, MCR_MASK)
    mcr_written: bool = flag()
    polls: int = register(0, 0x1F)
    """How often LSR was read since anything was written, as far as that counts."""
    overrun: bool = flag()
    msr_delta: int = register(0, 0x0F)
    scr: int = register(0, 0xFF)
    divisor: int = register(RESET_DIVISOR, 0xFFFF)
    thre_pending: bool = flag()
    rx: deque[int] = queue(FIFO_SIZE, 0xFF | (LSR_BI | LSR_FE) << 8)
    """The receiver's FIFO: each a byte, and above it its errors as LSR shows them."""
    line: deque[int] = queue(LINE_BYTES_MAX)
    """What comes on the line when the guest is ready for it."""


class Uart16550(SerialPort):
    """The UART on a machine. Its state is checked here, when a machine is saved or loaded."""

    def reset(self) -> None:
        self.set_registers(UartState().save())

    def save(self) -> State:
        return UartState(**self.registers()).save()

    def load(self, state: Mapping[str, Any]) -> None:
        taken = UartState()
        taken.load(state)
        self.set_registers(taken.save())
