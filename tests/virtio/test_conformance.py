"""What holds for every device, by a driver that knows no more than the specification."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from tests.virtio.driver import Driver, Mmio, Pci, Transport
from tests.virtio.test_served import Reverser, Wire
from tests.virtio.test_vhost_user import disk

from tetrarch import block
from tetrarch._native import Vm
from tetrarch.net import NetSpec, open_network
from tetrarch.virtio.balloon import BalloonKind
from tetrarch.virtio.blk import BlkKind
from tetrarch.virtio.console import ConsoleKind
from tetrarch.virtio.input import InputKind
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.net import NetKind
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    VERSION_1,
)
from tetrarch.virtio.rng import RngKind
from tetrarch.virtio.served import ServedKind
from tetrarch.virtio.vhost_user import VhostUserBlk
from tetrarch.virtio.vsock import VsockKind

RAM: Final = 16 << 20
#: Requests' buffers; each has a page of its own.
BUFFERS: Final = 0x80_0000
PAGE: Final = 0x1000
MANY: Final = 16

Chain = list[tuple[int, int, bool]]


@dataclass
class Device:
    """A device of a kind, and a request that it answers."""

    vm: Vm
    driver: Driver
    queue: int
    fill: Callable[[int], Chain]
    """Puts a request into a page, whose buffers it gives."""
    written: int

    def offer(self, number: int) -> None:
        self.driver.offer(self.queue, self.fill(BUFFERS + PAGE * number))

    def ask(self) -> None:
        assert self.driver.ask(self.queue, self.fill(BUFFERS)) == self.written

    def start(self) -> None:
        self.driver.start(self.queue + 1)

    def settle(self) -> None:
        """Until the device has looked into its queues."""
        for _ in range(2):
            self.vm.hold()
            self.vm.resume()


def requests(vm: Vm, name: str) -> tuple[int, Callable[[int], Chain], int]:
    """Queue, request and how much of the answer is written, of each kind."""

    def blk(page: int) -> Chain:
        vm.write_memory(page, struct.pack("<IIQ", 8, 0, 0))  # GET_ID
        return [(page, 16, False), (page + 64, 21, True)]

    def vsock(page: int) -> Chain:
        # A reset of a connection that is not there has no answer.
        vm.write_memory(page, struct.pack("<QQIIIHHIII", 3, 2, 1, 2, 0, 1, 3, 0, 0, 0))
        return [(page, 44, False)]

    def balloon(page: int) -> Chain:
        vm.write_memory(page, (0xF0_0000 >> 12).to_bytes(4, "little"))
        return [(page, 4, False)]

    def led(page: int) -> Chain:
        vm.write_memory(page, struct.pack("<HHi", 0x11, 1, 1))
        return [(page, 8, False)]

    table: dict[str, tuple[int, Callable[[int], Chain], int]] = {
        "rng": (0, lambda page: [(page + 64, 32, True)], 32),
        "blk": (0, blk, 21),
        "vsock": (1, vsock, 0),
        "balloon": (0, balloon, 0),
        "input": (1, led, 0),
        # A header of zeroes, and a frame of its own making for nobody.
        "net": (1, lambda page: [(page, 12 + 60, False)], 0),
        "console": (1, lambda page: [(page, 4, False)], 0),
        "vhost-user": (0, lambda page: [(page, 16, False), (page + 64, 17, True)], 17),
        "served": (0, lambda page: [(page, 4, False), (page + 64, 4, True)], 4),
    }
    return table[name]


@pytest.fixture(params=["mmio", "pci"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


KINDS = "rng blk vhost-user vsock balloon input net console served"


@pytest.fixture(params=KINDS.split())
def device(request: pytest.FixtureRequest, transport: str, tmp_path: Path) -> Iterator[Device]:
    vm = Vm("bt", RAM)
    name = request.param
    raised: list[BaseException] = []
    with ExitStack() as stack:
        kind: Any
        match name:
            case "rng":
                kind = RngKind(vm)
            case "blk":
                block.create(tmp_path / "disk.img", 1 << 20)
                kind = BlkKind(vm, block.open_disk(block.DiskSpec(tmp_path / "disk.img")), name, 1)
            case "vhost-user":
                stack.enter_context(disk(tmp_path / "blk"))
                kind = VhostUserBlk(vm, tmp_path / "blk", name, 1)
            case "vsock":
                kind = VsockKind(vm, tmp_path / "vsock")
            case "balloon":
                kind = BalloonKind(vm, RAM)
            case "input":
                kind = InputKind(vm, "keyboard", name, raised.append)
            case "net":
                network = open_network(NetSpec.parse(f"socket={tmp_path / 'net'}"))
                kind = NetKind(vm, network, name, b"\2\0\0\0\0\1")
            case "console":
                kind = ConsoleKind(vm, [""])
            case _:
                kind = ServedKind(vm, Reverser(), name, raised.append)
        if hasattr(kind, "close"):
            stack.callback(kind.close)
        over: Transport
        if transport == "mmio":
            over = Mmio(VirtioMmio(kind, Wire()))
        else:
            function = VirtioPci(vm, kind)
            function.function.plug(Wire())
            over = Pci(function)
        yield Device(vm, Driver(vm, over), *requests(vm, name))
    assert not raised


def test_each_feature_that_is_not_offered_is_refused(device: Device) -> None:
    registers = device.driver.device
    registers.set_status(0)
    offered = registers.features()
    for bit in range(64):
        registers.set_status(0)
        registers.set_status(ACKNOWLEDGE | DRIVER)
        registers.set_features(VERSION_1 | 1 << bit)
        registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        accepted = bool(registers.status() & FEATURES_OK)
        assert accepted == bool(offered >> bit & 1), bit
    # Nor is anything served for a driver that goes on without (3.1.1).
    registers.set_status(0)
    registers.set_status(ACKNOWLEDGE | DRIVER)
    registers.set_features(offered | 1 << 63)
    device.driver.add_queue(device.queue)
    registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    device.offer(0)
    device.settle()
    assert device.driver.used_index(device.queue) == 0
    device.start()
    device.ask()


def test_reset_ends_what_is_in_flight_and_is_over_when_it_reads_as_0(device: Device) -> None:
    registers, driver = device.driver.device, device.driver
    for round_ in range(1, 21):
        device.start()
        for number in range(MANY):
            device.offer(number)
        registers.set_status(0)
        assert registers.status() == 0
        assert not registers.enabled(device.queue)
        mark = os.urandom(8) + bytes([round_])
        rings = driver.areas(device.queue)
        places = [BUFFERS + PAGE * number + 64 for number in range(MANY)]
        for place in (*places, *rings):
            device.vm.write_memory(place, mark)
        registers.notify(device.queue)
        device.settle()
        for place in (*places, *rings):
            assert device.vm.read_memory(place, len(mark)) == mark
    device.start()
    device.ask()


def test_queue_that_is_not_enabled_is_left_alone(device: Device) -> None:
    registers, driver = device.driver.device, device.driver
    driver.negotiate()
    driver.add_queue(device.queue)
    for area in driver.areas(device.queue):
        device.vm.write_memory(area, bytes(64))
    # Of MMIO it can be taken back before the driver is ready; of PCI it cannot (4.1.4.3.2).
    registers.disable(device.queue)
    taken_back = isinstance(registers, Mmio)
    assert registers.enabled(device.queue) != taken_back
    registers.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    device.offer(0)
    for queue in (device.queue, 0, 63, 0xFFFF):
        if isinstance(registers, Mmio) or queue < 1024:
            registers.notify(queue)
    device.settle()
    if taken_back:
        assert driver.used_index(device.queue) == 0
    else:
        assert driver.wait(device.queue)[1] == device.written
    assert not registers.status() & NEEDS_RESET


def test_queue_that_is_disabled_while_it_is_busy(device: Device) -> None:
    """MMIO: nothing of it is touched once it reads as not ready (4.2.2.2). PCI has no such thing:
    the device goes on."""
    registers, driver = device.driver.device, device.driver
    for _ in range(10):
        device.start()
        device.ask()
        for number in range(MANY):
            device.offer(number)
        registers.disable(device.queue)
        if registers.enabled(device.queue):
            assert isinstance(registers, Pci)
            for _ in range(MANY):
                driver.wait(device.queue)
            continue
        used = driver.used_index(device.queue)
        assert used <= 1 + MANY
        places = [BUFFERS + PAGE * number + 64 for number in range(MANY)]
        for place in places:
            device.vm.write_memory(place, b"mine")
        registers.notify(device.queue)
        device.settle()
        assert driver.used_index(device.queue) == used
        assert all(device.vm.read_memory(place, 4) == b"mine" for place in places)
        # Not even a driver that enables it again has it back without a reset.
        registers.set_up(device.queue, 16, driver.areas(device.queue))
        assert not registers.enabled(device.queue)
        assert not registers.status() & NEEDS_RESET
    device.start()
    device.ask()


def test_reset_gives_all_registers_back(device: Device) -> None:
    registers = device.driver.device
    registers.set_status(0)
    sizes = [registers.size(queue) for queue in range(8)]
    device.start()
    device.ask()
    registers.set_status(0)
    assert [registers.size(queue) for queue in range(8)] == sizes
    assert not any(registers.enabled(queue) for queue in range(8))
    assert sizes[device.queue] > 0
    assert sizes[7] == 0, "a queue that is not there"
