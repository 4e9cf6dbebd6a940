"""Virtio devices in Python: what their driver sees, and what ends with them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.virtio.driver import Driver, Mmio, Pci, wait_until

from tetrarch import Machine
from tetrarch._native import EngineError, VirtioChain, Vm
from tetrarch.errors import ConfigError, HostError
from tetrarch.testing import pvh_kernel
from tetrarch.virtio import DeviceQueues
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import NEEDS_RESET
from tetrarch.virtio.served import ServedKind

DATA = 0x8_0000


class Wire:
    gsi = 20

    def __init__(self) -> None:
        self.level = False

    def set(self, level: bool) -> None:
        self.level = level

    def pulse(self) -> None:
        pass


class Reverser:
    """Answers a request with its bytes from back to front; queue 1 is input."""

    device_id = 42
    features = 1 << 3
    queue_sizes = (16, 8)
    inputs = (1,)

    def __init__(self) -> None:
        self.config = b"abcd"
        self.negotiations: list[int] = []
        self.told: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def attached(self, queues: DeviceQueues) -> None:
        self.queues = queues

    def negotiated(self, features: int) -> None:
        self.negotiations.append(features)

    def write_config(self, offset: int, data: bytes) -> None:
        self.config = self.config[:offset] + data + self.config[offset + len(data) :]

    def buffers(self, queue: int) -> None:
        self.told.append(queue)

    def handle(self, queue: int, chain: VirtioChain) -> None:
        self.entered.set()
        assert self.gate.wait(30)
        data = chain.read()
        if data == b"fail":
            raise RuntimeError("as asked")
        chain.write(data[::-1])


Made = tuple[Vm, Reverser, Driver, list[BaseException]]


@pytest.fixture(params=["mmio", "pci"])
def made(request: pytest.FixtureRequest) -> Any:
    vm = Vm("bt", 4 << 20)
    device = Reverser()
    raised: list[BaseException] = []
    kind = ServedKind(vm, device, "reverser", raised.append)
    if request.param == "mmio":
        driver = Driver(vm, Mmio(VirtioMmio(kind, Wire())))
    else:
        over_pci = VirtioPci(vm, kind)
        over_pci.function.plug(Wire())
        driver = Driver(vm, Pci(over_pci))
    yield vm, device, driver, raised
    device.gate.set()
    kind.close()


def test_requests_are_answered_and_features_and_configuration_shown(made: Made) -> None:
    vm, device, driver, _ = made
    driver.start(2, 1 << 3)
    assert device.negotiations[-1] & 1 << 3
    for text in (b"hello", b"", b"0123456789"):
        vm.write_memory(DATA, text + b"\0")
        request = [(DATA, len(text), False), (DATA + 0x100, 3, True), (DATA + 0x200, 20, True)]
        assert driver.ask(0, request) == len(text)
        got = vm.read_memory(DATA + 0x100, 3) + vm.read_memory(DATA + 0x200, 20)
        assert got[: len(text)] == text[::-1]
    driver.device.write_config(1, 2, 0x5A59)
    assert driver.device.config(0, 4) == int.from_bytes(b"aYZd", "little")


def test_buffers_of_an_input_queue_wait_until_the_device_takes_them(made: Made) -> None:
    vm, device, driver, _ = made
    driver.start(2)
    driver.offer(1, [(DATA, 8, True)])
    wait_until(lambda: 1 in device.told, "told of buffers")
    assert driver.used_index(1) == 0
    chain = device.queues.take(1)
    assert chain is not None
    assert (chain.readable, chain.writable) == (0, 8)
    assert chain.write(b"0123456789") == 8
    assert driver.used_index(1) == 0
    chain.done()
    chain.done()
    assert driver.wait(1) == (0, 8)
    assert driver.used_index(1) == 1
    assert vm.read_memory(DATA, 9) == b"01234567\0"
    assert chain.write(b"late") == 0
    assert device.queues.take(1) is None
    assert device.queues.take(7) is None


def test_reset_with_a_request_in_hand_leaves_memory_and_rings_alone(made: Made) -> None:
    vm, device, driver, _ = made
    driver.start(2)
    device.gate.clear()
    vm.write_memory(DATA, b"first")
    driver.offer(0, [(DATA, 5, False), (DATA + 0x100, 8, True)])
    assert device.entered.wait(30)
    driver.device.set_status(0)
    device.gate.set()
    driver.start(2)
    vm.write_memory(DATA, b"other")
    assert driver.ask(0, [(DATA, 5, False), (DATA + 0x200, 8, True)]) == 5
    assert vm.read_memory(DATA + 0x200, 5) == b"rehto"
    # The memory of the first request was the driver's again.
    assert vm.read_memory(DATA + 0x100, 8) == bytes(8)
    assert driver.used_index(0) == 1


def test_hold_waits_for_the_request_in_hand_and_names_the_device(made: Made) -> None:
    vm, device, driver, _ = made
    driver.start(2)
    device.gate.clear()
    driver.offer(0, [(DATA, 5, False), (DATA + 0x100, 8, True)])
    assert device.entered.wait(30)
    with pytest.raises(EngineError, match="reverser"):
        vm.hold(0.05)
    device.gate.set()
    driver.wait(0)
    vm.hold(30)
    driver.offer(0, [(DATA, 5, False), (DATA + 0x100, 8, True)])
    assert device.queues.take(0) is None
    assert driver.used_index(0) == 1
    vm.resume()
    driver.wait(0)


def test_chain_that_is_forgotten_goes_back(made: Made) -> None:
    _, device, driver, _ = made
    driver.start(2)
    driver.offer(1, [(DATA, 8, True)])
    wait_until(lambda: 1 in device.told, "told of buffers")
    assert device.queues.take(1) is not None  # and gone
    assert driver.wait(1) == (0, 0)


def test_driver_that_breaks_the_rules_has_to_reset(made: Made) -> None:
    vm, _, driver, _ = made
    driver.start(2)
    driver.offer(0, [(1 << 40, 8, True)])
    wait_until(lambda: driver.device.status() & NEEDS_RESET, "needs reset")
    driver.start(2)
    vm.write_memory(DATA, b"again")
    assert driver.ask(0, [(DATA, 5, False), (DATA + 0x100, 8, True)]) == 5


def test_exception_is_told_and_the_chain_given_back(made: Made) -> None:
    vm, _, driver, raised = made
    driver.start(2)
    vm.write_memory(DATA, b"fail")
    assert driver.ask(0, [(DATA, 4, False), (DATA + 0x100, 8, True)]) == 0
    wait_until(lambda: raised, "the exception")
    assert str(raised[0]) == "as asked"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": 1 << 33}, "feature bits of queues"),
        ({"features": 1 << 29}, "feature bits of queues"),
        ({"queue_sizes": (3,)}, "a queue of 3"),
        ({"queue_sizes": ()}, "no queues"),
        ({"device_id": 0}, "0 is no number"),
    ],
)
def test_device_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    device = Reverser()
    for name, value in changes.items():
        setattr(device, name, value)
    with pytest.raises(ConfigError, match=words):
        ServedKind(Vm("bt", 4 << 20), device, "reverser", print)


def test_thing_that_is_no_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="no device_id"):
        ServedKind(Vm("bt", 4 << 20), object(), "thing", print)  # type: ignore[arg-type]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(pvh_kernel(b"\xf4\xeb\xfd"))  # hlt; jmp
    return path


def test_names_of_a_machines_devices_are_their_own(kernel: Path) -> None:
    with Machine(engine="bt", kernel=kernel, memory="16M") as vm:
        vm.attach_virtio(Reverser())
        vm.attach_virtio(Reverser(), name="other")
        with pytest.raises(ConfigError, match="'Reverser' already"):
            vm.attach_virtio(Reverser())


def test_device_that_does_not_return_is_named() -> None:
    vm = Vm("bt", 4 << 20)
    device = Reverser()
    kind = ServedKind(vm, device, "reverser", print)
    driver = Driver(vm, Mmio(VirtioMmio(kind, Wire())))
    driver.start(2)
    device.gate.clear()
    driver.offer(0, [(DATA, 5, False)])
    assert device.entered.wait(30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tetrarch.virtio.served._PATIENCE_S", 0.05)
        with pytest.raises(HostError, match="'reverser' does not return"):
            kind.close()
    device.gate.set()
    kind.close()
