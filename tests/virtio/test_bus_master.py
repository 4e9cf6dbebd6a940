"""A device whose driver takes the bus from it leaves memory alone (PCI Local Bus 3.0, 6.2.2)."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.virtio.driver import Driver, Pci, wait_until
from tests.virtio.test_served import Reverser, Wire

from tetrarch import block
from tetrarch._native import Vm
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.virtio.blk import FLUSH, BlkKind
from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.rng import RngKind
from tetrarch.virtio.served import ServedKind

MIB = 1 << 20
DATA = 0x40_0000


class Function:
    """A device on the bus, and its driver."""

    def __init__(self, vm: Vm, kind: VirtioKind) -> None:
        self.vm = vm
        self.wire = Wire()
        self.pci = VirtioPci(vm, kind)
        self.pci.function.plug(self.wire)
        self.driver = Driver(vm, Pci(self.pci))

    def bus(self, master: bool) -> None:
        self.pci.function.write_config(COMMAND, 2, BUS_MASTER if master else 0)

    def settle(self) -> None:
        """Until the device has looked into its queues: it does when the machine goes on, and
        has when it is at rest."""
        for _ in range(2):
            self.vm.hold()
            self.vm.resume()


def test_queue_is_served_only_while_the_device_has_the_bus() -> None:
    vm = Vm("bt", 8 * MIB)
    rng = Function(vm, RngKind(vm))
    driver = rng.driver
    driver.start(1)
    assert driver.ask(0, [(DATA, 8, True)]) == 8
    for _ in range(3):
        rng.bus(False)
        vm.write_memory(DATA, bytes(16))
        used = driver.used_index(0)
        driver.offer(0, [(DATA, 16, True)])
        rng.settle()
        assert driver.used_index(0) == used
        assert vm.read_memory(DATA, 16) == bytes(16)
        rng.bus(True)
        assert driver.wait(0)[1] == 16


def test_device_that_starts_without_the_bus_waits_for_it() -> None:
    vm = Vm("bt", 8 * MIB)
    rng = Function(vm, RngKind(vm))
    rng.bus(False)
    rng.driver.start(1)
    rng.driver.offer(0, [(DATA, 16, True)])
    rng.settle()
    assert rng.driver.used_index(0) == 0
    state = rng.pci.save()
    rng.pci.reset()
    assert not rng.pci.function.bus_master
    rng.pci.load(state)
    rng.settle()
    assert rng.driver.used_index(0) == 0
    rng.bus(True)
    assert rng.driver.wait(0)[1] == 16


def test_what_a_disk_has_in_flight_is_over_when_the_bus_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    block.create(path, 8 * MIB)
    # A limit keeps some of them waiting.
    vm = Vm("bt", 32 * MIB)
    kind = BlkKind(vm, block.open_disk(block.DiskSpec(path, iops=200)), "disk0", 1)
    disk = Function(vm, kind)
    driver = disk.driver
    driver.start(1, FLUSH)
    vm.write_memory(DATA, struct.pack("<IIQ", 0, 0, 0))
    buffers = DATA + 0x1_0000
    for round_ in range(3):
        for index in range(16):
            at = buffers + 0x4000 * index
            driver.offer(0, [(DATA, 16, False), (at, 0x4000, True), (DATA + 64, 1, True)])
        disk.bus(False)
        mark = os.urandom(16 * 0x4000)
        vm.write_memory(buffers, mark)
        used = driver.used_index(0)
        disk.settle()
        assert vm.read_memory(buffers, len(mark)) == mark
        assert driver.used_index(0) == used
        disk.bus(True)
        for _ in range(16):
            driver.wait(0)
        assert driver.used_index(0) == 16 * (round_ + 1)
    kind.close()


@pytest.fixture
def served() -> Any:
    vm = Vm("bt", 8 * MIB)
    device = Reverser()
    raised: list[BaseException] = []
    kind = ServedKind(vm, device, "reverser", raised.append)
    yield Function(vm, kind), device
    device.gate.set()
    kind.close()
    assert not raised


def test_chain_that_python_has_comes_back_with_the_bus(served: tuple[Function, Reverser]) -> None:
    function, device = served
    vm, driver = function.vm, function.driver
    driver.start(2)
    driver.offer(1, [(DATA, 8, True)])
    wait_until(lambda: 1 in device.told, "told of buffers")
    chain = device.queues.take(1)
    assert chain is not None
    assert chain.write(b"abcd") == 4
    # Nobody waits for it: it may stay with the device for ever.
    function.bus(False)
    assert chain.write(b"efgh") == 0
    chain.done()
    assert driver.used_index(1) == 0
    assert vm.read_memory(DATA, 8) == b"abcd" + bytes(4)
    function.bus(True)
    assert driver.wait(1)[1] == 4
    assert function.wire.level
