"""The bus as a driver sees it: configuration space, BARs, interrupts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.pci.device import DEVICE, VECTORS, VENDOR, Device, Registers
from tests.pci.guest import Guest

from tetrarch.errors import ConfigError, StateError
from tetrarch.machine import map as machine_map
from tetrarch.machine.config import EngineName
from tetrarch.pci import Bar, BarPart, Identity, PciBus, PciFunction
from tetrarch.testing import ScriptedVm

SLOT = 3
CONFIG = machine_map.ECAM[0] + (SLOT << 15)
COMMAND, STATUS, BARS, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
IO, MEMORY, MASTER, INTX_OFF = 1, 2, 4, 1 << 10
INTX_PENDING = 1 << 3
MSI, MSIX = 0x05, 0x11

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
RAM = 0x30_0000


class Driver:
    """What a driver does with the device in its slot."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.read, self.write = guest.read, guest.write

    def config(self, offset: int, size: int = 4) -> int:
        return self.guest.read(CONFIG + offset, size)

    def set_config(self, offset: int, value: int, size: int = 4) -> None:
        self.guest.write(CONFIG + offset, value, size)

    def bar(self, index: int) -> int:
        return self.config(BARS + 4 * index) & ~0xF

    def capability(self, identifier: int) -> int:
        at = self.config(CAPABILITIES, 1)
        while at:
            if self.config(at, 1) == identifier:
                return at
            at = self.config(at + 1, 1)
        raise AssertionError(f"no capability {identifier:#x}")

    def arrived(self, vector: int) -> bool:
        """Whether the local APIC has a request for the vector: interrupts are off."""
        word = self.guest.read(LAPIC + 0x200 + vector // 32 * 0x10)
        return bool(word >> vector % 32 & 1)

    def enable_lapic(self) -> None:
        self.guest.write(LAPIC + 0xF0, 0x1FF)


@pytest.fixture
def device(guest: Guest) -> Device:
    device = Device(guest.machine.engine_vm)
    assert guest.machine.attach_pci(device, slot=SLOT) == SLOT
    guest.machine.start()
    return device


@pytest.fixture
def driver(guest: Guest, device: Device) -> Driver:
    return Driver(guest)


def test_configuration_space_is_the_same_by_ports_and_in_memory(driver: Driver) -> None:
    guest = driver.guest
    for offset, size in [(0, 4), (2, 2), (0x0B, 1), (COMMAND, 4), (CAPABILITIES, 4)]:
        guest.port_out(0xCF8, 1 << 31 | SLOT << 11 | offset & 0xFC)
        by_ports = guest.port_in(0xCFC + (offset & 3), size)
        assert by_ports == driver.config(offset, size), hex(offset)
    assert driver.config(0) == DEVICE << 16 | VENDOR
    # Nobody in the slot, another function, another bus, behind the 256 bytes.
    assert guest.read(CONFIG + (1 << 15)) == 0xFFFF_FFFF
    assert guest.read(CONFIG + (1 << 12)) == 0xFFFF_FFFF
    assert guest.read(CONFIG + 0x100) == 0xFFFF_FFFF
    guest.port_out(0xCF8, 1 << 31 | 1 << 16 | SLOT << 11)
    assert guest.port_in(0xCFC) == 0xFFFF_FFFF


def test_what_says_who_it_is_cannot_be_written(driver: Driver) -> None:
    before = [driver.config(offset) for offset in range(0, 0x100, 4)]
    for offset in (0x00, 0x08, 0x2C, CAPABILITIES, 0x3C):
        driver.set_config(offset, 0x5A5A_5A5A)
    after = [driver.config(offset) for offset in range(0, 0x100, 4)]
    assert after[0x3C // 4] & 0xFF == 0x5A, "the interrupt line is a scratch register"
    after[0x3C // 4] = before[0x3C // 4]
    assert after == before


def test_bars_tell_their_sizes(driver: Driver) -> None:
    for index in range(6):
        driver.set_config(BARS + 4 * index, 0xFFFF_FFFF)
    sizes = [driver.config(BARS + 4 * index) for index in range(6)]
    assert sizes == [0xFFFF_F000, 0, 0xFFFF_FFE1, 0, 0xFFFF_F00C, 0xFFFF_FFFF]


def test_bars_answer_where_they_are_if_the_command_register_lets_them(
    driver: Driver, device: Device
) -> None:
    where = driver.bar(0)
    assert driver.read(where) == 0xFFFF_FFFF
    driver.set_config(COMMAND, MEMORY, 2)
    assert driver.read(where) == 0xABAB_ABAB
    driver.write(where + 8, 0x0123_4567_89AB_CDEF, 8)
    assert device.registers.data[8:16].hex() == "efcdab8967452301"
    driver.set_config(BARS, 0xD000_0000)
    assert driver.read(where) == 0xFFFF_FFFF
    assert driver.read(0xD000_0008, 8) == 0x0123_4567_89AB_CDEF

    ports = driver.config(BARS + 8) & ~3
    assert driver.guest.port_in(ports, 1) == 0xFF
    driver.set_config(COMMAND, IO, 2)
    driver.guest.port_out(ports + 4, 0xCAFE, 2)
    assert driver.guest.port_in(ports + 4, 2) == 0xCAFE
    assert driver.read(0xD000_0000) == 0xFFFF_FFFF, "memory is off again"


def test_bar_over_ram_leaves_the_ram(driver: Driver, device: Device) -> None:
    driver.write(RAM, 0x600D_600D)
    driver.set_config(BARS, RAM)
    driver.set_config(COMMAND, MEMORY, 2)
    assert driver.read(RAM) == 0x600D_600D
    driver.write(RAM, 7)
    assert driver.read(RAM) == 7
    assert device.registers.accesses == 0


def test_bar_over_what_was_there_before_leaves_it(driver: Driver) -> None:
    driver.set_config(COMMAND, MEMORY, 2)
    for where in (CONFIG, IOAPIC, LAPIC):
        driver.set_config(BARS, where)
        assert driver.config(0) == DEVICE << 16 | VENDOR
        assert driver.read(LAPIC + 0x30) != 0xABAB_ABAB
        assert driver.read(IOAPIC) != 0xABAB_ABAB
    # Past the last address: nothing answers, and nothing else is lost.
    driver.set_config(BARS + 16, 0xFFFF_F000)
    driver.set_config(BARS + 20, 0xFFFF_FFFF)
    driver.set_config(BARS, 0xC000_0000)
    assert driver.read(0xC000_0000) == 0xABAB_ABAB


def test_bars_over_each_other_leave_who_came_first(driver: Driver, device: Device) -> None:
    machine = driver.guest.machine
    other = Device(machine.engine_vm)
    other.registers.data[:] = b"\xcd" * 0x1000
    machine.attach_pci(other, slot=SLOT + 1, name="other")
    beside = 1 << 15
    driver.set_config(COMMAND, MEMORY, 2)
    driver.set_config(beside + COMMAND, MEMORY, 2)
    own, place = driver.bar(0), 0xD000_0000
    for bar in (BARS, beside + BARS):
        driver.set_config(bar, place)
    assert driver.read(place) == 0xABAB_ABAB
    # A part of the one below the other, and its own BARs over each other.
    driver.set_config(beside + BARS + 16, place)
    driver.set_config(beside + BARS + 20, 0)
    driver.write(place, 0x600D_600D)
    assert driver.read(place) == 0x600D_600D
    assert driver.config(beside) == DEVICE << 16 | VENDOR
    driver.set_config(BARS, own)
    assert driver.read(own) == 0x600D_600D
    assert driver.read(place) == 0xCDCD_CDCD
    machine.attach_pci(Device(machine.engine_vm), slot=SLOT + 2, name="third")
    driver.set_config(beside + BARS, 0xFFFF_F000)
    driver.set_config(beside + COMMAND, 0, 2)
    assert driver.read(place) == 0xFFFF_FFFF
    assert driver.read(own) == 0x600D_600D


def enable_msix(driver: Driver, control: int) -> int:
    """The table's address."""
    driver.set_config(COMMAND, MEMORY | MASTER, 2)
    driver.set_config(driver.capability(MSIX) + 2, control, 2)
    return driver.bar(4)


def test_msix_message_arrives_and_a_mask_keeps_it_back(driver: Driver, device: Device) -> None:
    driver.enable_lapic()
    at = driver.capability(MSIX)
    assert driver.config(at + 2, 2) == VECTORS - 1
    assert driver.config(at + 4) == 4, "the table is at the start of BAR 4"
    pending = driver.config(at + 8) & ~7
    table = enable_msix(driver, 0x8000)
    for vector, number in ((0x51, 0), (0x52, 3)):
        driver.write(table + 16 * number, LAPIC, 8)
        driver.write(table + 16 * number + 8, vector, 8)
    first, last = device.msix.vector(0), device.msix.vector(3)
    first.trigger()
    assert driver.arrived(0x51)
    assert not driver.arrived(0x52)
    driver.write(table + 16 * 3 + 12, 1)
    last.trigger()
    assert not driver.arrived(0x52)
    assert driver.read(table + pending, 8) == 1 << 3
    driver.write(table + 16 * 3 + 12, 0)
    assert driver.arrived(0x52)
    assert driver.read(table + pending, 8) == 0


def test_msi_message_arrives_by_configuration_space(driver: Driver, device: Device) -> None:
    driver.enable_lapic()
    at = driver.capability(MSI)
    assert driver.config(at + 2, 2) == 0x0184, "64 bits, masks, 4 vectors"
    driver.set_config(at + 4, LAPIC)
    driver.set_config(at + 12, 0x60, 2)
    driver.set_config(at + 16, 1 << 1)
    driver.set_config(COMMAND, MASTER, 2)
    device.msi.vector(0).trigger()
    driver.set_config(at + 2, 1 | 2 << 4, 2)
    assert not driver.arrived(0x60), "off when it was raised"
    for number in range(VECTORS):
        device.msi.vector(number).trigger()
    assert [driver.arrived(0x60 + number) for number in range(4)] == [True, False, True, True]
    assert driver.config(at + 20) == 1 << 1
    driver.set_config(at + 16, 0)
    assert driver.arrived(0x61)
    assert driver.config(at + 20) == 0


def test_msi_vectors_share_the_messages_that_the_driver_gives(
    driver: Driver, device: Device
) -> None:
    driver.enable_lapic()
    at = driver.capability(MSI)
    driver.set_config(at + 4, LAPIC)
    driver.set_config(at + 12, 0x71, 2)
    driver.set_config(COMMAND, MASTER, 2)
    driver.set_config(at + 2, 1, 2)
    device.msi.vector(3).trigger()
    assert driver.arrived(0x71)
    assert not driver.arrived(0x74)


def test_message_waits_for_a_device_that_has_no_bus(driver: Driver, device: Device) -> None:
    driver.enable_lapic()
    table = enable_msix(driver, 0x8000)
    driver.write(table, LAPIC, 8)
    driver.write(table + 8, 0x51, 8)
    driver.set_config(COMMAND, MEMORY, 2)
    device.msix.vector(0).trigger()
    assert not driver.arrived(0x51)
    driver.set_config(COMMAND, MEMORY | MASTER, 2)
    assert driver.arrived(0x51)
    enable_msix(driver, 0)
    at = driver.capability(MSI)
    driver.set_config(at + 4, LAPIC)
    driver.set_config(at + 12, 0x61, 2)
    driver.set_config(at + 2, 1, 2)
    driver.set_config(COMMAND, 0, 2)
    device.msi.vector(0).trigger()
    assert not driver.arrived(0x61)
    driver.set_config(COMMAND, MASTER, 2)
    assert driver.arrived(0x61)
    # A line is no access to memory.
    driver.set_config(at + 2, 0, 2)
    driver.set_config(COMMAND, 0, 2)
    device.function.intx.set(True)
    unmask_line(driver, 0x80)
    assert driver.arrived(0x80)


def unmask_line(driver: Driver, vector: int) -> None:
    """In the I/O APIC: level, active low. With a request that is never served it gives one."""
    driver.enable_lapic()
    for index, word in enumerate((0xA000 | vector, 0)):
        driver.write(IOAPIC, 0x10 + 2 * machine_map.pci_gsi(SLOT, pin=0) + index)
        driver.write(IOAPIC + 0x10, word)


def test_line_is_level_and_shows_in_the_status(driver: Driver, device: Device) -> None:
    device.function.intx.set(True)
    assert driver.config(STATUS, 2) & INTX_PENDING
    unmask_line(driver, 0x80)
    assert driver.arrived(0x80)
    device.function.intx.set(False)
    assert not driver.config(STATUS, 2) & INTX_PENDING


def test_line_can_be_disabled(driver: Driver, device: Device) -> None:
    driver.set_config(COMMAND, INTX_OFF, 2)
    device.function.intx.set(True)
    unmask_line(driver, 0x80)
    assert not driver.arrived(0x80)
    assert driver.config(STATUS, 2) & INTX_PENDING, "whether or not it is disabled"
    driver.set_config(COMMAND, 0, 2)
    assert driver.arrived(0x80)


def test_driver_with_messages_does_not_get_the_line_too(driver: Driver, device: Device) -> None:
    enable_msix(driver, 0x8000)
    device.function.intx.set(True)
    unmask_line(driver, 0x80)
    assert not driver.arrived(0x80)
    enable_msix(driver, 0)
    assert driver.arrived(0x80)


def test_functions_on_one_line_hold_it_together(driver: Driver, device: Device) -> None:
    other = Device(driver.guest.machine.engine_vm)
    slot = driver.guest.machine.attach_pci(other, slot=SLOT + 4, name="other")
    assert machine_map.pci_gsi(slot, 0) == machine_map.pci_gsi(SLOT, 0)
    device.function.intx.set(True)
    other.function.intx.set(True)
    device.function.intx.set(False)
    unmask_line(driver, 0x80)
    assert driver.arrived(0x80)


def test_reset_takes_back_all_that_the_driver_did(driver: Driver, device: Device) -> None:
    placed = [driver.config(offset) for offset in range(0, 0x100, 4)]
    enable_msix(driver, 0xC000)
    driver.set_config(BARS, 0xD000_0000)
    driver.set_config(0x3C, 11, 1)
    device.msix.vector(1).trigger()
    device.function.intx.set(True)
    resets = driver.guest.machine.resets
    driver.guest.reset()
    assert driver.guest.machine.resets == resets + 1
    assert [driver.config(offset) for offset in range(0, 0x100, 4)] == placed
    assert driver.read(0xD000_0000) == 0xFFFF_FFFF
    driver.set_config(COMMAND, MEMORY, 2)
    assert driver.read(driver.bar(4) + 12) == 1, "masked"
    assert driver.read(driver.bar(4) + 0x800) == 0


def test_saved_function_goes_on_in_another_machine(
    engine: EngineName, driver: Driver, device: Device, tmp_path: Path
) -> None:
    driver.enable_lapic()
    enable_msix(driver, 0x8000)
    driver.set_config(BARS + 16, 0xD000_0004)
    driver.write(0xD000_0000, LAPIC, 8)
    driver.write(0xD000_0008, 1 << 32 | 0x51, 8)
    device.msix.vector(0).trigger()
    before = [driver.config(offset) for offset in range(0, 0x100, 4)]
    driver.guest.machine.save(tmp_path / "saved")
    with Guest(engine, tmp_path / "saved") as restored:
        twin = Device(restored.machine.engine_vm)
        # Where it was, not in the first free slot.
        assert restored.machine.attach_pci(twin) == SLOT
        restored.machine.start()
        later = Driver(restored)
        assert [later.config(offset) for offset in range(0, 0x100, 4)] == before
        assert not later.arrived(0x51)
        later.write(0xD000_000C, 0)
        assert later.arrived(0x51), "it was pending"


def test_saved_machine_wants_its_devices_back(
    engine: EngineName, driver: Driver, tmp_path: Path
) -> None:
    driver.guest.machine.save(tmp_path / "saved")
    with (
        Guest(engine, tmp_path / "saved") as restored,
        pytest.raises(StateError, match="had a PCI device 'Device'"),
    ):
        restored.machine.start()


def plain(size: int, **more: Any) -> PciFunction:
    vm = ScriptedVm(lambda vm: "stopped")
    bar = Bar(0, size, [BarPart(0, size, Registers(16))], **more)
    return PciFunction(vm, Identity(VENDOR, DEVICE, 0xFF0000), [bar])


def test_bars_are_placed_apart_and_aligned_and_large_ones_high() -> None:
    bus = PciBus(ScriptedVm(lambda vm: "stopped"))
    functions = [
        plain(size, wide=wide)
        for size, wide in [(1 << 12, False), (1 << 24, False), (1 << 16, True), (1 << 30, True)]
    ] + [plain(size, io=True) for size in (64, 256)]
    spans = []
    for function in functions:
        bus.plug(function)
        (bar,) = function.bars
        address = function.address(bar)
        assert address % bar.size == 0
        spans.append((bar.io, address, address + bar.size))
    ordered = sorted(spans)
    for (io, _, end), (next_io, start, _) in pairwise(ordered):
        assert io != next_io or end <= start
    high = functions[3].address(functions[3].bars[0])
    assert high >= machine_map.high_window([])[0]
    for function in functions[:3]:
        address = function.address(function.bars[0])
        assert machine_map.PCI_LOW[0] <= address < machine_map.PCI_LOW[1]


def test_what_has_no_room_is_refused_and_leaves_its_slot_free() -> None:
    bus = PciBus(ScriptedVm(lambda vm: "stopped"))
    with pytest.raises(ConfigError, match="no room"):
        bus.plug(plain(1 << 30), slot=4)
    assert bus.function(4) is None
    with pytest.raises(ConfigError, match="slot 0 is taken"):
        bus.plug(plain(1 << 12), slot=0)
    for _ in range(31):
        bus.plug(plain(1 << 12))
    with pytest.raises(ConfigError, match="all slots of the PCI bus are taken"):
        bus.plug(plain(1 << 12))


@pytest.mark.parametrize(
    ("index", "size", "io", "wide"),
    [
        (0, 0, False, False),
        (0, 0x1800, False, False),
        (0, 8, False, False),
        (0, 512, True, False),
        (6, 4096, False, False),
        (5, 4096, False, True),
        (0, 256, True, True),
        (0, 1 << 32, False, False),
    ],
)
def test_bars_that_cannot_be_are_refused(index: int, size: int, io: bool, wide: bool) -> None:
    with pytest.raises(ValueError, match="BAR"):
        Bar(index, size, [], io=io, wide=wide)
