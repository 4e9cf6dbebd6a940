"""VMCI: a driver that knows no more than Linux's headers."""

from __future__ import annotations

import struct
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.storage.wire import Wire

from tetrarch._native import Vm
from tetrarch.errors import StateError
from tetrarch.machine.engine_vm import InterruptWire
from tetrarch.pci.function import BUS_MASTER, COMMAND
from tetrarch.platforms.vmware.vmci import Vmci

STATUS, CONTROL, ICR, IMR, DATA_OUT, DATA_IN, CAPS, RESULT, RESULT_HIGH = range(0, 36, 4)
RESET, ENABLE, DISABLE = 1, 2, 4
DATAGRAM, NOTIFICATIONS, PPN64 = 4, 8, 16
QUERY, GET_CONTEXT, SET_FLAGS, LINK, UNLINK, NOTIFY = range(6)
ANONYMOUS = (0xFFFFFFFF, 0xFFFFFFFF)
RAM = 1 << 20
FLAGS = 0x40
"""The page of the flags."""


class Driver:
    def __init__(self, *, notifications: bool = True) -> None:
        self.vm = Vm("bt", RAM, translate=False)
        self.device = Vmci(self.vm, notifications=notifications)
        self.wire = Wire()
        self.device.function.plug(cast(InterruptWire, self.wire))
        self.device.function.write_config(COMMAND, 2, BUS_MASTER)
        (part,) = self.device.function.bars[0].parts
        self.ports = part.device

    def read(self, register: int) -> int:
        return self.ports.read(register, 4)

    def write(self, register: int, value: int) -> None:
        self.ports.write(register, 4, value)

    def send(self, resource: int, payload: bytes, context: int = 0, size: int | None = None) -> int:
        """The answer, with its sign."""
        length = len(payload) if size is None else size
        header = struct.pack("<IIIIQ", context, resource, *ANONYMOUS, length)
        for byte in header + payload:
            self.ports.write(DATA_OUT, 1, byte)
        low, high = self.read(RESULT), self.read(RESULT_HIGH)
        assert high == (0xFFFFFFFF if low >> 31 else 0)
        (result,) = struct.unpack("<i", struct.pack("<I", low))
        assert isinstance(result, int)
        return result

    def start(self) -> None:
        """As Linux's driver does."""
        capabilities = self.read(CAPS)
        assert capabilities & DATAGRAM
        self.write(CAPS, capabilities)
        assert self.send(SET_FLAGS, struct.pack("<Q", FLAGS)) == 0
        assert self.send(QUERY, struct.pack("<II", 1, GET_CONTEXT)) == 1
        self.write(IMR, 1 | 2)
        self.write(CONTROL, ENABLE)
        assert self.read(STATUS) == 1
        self.context = self.send(GET_CONTEXT, b"")

    def link(self, resource: int, flag: int) -> int:
        return self.send(LINK, struct.pack("<IIQ", self.context, resource, flag))

    def flag(self, number: int) -> int:
        (value,) = self.vm.read_memory(FLAGS * 4096 + number, 1)
        return value


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.start()
    return driver


def test_doorbell_sets_its_flag_and_raises_an_interrupt(driver: Driver) -> None:
    assert driver.context > 2  # those are the hypervisor's and the host's
    assert driver.link(7, 20) == 0
    assert driver.device.ring((driver.context, 7))
    assert (driver.flag(20), driver.flag(19), driver.wire.is_high()) == (1, 0, True)
    # Read, it is acknowledged.
    assert (driver.read(ICR), driver.read(ICR), driver.wire.is_high()) == (2, 0, False)
    # The guest may ring its own.
    handle = struct.pack("<II", driver.context, 7)
    assert (driver.send(NOTIFY, handle), driver.read(ICR)) == (0, 2)
    assert driver.send(UNLINK, handle) == 0
    assert not driver.device.ring((driver.context, 7))
    assert (driver.send(UNLINK, handle), driver.send(NOTIFY, handle)) == (-21, -21)


def test_interrupts_are_masked_and_switched_off(driver: Driver) -> None:
    driver.link(7, 0)
    driver.write(IMR, 1)
    driver.device.ring((driver.context, 7))
    assert not driver.wire.is_high()
    driver.write(IMR, 2)
    assert driver.wire.is_high()
    driver.write(CONTROL, DISABLE)
    assert (driver.wire.is_high(), driver.read(STATUS)) == (False, 0)


