"""The ACPI tables of a small PC (ACPI 6.5): what the machine has, said once more for its kernel."""

import struct
from collections.abc import Collection, Container, Sequence
from typing import Final

from tetrarch.boot import aml
from tetrarch.boot.generation import generation_device, generation_event
from tetrarch.boot.layout import ACPI_BASE, ACPI_END, align_up
from tetrarch.devices import (
    acpi_pm,
    cpu_hotplug,
    hpet,
    i8042,
    pvpanic,
    reset_cf9,
    rtc_cmos,
    uart16550,
)
from tetrarch.errors import ConfigError
from tetrarch.machine import map as machine_map
from tetrarch.pci import bus as pci_bus
from tetrarch.pci import hotplug

__all__ = [
    "build_acpi",
    "floppy_device",
    "hpet_device",
    "mouse_device",
    "virtio_mmio_device",
]

IOAPIC_BASE: Final = 0xFEC0_0000
LAPIC_BASE: Final = 0xFEE0_0000

OEM_ID: Final = b"TETRA "
OEM_TABLE_ID: Final = b"TETRARCH"
CREATOR_ID: Final = b"TTRA"
HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")

#: APIC IDs from here on are told as x2APIC entries: 255 is the xAPIC's broadcast (5.2.12.12).
FIRST_X2APIC_ID: Final = 255

# FADT fixed feature flags, table 5.10.
WBINVD: Final = 1 << 0
PROC_C1: Final = 1 << 2
SLP_BUTTON: Final = 1 << 5  # set: not in the fixed registers. PWR_BUTTON is 0: it is there.
FIX_RTC: Final = 1 << 6
TMR_VAL_EXT: Final = 1 << 8
RESET_REG_SUP: Final = 1 << 10

# IA-PC boot architecture flags, table 5.11.
LEGACY_DEVICES: Final = 1 << 0
HAS_8042: Final = 1 << 1
NO_VGA: Final = 1 << 2

#: Larger than ACPI lets a usable C2 and C3 state have.
NO_C2: Final = 101
NO_C3: Final = 1001

# MADT local APIC flags, table 5.22.
ENABLED: Final = 1 << 0
#: It is not there, and can be plugged in.
ONLINE_CAPABLE: Final = 1 << 1

# MADT interrupt flags, table 5.26.
ACTIVE_HIGH: Final = 1
LEVEL: Final = 3 << 2


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = HEADER.size + len(body)
    header = HEADER.pack(signature, length, revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1)
    table = bytearray(header + body)
    table[9] = _checksum(table)
    return bytes(table)


def _io_register(port: int, bits: int, access_bits: int) -> bytes:
    """A generic address (5.2.3.2) in I/O space."""
    access = {8: 1, 16: 2, 32: 3}[access_bits]
    return struct.pack("<BBBBQ", 1, bits, 0, access, port)


def _fadt(facs: int, dsdt: int, vga: bool) -> bytes:
    event = acpi_pm.PORT_BASE + acpi_pm.PM1_EVENT
    control = acpi_pm.PORT_BASE + acpi_pm.PM1_CONTROL
    timer = acpi_pm.PORT_BASE + acpi_pm.PM_TIMER
    events = acpi_pm.PORT_BASE + acpi_pm.GPE0
    table = bytearray(276)

    def put(form: str, offset: int, *values: int) -> None:
        struct.pack_into("<" + form, table, offset, *values)

    put("II", 36, facs, dsdt)
    put("B", 45, 0)  # preferred profile: unspecified
    put("H", 46, acpi_pm.GSI)
    # SMI_CMD at 48 stays 0: always in ACPI mode.
    put("I", 56, event)
    put("I", 64, control)
    put("I", 76, timer)
    put("I", 80, events)
    put("BB", 88, 4, 2)
    put("BB", 91, 4, acpi_pm.GPE0_BYTES)
    put("HH", 96, NO_C2, NO_C3)
    put("B", 108, rtc_cmos.CENTURY)
    put("H", 109, LEGACY_DEVICES | HAS_8042 | (0 if vga else NO_VGA))
    flags = WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP
    put("I", 112, flags)
    table[116:128] = _io_register(reset_cf9.PORT_BASE, 8, 8)
    put("B", 128, reset_cf9.RESET_VALUE)
    put("B", 131, 0)  # minor revision
    # X_FIRMWARE_CTRL stays 0: FIRMWARE_CTRL is used then, never both (5.2.9).
    put("Q", 140, dsdt)
    table[148:160] = _io_register(event, 32, 16)
    table[172:184] = _io_register(control, 16, 16)
    table[208:220] = _io_register(timer, 32, 32)
    table[220:232] = _io_register(events, 8 * acpi_pm.GPE0_BYTES, 8)
    return _table(b"FACP", 6, bytes(table[HEADER.size :]))


