"""What a driver negotiates and sets up, over both transports, by the entropy device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.virtio.driver import Driver, Mmio, Pci, wait_until

from tetrarch._native import Vm
from tetrarch.errors import StateError
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    RING_FEATURES,
    VERSION_1,
)
from tetrarch.virtio.rng import RngKind

READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
DATA = 0x8_0000


class Wire:
    def __init__(self) -> None:
        self.level = False

    def set(self, level: bool) -> None:
        self.level = level

    @property
    def gsi(self) -> int:
        return 20

    def pulse(self) -> None:
        pass


Made = tuple[Vm, Any, Driver, Callable[[], bool]]


@pytest.fixture(params=["mmio", "pci"])
def made(request: pytest.FixtureRequest) -> Made:
    return make(request.param)


def make(transport: str) -> Made:
    vm = Vm("bt", 4 << 20)
    wire = Wire()
    if transport == "mmio":
        over_mmio = VirtioMmio(RngKind(vm), wire)
        return vm, over_mmio, Driver(vm, Mmio(over_mmio)), lambda: wire.level
    over_pci = VirtioPci(vm, RngKind(vm))
    over_pci.function.plug(wire)
    return vm, over_pci, Driver(vm, Pci(over_pci)), lambda: wire.level


def test_buffers_are_filled_and_the_driver_interrupted(made: Made) -> None:
    vm, device, driver, line = made
    driver.start(1)
    assert driver.device.status() == READY
    assert driver.ask(0, [(DATA, 40, True), (DATA + 64, 24, True)]) == 64
    first = vm.read_memory(DATA, 88)
    assert first[:40] != bytes(40)
    assert first[40:64] == bytes(24)
    assert first[64:] != bytes(24)
    wait_until(line, "an interrupt")
    if isinstance(device, VirtioPci):
        assert device.read_isr() == 1
        assert device.read_isr() == 0
    else:
        assert device.read(0x60, 4) == 1
        device.write(0x64, 4, 1)
    assert not line()


def test_features_that_are_not_offered_are_refused(made: Made) -> None:
    _, _, driver, _ = made
    transport = driver.device
    offered = transport.features()
    assert offered & RING_FEATURES == RING_FEATURES
    for bad in (offered | 1 << 50, offered & ~VERSION_1, 0):
        transport.set_status(0)
        transport.set_status(ACKNOWLEDGE | DRIVER)
        transport.set_features(bad)
        transport.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert transport.status() == ACKNOWLEDGE | DRIVER
        # A driver that goes on all the same starts nothing.
        transport.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK)
        driver.vm.write_memory(driver.areas(0)[0], bytes(0x100))
        transport.notify(0)
    transport.set_status(0)
    driver.start(1)
    assert driver.ask(0, [(DATA, 8, True)]) == 8


def test_features_are_fixed_once_they_are_accepted(made: Made) -> None:
    vm, device, driver, _ = made
    driver.negotiate()
    driver.device.set_features(0)
    assert device.registers.state.driver_features == VERSION_1
    driver.add_queue(0)
    driver.device.set_status(READY)
    assert driver.ask(0, [(DATA, 8, True)]) == 8
    assert vm.read_memory(DATA + 8, 8) == bytes(8)


def test_queue_that_is_enabled_cannot_be_changed(made: Made) -> None:
    _, _, driver, _ = made
    driver.start(1)
    driver.ask(0, [(DATA, 8, True)])
    driver.device.set_up(0, 2, (0, 0, 0))
    driver.device.set_up(9, 2, (0, 0, 0))  # and one that is not there
    assert driver.device.enabled(0)
    assert not driver.device.enabled(9)
    assert driver.ask(0, [(DATA, 16, True)]) == 16


def test_size_that_a_queue_cannot_have_is_not_taken(made: Made) -> None:
    _, device, driver, _ = made
    driver.negotiate()
    (most,) = device.registers.kind.queue_sizes
    for size in (0, most + 1, 0xFFFF):
        driver.device.set_up(0, size, driver.areas(0))
        assert device.registers.queues[0].size == most
        driver.negotiate()


@pytest.mark.parametrize(
    "areas",
    [
        (1 << 40, 0x1000, 0x2000),
        (0x1008, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0, 0, 1 << 63),
    ],
)
def test_rings_that_cannot_be_need_a_reset(made: Made, areas: tuple[int, int, int]) -> None:
    _, _, driver, line = made
    driver.negotiate()
    driver.device.set_up(0, 16, areas)
    driver.device.set_status(READY)
    assert driver.device.status() & NEEDS_RESET
    wait_until(line, "a change of the configuration")
    driver.device.set_status(0)
    assert driver.device.status() == 0
    driver.start(1)
    assert driver.ask(0, [(DATA, 8, True)]) == 8


def test_nonsense_again_and_again_does_not_fill_the_log(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, driver, _ = made
    for _ in range(20):
        driver.negotiate()
        driver.device.set_up(0, 16, (1, 0x2000, 0x3000))
        driver.device.set_status(READY)
        assert driver.device.status() & NEEDS_RESET
        driver.start(1)
        driver.offer(0, [(1 << 50, 8, True)])
        wait_until(lambda: driver.device.status() & NEEDS_RESET, "the device sees it")
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "in a way that cannot be" in line]) == 1
    assert len([line for line in said if "breaks the rules" in line]) == 1


def test_chain_that_breaks_the_rules_needs_a_reset_and_then_all_is_well(made: Made) -> None:
    _, _, driver, line = made
    driver.start(1)
    driver.offer(0, [(1 << 50, 8, True)])
    wait_until(lambda: driver.device.status() & NEEDS_RESET, "the device sees it")
    wait_until(line, "it says so")
    assert driver.used_index(0) == 0
    driver.device.set_status(0)
    driver.start(1)
    assert driver.device.status() == READY
    assert driver.ask(0, [(DATA, 8, True)]) == 8


def test_device_that_is_reset_leaves_memory_alone(made: Made) -> None:
    vm, _, driver, _ = made
    for _ in range(50):
        driver.start(1)
        for _ in range(8):
            driver.offer(0, [(DATA, 4096, True)])
        driver.device.set_status(0)
        vm.write_memory(DATA, bytes(4096))
        vm.write_memory(driver.areas(0)[2], bytes(64))
        driver.device.notify(0)
    assert vm.read_memory(DATA, 4096) == bytes(4096)
    assert driver.used_index(0) == 0


def test_saved_device_goes_on_in_another_machine() -> None:
    for transport in ("mmio", "pci"):
        vm, device, driver, _ = make(transport)
        driver.start(1)
        for count in range(5):
            assert driver.ask(0, [(DATA, 8 + count, True)]) == 8 + count
        vm.hold()
        driver.offer(0, [(DATA, 99, True)])  # the device has not seen it
        state, memory = device.save(), vm.read_memory(0, 4 << 20)
        vm.resume()
        copy_vm, copy, copy_driver, _ = make(transport)
        copy_vm.hold()
        copy_vm.write_memory(0, memory)
        copy_vm.write_memory(DATA, bytes(128))
        copy.load(state)
        assert copy.save() == state
        vars(copy_driver).update(
            {name: vars(driver)[name] for name in ("_available", "_used", "_sizes", "_free")}
        )
        copy_vm.resume()
        assert copy_driver.wait(0)[1] == 99
        assert copy_vm.read_memory(DATA, 99) != bytes(99)
        assert copy_driver.ask(0, [(DATA, 3, True)]) == 3
        for bad in (
            {},
            {**state, "queues": []},
            {**state, "isr": None},
            {**state, "registers": {}},
        ):
            with pytest.raises(StateError):
                copy.load(bad)


def test_accesses_that_no_driver_makes_are_harmless(made: Made) -> None:
    vm, device, driver, _ = made
    if isinstance(device, VirtioPci):
        parts = [part.device for bar in device.function.bars for part in bar.parts]
    else:
        parts = [device, device.below, device.above, device.doorbells]
    for part in parts:
        for offset in (*range(0x120), 0xFFC, 0xFFF):
            for size in (1, 2, 4, 8):
                part.read(offset, size)
                part.write(offset, size, (1 << 8 * size) - 1)
                part.write(offset, size, 0)
    driver.device.set_status(0)
    driver.start(1)
    assert driver.ask(0, [(DATA, 8, True)]) == 8
    assert vm.read_memory(DATA, 8) != bytes(8)
