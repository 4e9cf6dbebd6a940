"""The memory balloon, by a driver that knows no more than the specification (5.5)."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.virtio.driver import Driver, Mmio, Pci, wait_until
from tests.virtio.host_memory import with_resident

from tetrarch._native import Vm
from tetrarch.errors import ConfigError, StateError
from tetrarch.virtio.balloon import DEFLATE_ON_OOM, REPORTING, STATS_VQ, BalloonKind
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import NEEDS_RESET

MIB = 1 << 20
MEMORY = 16 * MIB
PAGE = 4096

INFLATE, DEFLATE, STATS, HINTS, REPORTS = range(5)
#: Where the driver has its buffers, and the pages that it gives away.
BUFFER, PAGES = 0x40_0000, 0x80_0000

TOTAL, FREE = 5, 4


class Wire:
    gsi = 20

    def __init__(self) -> None:
        self.level = False

    def set(self, level: bool) -> None:
        self.level = level

    def pulse(self) -> None:
        pass


class BalloonDriver(Driver):
    def __init__(self, transport: str) -> None:
        vm, self.resident = with_resident(lambda: Vm("bt", MEMORY))
        self.kind = BalloonKind(vm, MEMORY)
        self.wire = Wire()
        if transport == "mmio":
            self.over: Any = VirtioMmio(self.kind, self.wire)
            super().__init__(vm, Mmio(self.over))
        else:
            self.over = VirtioPci(vm, self.kind)
            self.over.function.plug(self.wire)
            super().__init__(vm, Pci(self.over))

    def name_pages(self, queue: int, pages: list[int]) -> None:
        numbers = struct.pack(f"<{len(pages)}I", *pages)
        self.vm.write_memory(BUFFER, numbers)
        assert self.ask(queue, [(BUFFER, len(numbers), False)]) == 0

    def offer_statistics(self, values: list[tuple[int, int]], *, notify: bool = True) -> None:
        data = b"".join(struct.pack("<HQ", tag, value) for tag, value in values)
        self.vm.write_memory(BUFFER, data)
        self.offer(STATS, [(BUFFER, len(data), False)], notify=notify)


@pytest.fixture(params=["mmio", "pci"])
def driver(request: pytest.FixtureRequest) -> BalloonDriver:
    made = BalloonDriver(request.param)
    made.start(5, STATS_VQ | DEFLATE_ON_OOM | REPORTING)
    return made


def test_pages_of_the_balloon_are_the_hosts_until_they_are_used(driver: BalloonDriver) -> None:
    vm = driver.vm
    vm.write_memory(PAGES, b"\x55" * (4 * MIB))
    full = driver.resident()
    # From the far end to the near one, as Linux allocates them.
    numbers = list(range(PAGES // PAGE, (PAGES + 2 * MIB) // PAGE))[::-1]
    for at in range(0, len(numbers), 256):
        driver.name_pages(INFLATE, numbers[at : at + 256])
    assert driver.resident() <= full - 2 * MIB + PAGE
    assert vm.read_memory(PAGES, 2 * MIB) == bytes(2 * MIB)
    assert vm.read_memory(PAGES + 2 * MIB, 2 * MIB) == b"\x55" * (2 * MIB)
    driver.name_pages(DEFLATE, numbers[:256])
    vm.write_memory(PAGES, b"\x66" * (2 * MIB))
    assert driver.resident() >= full - PAGE
    assert vm.read_memory(PAGES, 2 * MIB) == b"\x66" * (2 * MIB)


@pytest.mark.parametrize(
    ("features", "queue"),
    [
        (STATS_VQ | REPORTING, REPORTS),
        (STATS_VQ | REPORTING, HINTS),  # Linux: where no hints are offered
        (REPORTING, STATS),  # and where it takes no statistics
    ],
)
def test_free_pages_that_are_reported_are_the_hosts(features: int, queue: int) -> None:
    driver = BalloonDriver("pci")
    driver.start(5, features)
    driver.vm.write_memory(PAGES, b"\x55" * (4 * MIB))
    full = driver.resident()
    pieces = [(PAGES, MIB, True), (PAGES + 2 * MIB, MIB, True)]
    driver.ask(queue, pieces)
    assert driver.resident() <= full - 2 * MIB + PAGE
    assert driver.vm.read_memory(PAGES, MIB) == bytes(MIB)
    assert driver.vm.read_memory(PAGES + MIB, MIB) == b"\x55" * MIB


def test_target_is_told_and_the_actual_size_heard(driver: BalloonDriver) -> None:
    device, kind = driver.device, driver.kind
    assert (kind.target, kind.actual, device.config(0, 4)) == (0, 0, 0)
    kind.target = 3 * MIB
    wait_until(lambda: driver.wire.level, "a change of the configuration")
    assert device.config(0, 4) == 3 * MIB // PAGE
    device.write_config(4, 4, 5)
    assert kind.actual == 5 * PAGE
    # The target is not the driver's, and what lies beyond is nobody's.
    device.write_config(0, 4, 77)
    for offset, size in ((6, 1), (8, 4), (0xF8, 8)):
        device.write_config(offset, size, 0)
    assert (kind.target, kind.actual) == (3 * MIB, 5 * PAGE)
    for wrong in (-1, MEMORY + 1):
        with pytest.raises(ConfigError):
            kind.target = wrong
    device.set_status(0)
    assert (kind.target, kind.actual) == (3 * MIB, 0)


def test_statistics_are_asked_anew_each_time(driver: BalloonDriver) -> None:
    driver.offer_statistics([(TOTAL, 1)])
    with ThreadPoolExecutor(1) as pool:
        for value in range(2, 6):
            answer = pool.submit(driver.kind.stats, 30)
            driver.wait(STATS)  # the device gives the buffer back
            driver.offer_statistics([(TOTAL, value), (FREE, value + 1), (999, 3)])
            assert answer.result(30) == {"total": value, "free": value + 1}
    assert driver.device.status() & NEEDS_RESET == 0


def test_statistics_can_be_wanted_before_there_is_a_driver() -> None:
    driver = BalloonDriver("pci")
    with pytest.raises(TimeoutError):
        driver.kind.stats(0)
    driver.start(5, STATS_VQ)
    driver.offer_statistics([(TOTAL, 1)])
    driver.wait(STATS)
    driver.kind.target = 0  # comes back when the device has ended its look at the queue
    driver.offer_statistics([(TOTAL, 2)], notify=False)
    # Nobody waits for it any more: who asks next has it, and the one after that a new one.
    assert driver.kind.stats(0) == {"total": 2}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(driver.kind.stats, 30)
        driver.wait(STATS)
        driver.offer_statistics([(TOTAL, 3)])
        assert answer.result(30) == {"total": 3}


def test_driver_without_statistics_is_waited_for_in_vain(driver: BalloonDriver) -> None:
    with pytest.raises(TimeoutError, match="has not answered"):
        driver.kind.stats(0.01)
    driver.start(2, 0)
    with pytest.raises(TimeoutError):
        driver.kind.stats(0.01)


def test_hostile_pages_harm_nobody(driver: BalloonDriver) -> None:
    vm = driver.vm
    wild = [0xFFFF_FFFF, 0xFFFF_FFFE, MEMORY // PAGE, 0xC_0000, 0xFEE00, PAGES // PAGE]
    vm.write_memory(PAGES, b"\x55" * (2 * PAGE))
    driver.name_pages(INFLATE, wild * 100)
    assert vm.read_memory(PAGES, 2 * PAGE) == bytes(PAGE) + b"\x55" * PAGE
    driver.name_pages(DEFLATE, wild)
    # Numbers that are none, buffers the wrong way round, the page of the list itself.
    assert driver.ask(INFLATE, [(BUFFER, 7, False)]) == 0
    assert driver.ask(INFLATE, [(BUFFER, 64, True)]) == 0
    assert driver.ask(REPORTS, [(PAGES + PAGE, PAGE, False)]) == 0
    assert driver.ask(REPORTS, [(PAGES + PAGE + 1, PAGE, True)]) == 0
    assert vm.read_memory(PAGES + PAGE, PAGE) == b"\x55" * PAGE
    driver.name_pages(INFLATE, [BUFFER // PAGE])
    # Its own rings: what it had there is gone, and no more than that.
    descriptors, available, used = driver.areas(DEFLATE)
    driver.name_pages(INFLATE, [area // PAGE for area in (descriptors, available, used)])
    driver.device.notify(DEFLATE)
    driver.offer(INFLATE, [(MEMORY - 4, 8, False)])
    wait_until(lambda: driver.device.status() & NEEDS_RESET, "the device sees it")
    driver.start(5, STATS_VQ)
    driver.name_pages(INFLATE, [PAGES // PAGE])
    assert driver.device.status() & NEEDS_RESET == 0


def test_statistics_of_any_form_are_taken_as_far_as_they_go(driver: BalloonDriver) -> None:
    vm = driver.vm
    vm.write_memory(BUFFER, b"\xff" * (2 * PAGE))
    with ThreadPoolExecutor(1) as pool:
        driver.offer(STATS, [(BUFFER, 2 * PAGE, False)])
        for chain in ([(BUFFER, 5, False)], [(BUFFER, 64, True)], [(BUFFER, 2 * PAGE, False)]):
            answer = pool.submit(driver.kind.stats, 30)
            driver.wait(STATS)
            driver.offer(STATS, chain)
            assert answer.result(30) == {}


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_saved_balloon_goes_on_in_another_machine(transport: str) -> None:
    driver = BalloonDriver(transport)
    driver.start(5, STATS_VQ | REPORTING)
    driver.kind.target = 2 * MIB
    driver.device.write_config(4, 4, 9)
    driver.name_pages(INFLATE, [PAGES // PAGE])
    driver.offer_statistics([(TOTAL, 1)])
    driver.vm.hold()  # with the buffer of statistics in the device's hands
    state, memory = driver.over.save(), driver.vm.read_memory(0, MEMORY)
    copy = BalloonDriver(transport)
    copy.vm.hold()
    copy.vm.write_memory(0, memory)
    copy.over.load(state)
    assert copy.over.save() == state
    names = ("_available", "_used", "_sizes", "_free")
    vars(copy).update({name: vars(driver)[name] for name in names})
    copy.vm.resume()
    assert (copy.kind.target, copy.kind.actual) == (2 * MIB, 9 * PAGE)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(copy.kind.stats, 30)
        copy.wait(STATS)
        copy.offer_statistics([(TOTAL, 8)])
        assert answer.result(30) == {"total": 8}
    copy.name_pages(DEFLATE, [PAGES // PAGE])
    for bad in ({}, {"target": -1, "actual": 0}, {"target": 0, "actual": 1 << 32}):
        with pytest.raises(StateError):
            copy.over.load({**state, "kind": bad})