def _facs() -> bytes:
    return struct.pack("<4sIIIIIQB", b"FACS", 64, 0, 0, 0, 0, 0, 2).ljust(64, b"\0")


def _processor(uid: int, apic_id: int, there: bool) -> bytes:
    flags = ENABLED if there else ONLINE_CAPABLE
    if apic_id < FIRST_X2APIC_ID:
        return struct.pack("<BBBBI", 0, 8, uid, apic_id, flags)
    return struct.pack("<BBHIII", 9, 16, 0, apic_id, flags, uid)


def _madt(apic_ids: Sequence[int], there: Container[int]) -> bytes:
    entries = bytearray()
    for uid, apic_id in enumerate(apic_ids):
        entries += _processor(uid, apic_id, uid in there)
    entries += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0)
    # The PIT is on pin 2 of the IOAPIC, where the cascade of the PICs would be.
    entries += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    sci = acpi_pm.GSI
    entries += struct.pack("<BBBBIH", 2, 10, 0, sci, sci, ACTIVE_HIGH | LEVEL)
    # LINT1 of every processor is NMI.
    entries += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    if max(apic_ids) >= FIRST_X2APIC_ID:
        entries += struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFF_FFFF, 1)
    pcat_compat = 1
    return _table(b"APIC", 5, struct.pack("<II", LAPIC_BASE, pcat_compat) + entries)


def _pnp(path: str, hid: str, *descriptors: bytes, uid: int = 0) -> bytes:
    return aml.device(
        path,
        aml.name("_HID", aml.string(hid) if len(hid) > 7 else aml.eisa_id(hid)),
        aml.name("_UID", aml.integer(uid)),
        aml.name("_STA", aml.integer(0x0F)),
        aml.name("_CRS", aml.resources(*descriptors)),
    )


def _pci_root(ram: Sequence[tuple[int, int]], firmware: bool) -> bytes:
    """The PCI bus: its windows, and the line of each pin (6.2.13)."""
    (io, io_end), (low, low_end) = machine_map.PCI_IO, machine_map.PCI_LOW
    high, high_end = machine_map.high_window(ram)
    # SeaBIOS takes the end of its window first.
    more = [machine_map.PCI_BEHIND_ECAM] if firmware else []
    windows = aml.resources(
        aml.bus_numbers(0, 0),
        # A driver of IDE claims the ports of old as the bus's. The control port is one of a
        # block of four; Linux ignores a window of one.
        *(
            window
            for task, control, _ in machine_map.IDE_CHANNELS
            for window in (
                aml.io_window(task, task + machine_map.IDE_TASK_PORTS - 1),
                aml.io_window(control & ~3, control | 3),
            )
        ),
        aml.io_window(io, io_end - 1),
        aml.memory_window(low, low_end - 1),
        *(aml.memory_window(start, end - 1) for start, end in more),
        aml.memory_window(high, high_end - 1),
    )
    any_function, no_link = 0xFFFF, aml.integer(0)
    routes = [
        aml.package(
            aml.integer(slot << 16 | any_function),
            aml.integer(pin),
            no_link,
            aml.integer(machine_map.pci_gsi(slot, pin)),
        )
        for slot in range(pci_bus.SLOTS)
        for pin in range(4)
    ]
    # As a conventional bus: nothing of PCI Express is there to be negotiated by _OSC.
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_CRS", windows),
        aml.name("_PRT", aml.package(*routes)),
        *_hotplug_slots(),
    )


def _hotplug_slots() -> list[bytes]:
    """Each slot as a device that can be ejected, and what tells of changes (docs/pci.md)."""
    device_check, eject_request = aml.integer(1), aml.integer(3)
    slots = range(1, pci_bus.SLOTS)
    return [
        aml.port_registers("HREG", machine_map.PCI_HOTPLUG, "HNEW", "HGON", "HEJT"),
        *(
            aml.device(
                _slot(slot),
                aml.name("_ADR", aml.integer(slot << 16)),
                aml.name("_SUN", aml.integer(slot)),
                # Only the first function of a slot is there: a bit stands for the slot.
                aml.method("_EJ0", 1, aml.store(aml.integer(1 << slot), aml.name_string("HEJT"))),
            )
            for slot in slots
        ),
        aml.method(
            "HTEL",
            2,
            *(
                aml.when(
                    aml.bit_and(aml.ARG_0, aml.integer(1 << slot)),
                    aml.notify(_slot(slot), aml.ARG_1),
                )
                for slot in slots
            ),
        ),
        # What has been told is cleared first: what comes meanwhile is another event.
        aml.method(
            "HCHK",
            0,
            *(
                term
                for register, value in (("HNEW", device_check), ("HGON", eject_request))
                for term in (
                    aml.store(aml.name_string(register), aml.LOCAL_0),
                    aml.store(aml.LOCAL_0, aml.name_string(register)),
                    aml.call("HTEL", aml.LOCAL_0, value),
                )
            ),
        ),
    ]


