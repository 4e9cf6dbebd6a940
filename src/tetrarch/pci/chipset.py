"""The chipset that firmware for PCs knows: Intel's 440FX with the PIIX3 and the PIIX4's power
management, as on QEMU's machine "pc".

Firmware chooses by their identities how it drives the machine. Registers without effect here
are kept as they are written: memory from 0xC0000 on is RAM whatever the PAM registers say.
"""

from __future__ import annotations

from typing import Final

from tetrarch.devices import acpi_pm
from tetrarch.machine.engine_vm import EngineVm
from tetrarch.pci.function import Identity, PciFunction

__all__ = ["ISA_SLOT", "POWER_FUNCTION", "host_bridge", "isa_bridge", "power_management"]

ISA_SLOT: Final = 1
POWER_FUNCTION: Final = 3

#: By this subsystem SeaBIOS knows that fw_cfg is there.
SUBSYSTEM: Final = (0x1AF4, 0x1100)
MULTI_FUNCTION: Final = 0x80
HEADER_TYPE: Final = 0x0E

# 82441FX (Intel 290549): programmable attribute map, and SMRAM control.
PAM: Final = 0x59
PAM_BYTES: Final = 7
SMRAM: Final = 0x72
# 82371SB (Intel 290550): the lines of PIRQA# to PIRQD#; bit 7 is that they go nowhere.
PIRQ_ROUTES: Final = 0x60
PIRQ_OFF: Final = 0x80
# 82371AB (Intel 290562): where power management is in I/O space, and that it answers there.
PMBA: Final = 0x40
DEVACTB: Final = 0x58
PMREGMISC: Final = 0x80
SMBBA: Final = 0x90
SMBHSTCFG: Final = 0xD2
IO_RANGE: Final = 1
#: Writes to the APM port raise an SMI. Firmware that finds it set leaves SMM alone, which is not
#: there.
APMC_EN: Final = 1 << 25


def host_bridge(vm: EngineVm) -> PciFunction:
    function = PciFunction(
        vm, Identity(0x8086, 0x1237, 0x060000, 2, *SUBSYSTEM), interrupt_pin=False
    )
    function.config.define(PAM, PAM_BYTES, 0, (1 << 8 * PAM_BYTES) - 1)
    function.config.define(SMRAM, 1, 0x02, 0x7F)
    return function


def isa_bridge(vm: EngineVm) -> PciFunction:
    function = PciFunction(
        vm, Identity(0x8086, 0x7000, 0x060100, 0, *SUBSYSTEM), interrupt_pin=False
    )
    function.config.define(HEADER_TYPE, 1, MULTI_FUNCTION)
    for pin in range(4):
        function.config.define(PIRQ_ROUTES + pin, 1, PIRQ_OFF, 0xFF)
    return function


def power_management(vm: EngineVm) -> PciFunction:
    """Of the PIIX4; its registers lie where the ACPI tables say, and nowhere else."""
    function = PciFunction(
        vm, Identity(0x8086, 0x7113, 0x068000, 3, *SUBSYSTEM), interrupt_pin=False
    )
    function.config.define(PMBA, 4, acpi_pm.PORT_BASE | IO_RANGE)
    function.config.define(DEVACTB, 4, APMC_EN)
    function.config.define(PMREGMISC, 1, IO_RANGE)
    function.config.define(SMBBA, 4, IO_RANGE, 0xFFC0)
    function.config.define(SMBHSTCFG, 1, 0, 0x0F)
    return function
