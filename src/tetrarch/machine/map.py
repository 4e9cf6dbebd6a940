"""The address and interrupt map of the machine.

memory      0 .. 0xBFFF_FFFF                RAM, up to 3 GiB of it
            0xC000_0000 .. 0xDFFF_FFFF      PCI: BARs
            0xE000_0000 .. 0xE00F_FFFF      PCI: configuration space of bus 0 (ECAM)
            0xFEB0_0000 .. 0xFEB0_7FFF      virtio-mmio: 8 pages; with firmware, PCI: BARs
            0xFEC0_0000, 0xFEE0_0000        IOAPIC, LAPIC: in the engine
            0xFED0_0000 .. 0xFED0_03FF      HPET, if there is one
            .. 0xFFFF_FFFF                  firmware: flash with its variables, and its image
            4 GiB .. end                    the rest of the RAM
            the next multiple of 64 GiB ..  PCI: large BARs, 64 GiB
ports       0x0600 .. 0x060F                ACPI: fixed hardware, general-purpose events
            0x0610                          pvpanic
            0x0620 .. 0x062B                PCI: hot-plug
            0x0700 .. 0x07FF                CPUs: hot-plug, where there can be more
            0x0CF8 .. 0x0CFF                PCI: configuration
            0xB000 .. 0xB00F                with firmware, ACPI's block once more
            0xC000 .. 0xFFFF                PCI: BARs
            0x01F0, 0x03F6, 0x0170, 0x0376  IDE: its two channels, where there are drives
            0x03F2, 0x03F7, DMA's           floppy disks, where there are drives
            others                          the table of machine/pc.py
lines       0 .. 15                         ISA devices, at the PICs and the IOAPIC
            16 .. 19                        PCI: INTA# to INTD#, by slot
            20 .. 23                        virtio-mmio: two pages a line; HPET, as it chooses
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = [
    "CPU_HOTPLUG",
    "ECAM",
    "IDE_CHANNELS",
    "IDE_TASK_PORTS",
    "PCI_BEHIND_ECAM",
    "PCI_HOTPLUG",
    "PCI_IO",
    "PCI_LOW",
    "PIIX4_PM",
    "VIRTIO_MMIO_SLOTS",
    "high_window",
    "pci_gsi",
    "virtio_mmio_slot",
]

# Ranges are (first address, address behind the last).
PCI_LOW: Final = (0xC000_0000, 0xE000_0000)
PCI_IO: Final = (0xC000, 0x1_0000)
ECAM: Final = (0xE000_0000, 0xE010_0000)
#: Where firmware places BARs, too.
PCI_BEHIND_ECAM: Final = (0xE010_0000, 0xFEC0_0000)

#: Of each channel: the task file, the control port, and the line.
IDE_CHANNELS: Final = ((0x1F0, 0x3F6, 14), (0x170, 0x376, 15))
IDE_TASK_PORTS: Final = 8

#: Registers of pci/hotplug.py.
PCI_HOTPLUG: Final = 0x620
#: Of devices/cpu_hotplug.py.
CPU_HOTPLUG: Final = 0x700

#: Where a PIIX4 has its power management on QEMU's machine "pc".
PIIX4_PM: Final = 0xB000

VIRTIO_MMIO_SLOTS: Final = 8

_HIGH_BYTES: Final = 64 << 30
_PCI_LINES: Final = 16
_VIRTIO_MMIO_BASE: Final = 0xFEB0_0000
_VIRTIO_MMIO_LINES: Final = 20


def high_window(ram: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """For BARs above 4 GiB, beyond all RAM."""
    end = max([1 << 32, *(base + length for base, length in ram)])
    start = -(-end // _HIGH_BYTES) * _HIGH_BYTES
    return start, start + _HIGH_BYTES


def pci_gsi(slot: int, pin: int) -> int:
    """The line of a slot's pin, 0 for INTA#: neighbours have different ones."""
    return _PCI_LINES + (slot + pin) % 4


def virtio_mmio_slot(index: int) -> tuple[int, int]:
    """Address and line of a page of virtio-mmio."""
    return _VIRTIO_MMIO_BASE + 0x1000 * index, _VIRTIO_MMIO_LINES + index // 2