def test_what_cannot_be_is_refused(driver: Driver) -> None:
    assert driver.link(7, 4095) == 0
    assert (driver.link(7, 1), driver.link(8, 4096)) == (-22, -2)
    assert driver.send(LINK, struct.pack("<IIQ", driver.context + 1, 8, 1)) == -2
    for page in (0, RAM // 4096, 1 << 52, (1 << 64) - 1):
        assert driver.send(SET_FLAGS, struct.pack("<Q", page)) == -2
    assert driver.send(SET_FLAGS, b"\1\0") == -2
    assert driver.send(QUERY, struct.pack("<I", 1000)) == -2
    assert driver.send(QUERY, struct.pack("<IIIII", 4, 5, 99, 3, 10)) == 0b0101
    assert driver.send(10, b"", size=0) == -1  # queue pairs
    assert driver.send(0, b"", context=2) == -10
    assert driver.send(QUERY, b"", size=1 << 40) == -11
    # One that is not whole is forgotten with the question for its answer.
    driver.send(QUERY, b"", size=8)
    assert driver.send(GET_CONTEXT, b"") == driver.context
    assert driver.read(DATA_IN) == 0xFFFFFFFF


def test_there_are_no_more_doorbells_than_flags(driver: Driver) -> None:
    for number in range(4096):
        driver.device._doorbells[driver.context, number + 100] = 0
    assert driver.link(7, 1) == -19


def test_reset_forgets_all(driver: Driver) -> None:
    driver.link(7, 3)
    driver.write(CONTROL, RESET)
    assert not driver.device.ring((driver.context, 7))
    assert (driver.read(STATUS), driver.read(IMR)) == (0, 0)
    driver.start()
    assert driver.link(7, 3) == 0
    driver.device.reset()
    assert not driver.device.ring((driver.context, 7))


def test_device_without_the_bus_leaves_memory_alone(driver: Driver) -> None:
    driver.link(7, 3)
    driver.device.function.write_config(COMMAND, 2, 0)
    assert not driver.device.ring((driver.context, 7))
    assert driver.flag(3) == 0


def test_nobody_rings_where_notifications_are_not_offered() -> None:
    driver = Driver(notifications=False)
    assert driver.read(CAPS) == DATAGRAM | PPN64
    assert driver.send(QUERY, struct.pack("<III", 2, GET_CONTEXT, LINK)) == 1
    assert driver.send(SET_FLAGS, struct.pack("<Q", FLAGS)) == -1


def test_saved_device_goes_on(driver: Driver) -> None:
    driver.link(7, 3)
    for byte in struct.pack("<II", 0, GET_CONTEXT):  # half a question
        driver.ports.write(DATA_OUT, 1, byte)
    state = driver.device.save()
    other = Driver()
    other.device.load(state)
    assert other.device.ring((driver.context, 7))
    assert (other.flag(3), other.wire.is_high()) == (1, True)
    for byte in struct.pack("<IIQ", *ANONYMOUS, 0):
        other.ports.write(DATA_OUT, 1, byte)
    assert other.read(RESULT) == driver.context
    with pytest.raises(StateError):
        other.device.load({"registers": {"device": "vmci", "version": 1}, "pci": state["pci"]})
    # A flag that is none, and a page that is not there, are not taken.
    state["registers"] |= {"doorbells": [3, 7, 5000, 3, 8], "flags_page": 1 << 40}
    other.device.load(state)
    assert not other.device.ring((driver.context, 7))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(range(0, 64, 4)) | st.just(DATA_OUT),
            st.sampled_from([1, 2, 4]),
            st.integers(0, 0xFFFFFFFF) | st.sampled_from([0, 1, 2, 3, 4, 5, 24]),
            st.booleans(),
        ),
        max_size=120,
    ),
    st.binary(max_size=100),
)
def test_any_accesses_leave_the_device_whole(
    accesses: list[tuple[int, int, int, bool]], data: bytes
) -> None:
    driver = Driver()
    driver.start()
    driver.link(7, 9)
    for register, size, value, write in accesses:
        if write:
            driver.ports.write(register, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= driver.ports.read(register, size) < 1 << 8 * size
    for byte in data:
        driver.ports.write(DATA_OUT, 1, byte)
    driver.device.ring((driver.context, 7))
    driver.device.load(driver.device.save())
    driver.write(CONTROL, RESET)
    driver.read(RESULT)
    driver.start()