def _slot(number: int) -> str:
    return f"S{number:02X}"


def _hotplug_cpus(apic_ids: Sequence[int]) -> list[bytes]:
    """Each vCPU as a processor device (8.4), and what tells of those that come and go."""
    numbers = range(len(apic_ids))
    there, new, gone, eject = map(
        aml.integer,
        (cpu_hotplug.THERE, cpu_hotplug.NEW, cpu_hotplug.GONE, cpu_hotplug.EJECT),
    )
    device_check, eject_request, ready = aml.integer(1), aml.integer(3), aml.integer(0x0F)
    tell = [
        term
        for number in numbers
        for term in (
            aml.store(_register(number), aml.LOCAL_0),
            *(
                aml.when(
                    aml.bit_and(aml.LOCAL_0, bit),
                    # What has been told is cleared first: what comes meanwhile is another event.
                    aml.store(bit, _register(number)),
                    aml.notify(_cpu(number), value),
                )
                for bit, value in ((new, device_check), (gone, eject_request))
            ),
        )
    ]
    return [
        aml.port_registers("CREG", machine_map.CPU_HOTPLUG, *map(_register_name, numbers), bits=8),
        *(
            aml.device(
                _cpu(number),
                aml.name("_HID", aml.string("ACPI0007")),
                aml.name("_UID", aml.integer(number)),
                aml.name("_MAT", aml.buffer(_processor(number, apic_id, True))),
                aml.method(
                    "_STA",
                    0,
                    aml.when(aml.bit_and(_register(number), there), aml.give(ready)),
                    aml.give(aml.integer(0)),
                ),
                # The first stays.
                *([aml.method("_EJ0", 1, aml.store(eject, _register(number)))] if number else []),
            )
            for number, apic_id in enumerate(apic_ids)
        ),
        aml.method("CCHK", 0, *tell),
    ]


def _cpu(number: int) -> str:
    return f"C{number:03X}"


def _register_name(number: int) -> str:
    return f"R{number:03X}"


def _register(number: int) -> bytes:
    return aml.name_string(_register_name(number))


def virtio_mmio_device(index: int) -> bytes:
    """What Linux knows a page of virtio-mmio by (drivers/virtio/virtio_mmio.c)."""
    base, gsi = machine_map.virtio_mmio_slot(index)
    return aml.device(
        f"VR{index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        aml.name(
            "_CRS",
            aml.resources(aml.memory32(base, 0x1000), aml.interrupt(gsi, level=True)),
        ),
    )


def hpet_device() -> bytes:
    return aml.device(
        "HPET",
        aml.name("_HID", aml.eisa_id("PNP0103")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.memory32(hpet.BASE, hpet.BYTES))),
    )


def mouse_device() -> bytes:
    """Without ports, which are the keyboard's."""
    return _pnp("MOU", "PNP0F13", aml.irq(i8042.AUX_GSI))


def floppy_device() -> bytes:
    from tetrarch.devices import fdc82077

    ports = aml.io_port(fdc82077.PORT_BASE, fdc82077.PORTS), aml.io_port(fdc82077.DIR_PORT, 1)
    return _pnp("FDC0", "PNP0700", *ports, aml.irq(fdc82077.GSI), aml.dma(fdc82077.DMA_CHANNEL))


def _hpet() -> bytes:
    """Where the timers are (IA-PC HPET 1.0a, 3.2.4)."""
    address = struct.pack("<BBBBQ", 0, 64, 0, 0, hpet.BASE)
    tail = struct.pack("<BHB", 0, hpet.MIN_TICK, 0)
    return _table(b"HPET", 1, struct.pack("<I", hpet.BLOCK_ID) + address + tail)


def _mcfg() -> bytes:
    """Where configuration space lies in memory (PCI Firmware 3.0, 4.1.2)."""
    base, end = machine_map.ECAM
    return _table(b"MCFG", 1, bytes(8) + struct.pack("<QHBB4x", base, 0, 0, (end - base >> 20) - 1))


