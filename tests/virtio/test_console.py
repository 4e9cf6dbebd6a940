"""The console device, by a driver that knows no more than the specification (5.3)."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from tests.virtio.driver import Driver, Mmio, Pci, wait_until

from tetrarch._native import Vm
from tetrarch.errors import ConfigError, StateError
from tetrarch.virtio.console import EMERG_WRITE, MULTIPORT, SIZE, ConsoleKind
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import NEEDS_RESET

MEMORY = 8 << 20
PAGE = 0x1000
#: Where the driver has its buffers: a page for each descriptor of each queue.
BUFFERS = 0x40_0000

CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
DEVICE_READY, PORT_ADD, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 0, 1, 3, 4, 5, 6, 7


class Wire:
    gsi = 20

    def __init__(self) -> None:
        self.level = False

    def set(self, level: bool) -> None:
        self.level = level

    def pulse(self) -> None:
        pass


class ConsoleDriver(Driver):
    def __init__(self, ports: list[str], transport: str = "pci") -> None:
        vm = Vm("bt", MEMORY)
        self.kind = ConsoleKind(vm, ports)
        self.wire = Wire()
        if transport == "mmio":
            self.over: Any = VirtioMmio(self.kind, self.wire)
            super().__init__(vm, Mmio(self.over))
        else:
            self.over = VirtioPci(vm, self.kind)
            self.over.function.plug(self.wire)
            super().__init__(vm, Pci(self.over))
        self.heads: dict[tuple[int, int], int] = {}

    def give(self, queue: int, count: int = 1, size: int = 64) -> None:
        """Buffers for the device to write."""
        for _ in range(count):
            at = BUFFERS + PAGE * (64 * queue + self._free[queue])
            self.heads[queue, self.offer(queue, [(at, size, True)])] = at

    def get(self, queue: int) -> bytes:
        """What the device has written into the next one."""
        head, written = self.wait(queue)
        return self.vm.read_memory(self.heads[queue, head], written)

    def send(self, queue: int, data: bytes) -> None:
        at = BUFFERS + PAGE * 64 * queue
        self.vm.write_memory(at, data)
        assert self.ask(queue, [(at, len(data), False)]) == 0

    def tell(self, port: int, event: int, value: int = 1) -> None:
        self.send(CONTROL_TRANSMIT, struct.pack("<IHH", port, event, value))

    def hear(self) -> tuple[int, int, int, bytes]:
        message = self.get(CONTROL_RECEIVE)
        return *struct.unpack("<IHH", message[:8]), message[8:]


@pytest.fixture(params=["mmio", "pci"])
def terminal(request: pytest.FixtureRequest) -> ConsoleDriver:
    driver = ConsoleDriver([""], request.param)
    driver.start(2, SIZE | MULTIPORT | EMERG_WRITE)
    return driver


@pytest.fixture
def several() -> ConsoleDriver:
    """A terminal and two pipes, whose driver knows nothing of them yet."""
    driver = ConsoleDriver(["", "org.one", "org.two"])
    driver.start(8, SIZE | MULTIPORT)
    driver.give(CONTROL_RECEIVE, 16)
    return driver


def test_one_terminal_has_no_ports_and_two_queues(terminal: ConsoleDriver) -> None:
    assert terminal.device.features() & 7 == SIZE | EMERG_WRITE
    assert len(terminal.kind.queue_sizes) == 2


def test_bytes_go_both_ways(terminal: ConsoleDriver) -> None:
    (port,) = terminal.kind.ports
    terminal.send(1, b"hello, host")
    assert port.wait_output() == b"hello, host"
    port.receive(b"hello")
    port.receive(b", guest")
    assert port.queued == 12
    terminal.give(0, 2, 7)
    assert terminal.get(0) + terminal.get(0) == b"hello, guest"
    assert port.queued == 0
    wait_until(lambda: terminal.wire.level, "an interrupt")
    terminal.give(0)
    port.receive(b"at once")
    assert terminal.get(0) == b"at once"


def test_size_of_the_terminal_is_in_the_configuration(terminal: ConsoleDriver) -> None:
    device, (port,) = terminal.device, terminal.kind.ports
    assert device.config(0, 4) == 0
    port.resize(24, 80)
    wait_until(lambda: terminal.wire.level, "a change of the configuration")
    assert (device.config(0, 2), device.config(2, 2), device.config(4, 4)) == (80, 24, 1)
    port.resize(1 << 20, -5)
    assert (device.config(0, 2), device.config(2, 2)) == (0, 0xFFFF)
    for offset, size in ((0, 4), (4, 4), (0xF8, 8)):
        device.write_config(offset, size, 0x1234)
    assert (device.config(0, 2), device.config(2, 2), device.config(4, 4)) == (0, 0xFFFF, 1)


def test_character_is_said_before_there_are_queues() -> None:
    driver = ConsoleDriver([""])
    driver.device.write_config(8, 4, ord("!"))
    assert driver.kind.ports[0].wait_output() == b"!"


def test_guest_that_writes_more_than_is_read_waits(terminal: ConsoleDriver) -> None:
    vm, (port,) = terminal.vm, terminal.kind.ports
    data = bytes(i % 251 for i in range(1 << 20))
    vm.write_memory(BUFFERS, data)
    terminal.offer(1, [(BUFFERS, len(data), False)])
    terminal.offer(1, [(BUFFERS, 3, False)])
    read = bytearray()
    # What is not read yet is not taken either.
    while len(read) < len(data) // 2:
        assert terminal.used_index(1) == 0
        read += port.wait_output()
    vm.hold()
    vm.resume()
    while len(read) < len(data) + 3:
        read += port.wait_output()
    assert read == data + data[:3]
    wait_until(lambda: terminal.used_index(1) == 2, "both buffers back")


def test_guest_waits_for_nobody_when_the_output_has_ended(terminal: ConsoleDriver) -> None:
    (port,) = terminal.kind.ports
    port.end_output()
    assert terminal.ask(1, [(BUFFERS, 1 << 20, False)]) == 0
    assert port.wait_output() == b""


def test_driver_is_told_of_its_ports(several: ConsoleDriver) -> None:
    ports = several.kind.ports
    ports[0].resize(24, 80)
    several.tell(0, DEVICE_READY)
    assert [several.hear() for _ in range(3)] == [(port, PORT_ADD, 1, b"") for port in range(3)]
    several.tell(0, PORT_READY)
    assert [several.hear() for _ in range(3)] == [
        (0, CONSOLE_PORT, 1, b""),
        (0, RESIZE, 1, struct.pack("<HH", 80, 24)),
        (0, PORT_OPEN, 1, b""),
    ]
    several.tell(2, PORT_READY)
    assert several.hear() == (2, PORT_NAME, 1, b"org.two")
    assert several.hear() == (2, PORT_OPEN, 1, b"")
    ports[0].resize(30, 100)
    assert several.hear() == (0, RESIZE, 1, struct.pack("<HH", 100, 30))
    several.give(CONTROL_RECEIVE)
    ports[1].resize(30, 100)  # a port that the driver has not heard of
    ports[0].resize(31, 100)
    assert several.hear() == (0, RESIZE, 1, struct.pack("<HH", 100, 31))


def test_port_takes_input_when_the_guest_has_opened_it(several: ConsoleDriver) -> None:
    port = several.kind.ports[2]
    several.send(7, b"from the third")
    assert port.wait_output() == b"from the third"
    several.give(6, 2)
    port.receive(b"early")
    several.tell(0, PORT_READY)  # the device has looked at its queues since
    assert several.used_index(6) == 0
    several.tell(2, PORT_OPEN)
    assert several.get(6) == b"early"
    several.tell(2, PORT_OPEN, 0)
    port.receive(b"late")
    several.tell(1, PORT_OPEN)
    assert several.used_index(6) == 1
    several.tell(2, PORT_OPEN)
    assert several.get(6) == b"late"


def test_control_messages_of_any_form_harm_nobody(several: ConsoleDriver) -> None:
    for event in range(12):
        for port in (0, 3, 15, 31, 32, 64, 0xFFFF_FFFF):
            for value in (0, 1, 0xFFFF):
                several.tell(port, event, value)
    for data in (b"x", bytes(7), bytes(4096)):
        several.send(CONTROL_TRANSMIT, data)
    several.ask(CONTROL_TRANSMIT, [(BUFFERS, 8, True)])
    # Its answers were not read: of what it has to hear there is one each, and no more.
    several.device.set_status(0)
    several.start(8, SIZE | MULTIPORT)
    for _ in range(200):
        several.tell(0, DEVICE_READY)
        several.tell(0, PORT_READY)
    several.give(CONTROL_RECEIVE, 16)
    several.tell(1, PORT_OPEN, 0)
    assert several.used_index(CONTROL_RECEIVE) == 6
    # Buffers that are too small for what is to be said, and such for input.
    several.give(CONTROL_RECEIVE, 2, 3)
    several.tell(1, PORT_OPEN)
    several.kind.ports[1].receive(b"abc")
    for size in (0, 1, 2):
        several.offer(4, [(BUFFERS, size, True)])
    wait_until(lambda: several.used_index(4) == 3, "the buffers back")
    assert several.kind.ports[1].queued == 0
    assert several.device.status() & NEEDS_RESET == 0


def test_driver_without_ports_has_the_first_alone() -> None:
    driver = ConsoleDriver(["", "org.one"])
    driver.start(6, SIZE)
    driver.send(1, b"x")
    assert driver.kind.ports[0].wait_output() == b"x"
    driver.kind.ports[0].receive(b"y")
    driver.give(0)
    assert driver.get(0) == b"y"
    driver.offer(CONTROL_TRANSMIT, [(BUFFERS, 8, False)])
    driver.offer(5, [(BUFFERS, 8, False)])
    driver.send(1, b"z")
    assert driver.kind.ports[0].wait_output() == b"z"
    assert (driver.used_index(CONTROL_TRANSMIT), driver.used_index(5)) == (0, 0)


def test_chain_that_cannot_be_needs_a_reset(terminal: ConsoleDriver) -> None:
    terminal.offer(1, [(MEMORY - 1, 2, False)])
    wait_until(lambda: terminal.device.status() & NEEDS_RESET, "the device sees it")
    terminal.start(2, SIZE)
    terminal.send(1, b"well again")
    assert terminal.kind.ports[0].wait_output() == b"well again"


def test_ports_are_sixteen_at_most() -> None:
    driver = ConsoleDriver([f"port{index}" for index in range(16)])
    assert driver.device.config(4, 4) == 16
    assert len(driver.kind.queue_sizes) == 34
    with pytest.raises(ConfigError, match="16 or less"):
        ConsoleKind(driver.vm, [""] * 17)


def test_saved_console_goes_on_in_another_machine(several: ConsoleDriver) -> None:
    ports = several.kind.ports
    several.tell(0, DEVICE_READY)
    for _ in range(3):
        several.hear()
    several.tell(1, PORT_OPEN)
    ports[1].receive(b"typed")
    data = bytes(i % 251 for i in range(100_000))
    several.vm.write_memory(BUFFERS, data)
    several.offer(7, [(BUFFERS, len(data), False)])
    read = ports[2].wait_output()
    several.tell(2, PORT_READY)
    several.vm.hold()
    read += ports[2].wait_output()
    state, memory = several.over.save(), several.vm.read_memory(0, MEMORY)
    copy = ConsoleDriver(["", "org.one", "org.two"])
    copy.vm.hold()
    copy.vm.write_memory(0, memory)
    copy.over.load(state)
    assert copy.over.save() == state
    names = ("_available", "_used", "_sizes", "_free", "heads")
    vars(copy).update({name: vars(several)[name] for name in names})
    copy.vm.resume()
    while len(read) < len(data):
        read += copy.kind.ports[2].wait_output()
    assert read == data
    assert copy.hear() == (2, PORT_NAME, 1, b"org.two")
    copy.give(4)
    assert copy.get(4) == b"typed"
    good = state["kind"]["ports"]
    for bad in ({}, {"ports": good[:2]}, {"ports": [{}, *good[1:]]}, {"ports": [1, 2, 3]}):
        with pytest.raises(StateError):
            copy.over.load({**state, "kind": bad})
