"""What of a machine's devices shows something."""

from __future__ import annotations

from collections.abc import Callable

from tetrarch._native import GuestMemoryError
from tetrarch.display import Display
from tetrarch.display.display import Source
from tetrarch.display.linear import RamfbSource
from tetrarch.display.vga import VgaSource
from tetrarch.errors import MachineStateError
from tetrarch.machine.pc import Pc

__all__ = ["display_of"]


def display_of(pc: Pc, read: Callable[[int, int], bytes]) -> Display:
    """``read`` gives guest memory. Raises MachineStateError for a machine without a screen."""
    if pc.vga is None:
        raise MachineStateError("this machine has no screen", mend="make it with vga=True")
    sources: list[Source] = []
    if pc.svga is not None:
        sources.append(pc.svga)
    if pc.vbe is not None:
        sources.append(pc.vbe)
    if pc.firmware is not None and pc.firmware.ramfb is not None:
        sources.append(RamfbSource(pc.firmware.ramfb, read, GuestMemoryError))
    sources.append(VgaSource(pc.vga, read))
    return Display(sources)
