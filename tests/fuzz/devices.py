"""Guests that access their devices' registers in any way.

``ports`` drives every device of the PC that is Python's from the ranges that it attached, on a
stand-in for the engine. ``functions`` drives virtio devices over PCI and MMIO, controllers of disks
and a network card: configuration space by ports and in memory, base addresses, registers, rings.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from typing import Any

from tests.fuzz.input import Input

from tetrarch import Machine
from tetrarch._native import Disk, Network, Vm
from tetrarch.cards import E1000Card, Vmxnet3Card
from tetrarch.devices import uart16550
from tetrarch.devices._access import all_ones
from tetrarch.devices.svga2 import Svga2
from tetrarch.errors import MachineStateError
from tetrarch.net import NetSpec
from tetrarch.net.network import OpenNetwork
from tetrarch.pci import PciBus
from tetrarch.pci.bus import PciAddressPort, PciDataPorts, PciEcam
from tetrarch.storage.ahci import AhciController
from tetrarch.storage.drives import AtaDrive, ScsiDrive
from tetrarch.storage.ide import IdeController
from tetrarch.storage.nvme import NvmeController
from tetrarch.storage.pvscsi import PvscsiController
from tetrarch.testing import ScriptedVm, pvh_kernel
from tetrarch.virtio.blk import BlkKind
from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.mmio import NOTIFY, REGISTERS, VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.rng import RngKind

MIB = 1 << 20
SIZES = (1, 2, 4, 8)


def check_value(value: object, size: int) -> None:
    assert isinstance(value, int), value
    assert 0 <= value <= all_ones(size), (value, size)


def access(source: Input, device: Any, base: int, length: int, sizes: Any = SIZES) -> None:
    """One read or write of a device, as the bus makes it: inside of its range."""
    size = SIZES[source.number(1) % 4]
    offset = source.number(2) % length
    if size not in sizes or offset + size > length:
        return
    if source.number(1) & 1:
        check_value(device.read(offset, size), size)
    else:
        device.write(offset, size, source.number(size))


def ports(data: bytes) -> None:
    """Accesses to the devices of a PC, between which it is saved, loaded and reset."""
    source = Input(data)
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(
            Machine(
                kernel=kernel(),
                memory="16M",
                cpus="1,max=3",
                vm=ScriptedVm(ScriptedVm.wait_for_stop),
            )
        )
        vm, pc = machine._vm, machine._pc
        assert isinstance(vm, ScriptedVm)
        regions = [region for region in vm._regions if region.mapped]
        while source.left:
            choice = source.number(1)
            match choice:
                case 0xFF:
                    pc.reset()
                case 0xFE:
                    state = pc.save()
                    pc.load(state)
                    assert pc.save().keys() == state.keys()
                case 0xFC:
                    with contextlib.suppress(MachineStateError):  # all are there
                        pc.vcpus.plug()
                case 0xFD:
                    machine.irq_line(source.number(1) % 24, bool(source.number(1) & 1))
                case _:
                    region = regions[choice % len(regions)]
                    access(source, region.device, region.base, region.length, region._sizes)
        pc.reset()
        # Whatever was done, the UART's transmitter is idle now.
        uart = next(region.device for region in regions if region.base == uart16550.PORT_BASE)
        assert uart.read(5, 1) & 0x60 == 0x60


@functools.cache
def kernel(code: bytes = b"\xf4") -> str:
    descriptor = os.memfd_create("kernel")
    os.write(descriptor, pvh_kernel(code))
    return f"/proc/self/fd/{descriptor}"


@functools.cache
def image(number: int) -> str:
    descriptor = os.memfd_create(f"disk {number}")
    os.truncate(descriptor, 1 << 20)
    return f"/proc/self/fd/{descriptor}"


def disk(number: int) -> Disk:
    return Disk(image(number), image_format="raw")


def network() -> OpenNetwork:
    """One whose other end is gone."""
    ours, theirs = socket.socketpair()
    native = Network.stream("nobody", ours.fileno())
    ours.close()
    theirs.close()
    return OpenNetwork(NetSpec("user"), native, contextlib.ExitStack(), threading.Event())


class Wire:
    gsi = 20

    def set(self, level: bool) -> None:
        pass

    def pulse(self) -> None:
        pass


class Bus:
    """Devices of each kind on PCI and one over MMIO, on an engine whose vCPU does not run."""

    RINGS = 0x10_0000

    def __init__(self) -> None:
        self.vm = Vm("bt", 4 * MIB)
        self.disk = BlkKind(self.vm, disk(0), "disk", 2)
        kinds: list[VirtioKind] = [RngKind(self.vm), self.disk]
        self.pci = PciBus(self.vm)
        self.functions = [VirtioPci(self.vm, kind) for kind in kinds]
        self.controllers: list[Any] = [
            NvmeController(self.vm, disk(1), queues=2),
            AhciController(self.vm, [AtaDrive("sata", disk(2))]),
            IdeController(self.vm, [AtaDrive("ide", disk(3)), AtaDrive("cd", disk(4), cd=True)]),
            PvscsiController(
                self.vm, [ScsiDrive("scsi", disk(5)), ScsiDrive("c", disk(6), cd=True)]
            ),
            Svga2(self.vm),
            Vmxnet3Card(self.vm, network(), "card", b"\2\0\0\0\0\1"),
            E1000Card(self.vm, network(), "other", b"\2\0\0\0\0\2"),
        ]
        self.devices: list[Any] = [*self.functions, *self.controllers]
        for device in self.devices:
            self.pci.plug(device.function)
        self.mmio = VirtioMmio(RngKind(self.vm), Wire())
        self.address = PciAddressPort(self.pci.state)
        self.data, self.ecam = PciDataPorts(self.pci), PciEcam(self.pci)

    def parts(self) -> list[tuple[Any, int]]:
        """Devices, each with the length of its range."""
        bars = [bar for one in self.devices for bar in one.function.bars]
        return [
            (self.mmio.below, NOTIFY),
            (self.mmio.doorbells, 4),
            (self.mmio.above, REGISTERS - NOTIFY - 4),
            *((part.device, part.length) for bar in bars for part in bar.parts),
        ]


def functions(data: bytes) -> None:
    """Registers and configuration space of devices on PCI, and then a good driver."""
    from tests.virtio.driver import Driver, Mmio, Pci

    source = Input(data)
    bus = Bus()
    parts = bus.parts()
    while source.left:
        choice = source.number(1)
        match choice & 7:
            case 0 | 1:
                # A slot that has a function, most of the time, and a register that does something.
                devfn = (1 + source.number(1) % 8) << 3 if choice & 8 else source.number(1)
                at = devfn << 12 | source.number(1)
                size = SIZES[choice >> 4 & 3]
                if choice & 1:
                    bus.ecam.write(at, size, source.number(size))
                else:
                    check_value(bus.ecam.read(at, size), size)
            case 2:
                size = SIZES[choice >> 4 & 3]
                bus.address.write(0, 4, 1 << 31 | source.number(3))
                offset = source.number(1) & 3
                bus.data.write(offset, size, source.number(size))
                check_value(bus.data.read(offset, size), size)
                check_value(bus.address.read(0, 4), 4)
            case 3 | 4 | 5:
                device, length = parts[source.number(1) % len(parts)]
                access(source, device, 0, length)
            case 6:
                bus.vm.write_memory(Bus.RINGS + source.number(2), source.bytes(choice >> 3))
            case _:
                life(source, bus, choice >> 3)
    for device in bus.devices:
        device.reset()
    bus.mmio.reset()
    rng, blk = bus.functions
    for transport in (Mmio(bus.mmio), Pci(rng)):
        driver = Driver(bus.vm, transport, Bus.RINGS)
        driver.start(1)
        assert driver.ask(0, [(0x8_0000, 16, True)]) == 16
    driver = Driver(bus.vm, Pci(blk), Bus.RINGS)
    driver.start(2)
    bus.vm.write_memory(0x8_0000, (8).to_bytes(16, "little"))
    assert driver.ask(1, [(0x8_0000, 16, False), (0x8_1000, 21, True)]) == 21
    assert bus.vm.read_memory(0x8_1000, 21) == b"disk".ljust(20, b"\0") + b"\0"
    bus.disk.close()
    for controller in bus.controllers:
        controller.close()


def life(source: Input, bus: Bus, choice: int) -> None:
    """What the machine does with its devices."""
    device: Any = [*bus.devices, bus.mmio][source.number(1) % (len(bus.devices) + 1)]
    match choice >> 2:
        case 0 | 1:
            device.reset()
            bus.pci.place()
        case 2 | 3:
            bus.vm.hold()
            try:
                state = device.save()
                device.load(state)
                assert device.save() == state
            finally:
                bus.vm.resume()
        case 4:
            device = bus.devices[source.number(1) % len(bus.devices)]
            slot = next(at for at in range(1, 32) if bus.pci.function(at) is device.function)
            bus.pci.unplug(slot)
            device.reset()
            bus.pci.plug(device.function)
        case _:
            bus.vm.hold()
            bus.vm.resume()
