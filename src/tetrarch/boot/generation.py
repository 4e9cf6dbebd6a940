"""The VM generation ID: 16 bytes by which a guest sees that it is a copy of itself.

Microsoft, "Virtual Machine Generation ID" (2012), as Linux knows it (drivers/virt/vmgenid.c) and
QEMU offers it (docs/specs/vmgenid.rst): a device of the DSDT tells where the bytes are, and that
they have changed. A guest then makes its random numbers anew.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from tetrarch.boot import aml
from tetrarch.boot.layout import GENERATION_ID
from tetrarch.devices.acpi_pm import GENERATION_EVENT

if TYPE_CHECKING:
    from tetrarch.boot.layout import GuestMemory
    from tetrarch.devices import AcpiPm
    from tetrarch.machine.engine_vm import EngineVm

__all__ = ["change_generation", "first_generation", "generation_device", "generation_event"]

_BYTES: Final = 16
_PATH: Final = "\\_SB.VGEN"
#: The notification that the specification has for a change.
_CHANGED: Final = 0x80


def generation_device() -> bytes:
    low, high = GENERATION_ID & 0xFFFF_FFFF, GENERATION_ID >> 32
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("TTRA0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(low), aml.integer(high))),
    )


def generation_event() -> bytes:
    """The method of the event, for the DSDT's ``\\_GPE``."""
    return aml.method(f"_E{GENERATION_EVENT:02X}", 0, aml.notify(_PATH, aml.integer(_CHANGED)))


def first_generation(vm: EngineVm) -> None:
    """Of a machine that starts; one that is reset is the same still."""
    if vm.read_memory(GENERATION_ID, _BYTES) == bytes(_BYTES):
        vm.write_memory(GENERATION_ID, os.urandom(_BYTES))


def change_generation(vm: GuestMemory, acpi: AcpiPm) -> None:
    """The machine goes on as another."""
    vm.write_memory(GENERATION_ID, os.urandom(_BYTES))
    acpi.set_gpe(GENERATION_EVENT, True)
    acpi.set_gpe(GENERATION_EVENT, False)