def _dsdt(
    apic_ids: Sequence[int],
    ram: Sequence[tuple[int, int]],
    more: Sequence[bytes],
    firmware: bool,
    cpus_come: bool,
) -> bytes:
    port, line = aml.io_port, aml.irq
    devices = (
        _pnp("PIC", "PNP0000", port(0x20, 2), port(0xA0, 2), port(0x4D0, 2), line(2)),
        _pnp("TMR", "PNP0100", port(0x40, 4), line(0)),
        _pnp("SPKR", "PNP0800", port(0x61, 1)),
        _pnp(
            "RTC",
            "PNP0B00",
            port(rtc_cmos.PORT_BASE, rtc_cmos.PORTS),
            line(rtc_cmos.GSI),
        ),
        _pnp(
            "KBD",
            "PNP0303",
            port(i8042.DATA_PORT, 1),
            port(i8042.STATUS_PORT, 1),
            line(i8042.GSI),
        ),
        _pnp(
            "COM1",
            "PNP0501",
            port(uart16550.PORT_BASE, uart16550.PORTS),
            line(uart16550.GSI),
            uid=1,
        ),
        _pnp("PVP", pvpanic.ACPI_ID, port(pvpanic.PORT_BASE, pvpanic.PORTS)),
        # Motherboard resources: what is taken and has no driver of its own.
        _pnp(
            "MBRD",
            "PNP0C02",
            port(acpi_pm.PORT_BASE, acpi_pm.PORTS),
            port(machine_map.PCI_HOTPLUG, hotplug.PORTS),
            *([port(machine_map.CPU_HOTPLUG, len(apic_ids))] if cpus_come else []),
            # PCI configuration, with the reset register at 0xCF9 in it.
            port(pci_bus.ADDRESS_PORT, 4 + pci_bus.DATA_PORTS),
            aml.memory32(machine_map.ECAM[0], machine_map.ECAM[1] - machine_map.ECAM[0]),
            aml.memory32(IOAPIC_BASE, 0x1000),
            aml.memory32(LAPIC_BASE, 0x1000),
        ),
        _pci_root(ram, firmware),
        # Firmware has its own memory map, and no page for it.
        *([] if firmware else [generation_device()]),
        *(_hotplug_cpus(apic_ids) if cpus_come else []),
        *more,
    )
    s5 = aml.integer(acpi_pm.S5_TYPE)
    zero = aml.integer(0)
    events = aml.method(f"_L{acpi_pm.PCI_HOTPLUG_EVENT:02X}", 0, aml.call("\\_SB.PCI0.HCHK"))
    if cpus_come:
        events += aml.method(f"_L{acpi_pm.CPU_HOTPLUG_EVENT:02X}", 0, aml.call("\\_SB.CCHK"))
    body = (
        aml.scope("\\_SB", *devices)
        + aml.scope("\\_GPE", events, *([] if firmware else [generation_event()]))
        + aml.name("\\_S5", aml.package(s5, s5, zero, zero))
    )
    return _table(b"DSDT", 2, body)


def _xsdt(tables: list[int]) -> bytes:
    return _table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables))


def _rsdp(xsdt: int) -> bytes:
    # No RSDT: every kernel that knows revision 2 takes the XSDT.
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def build_acpi(
    apic_ids: Sequence[int],
    ram: Sequence[tuple[int, int]],
    devices: Sequence[bytes] = (),
    *,
    there: Collection[int] | None = None,
    firmware: bool = False,
    vga: bool = False,
    timers: bool = False,
) -> tuple[int, list[tuple[int, bytes]]]:
    """The address of the RSDP, and (address, table) of all tables, the RSDP among them.

    ``apic_ids`` are those of the CPUs by their numbers. With ``there``, the numbers of those that
    are in the machine, the others can be plugged in, and CPUs be taken out; ``devices`` are more
    devices of the DSDT's ``\\_SB``; ``firmware`` places the BARs; ``timers`` says that there is an
    HPET.
    """
    if not apic_ids:
        raise ConfigError("a machine with 0 CPUs cannot be", mend="give at least 1")
    tables: list[tuple[int, bytes]] = []
    at = ACPI_BASE + 64  # the RSDP comes first, on a 16-byte boundary

    def place(data: bytes) -> int:
        nonlocal at
        address = at
        # 64: what the FACS asks for (5.2.10).
        at = align_up(at + len(data), 64)
        if at > ACPI_END:
            raise ConfigError(
                f"the ACPI tables for {len(apic_ids)} CPUs exceed their "
                f"{ACPI_END - ACPI_BASE >> 10} KiB",
                mend="give the machine fewer CPUs",
            )
        tables.append((address, data))
        return address

    facs = place(_facs())
    dsdt = place(_dsdt(apic_ids, ram, devices, firmware, there is not None))
    fadt = place(_fadt(facs, dsdt, vga))
    madt = place(_madt(apic_ids, range(len(apic_ids)) if there is None else there))
    listed = [fadt, madt, place(_mcfg())]
    if timers:
        listed.append(place(_hpet()))
    xsdt = place(_xsdt(listed))
    return ACPI_BASE, [(ACPI_BASE, _rsdp(xsdt)), *tables]
