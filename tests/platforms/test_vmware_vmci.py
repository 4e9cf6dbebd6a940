"""VMCI: a driver that knows no more than Linux's headers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.platforms.vmci import (
    ALLOC,
    ANONYMOUS,
    CAPS,
    CONTROL,
    DATA_IN,
    DATA_OUT,
    DATAGRAM,
    DISABLE,
    FLAGS,
    GET_CONTEXT,
    HOST,
    ICR,
    IMR,
    IN_LOW,
    LINK,
    NOTIFY,
    OUT_LOW,
    PAGE,
    PAGE_SHIFT,
    PPN64,
    QUERY,
    RAM,
    RECEIVE,
    RESET,
    RESULT,
    SEND,
    SET_FLAGS,
    STATUS,
    SUBSCRIBE,
    TRANSFERS,
    UNLINK,
    UNSUBSCRIBE,
    Driver,
)

from tetrarch.errors import StateError
from tetrarch.pci.function import COMMAND


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
    assert driver.send(UNLINK, struct.pack("<II", driver.context + 1, 7)) == -21
    for page in (0, RAM // PAGE, 1 << 52, (1 << 64) - 1):
        assert driver.send(SET_FLAGS, struct.pack("<Q", page)) == -2
    assert driver.send(SET_FLAGS, b"\1\0") == -2
    assert driver.send(QUERY, struct.pack("<II", 1000, 0)) == -2
    assert driver.send(QUERY, struct.pack("<III", 2, 0, GET_CONTEXT)) == -2
    assert driver.send(QUERY, struct.pack("<6I", 4, 0, 5, 99, 3, 10)) == 0b1101
    assert driver.send(12, b"") == -1
    assert driver.send(1, b"", context=HOST) == -1  # nobody is there
    assert driver.send(1, b"", context=4) == -10
    assert driver.send(QUERY, b"", size=1 << 40) == -11
    # What follows one that is too long is part of it, until the answer is asked for.
    for byte in struct.pack("<IIIIQ", 0, GET_CONTEXT, *ANONYMOUS, 1 << 40) + bytes(100):
        driver.ports.write(DATA_OUT, 1, byte)
    assert driver.read(RESULT) == 0x1_0000_0000 - 11
    # One that is not whole is forgotten with the question for its answer.
    driver.send(QUERY, b"", size=8)
    assert driver.send(GET_CONTEXT, b"") == driver.context
    assert driver.read(DATA_IN) == 0xFFFFFFFF


def test_events_can_be_subscribed_to(driver: Driver) -> None:
    for question in (SUBSCRIBE, UNSUBSCRIBE):
        for event in (0, 3, 4):
            assert driver.send(question, struct.pack("<II", event, 0)) == 0
        assert driver.send(question, struct.pack("<II", 7, 0)) == -29
        assert driver.send(question, b"") == -2


def test_pages_are_as_wide_as_the_guest_says() -> None:
    driver = Driver(wide=False)
    driver.start()
    driver.link(7, 1)
    assert driver.device.ring((driver.context, 7))
    assert driver.flag(1) == 1
    assert driver.alloc((driver.context, 1), 1, 1, driver.pages(4)) == 4


def test_transfers_take_the_place_of_bytes() -> None:
    driver = Driver(transfers=True)
    driver.start()
    assert driver.read(PAGE_SHIFT) == 12
    driver.link(7, 1)
    assert driver.send(NOTIFY, struct.pack("<II", driver.context, 7)) == 0
    assert driver.flag(1) == 1
    driver.read(ICR)
    # Nothing is there to be fetched: the head of a datagram for nobody.
    header = struct.pack("<IIIIQQQQQ", 0, 1, 2, 0, 0, RECEIVE + PAGE, 16, RECEIVE + 2 * PAGE, 64)
    driver.vm.write_memory(RECEIVE, header)
    driver.write(IN_LOW, RECEIVE)
    assert driver.vm.read_memory(RECEIVE, 4) == b"\1\0\0\0"
    assert driver.vm.read_memory(RECEIVE + PAGE, 17) == b"\xff" * 16 + b"\0"
    assert driver.vm.read_memory(RECEIVE + 2 * PAGE, 9) == b"\xff" * 8 + b"\0"
    assert (driver.read(ICR), driver.wire.is_high()) == (4, False)
    # A datagram may come in pieces, too.
    datagram = struct.pack("<IIIIQ", 0, GET_CONTEXT, *ANONYMOUS, 0)
    driver.vm.write_memory(0x8000, datagram[:10])
    driver.vm.write_memory(0x9000, datagram[10:])
    driver.vm.write_memory(SEND, struct.pack("<IIIIQQQQQ", 1, 1, 2, 0, 0, 0x8000, 10, 0x9000, 14))
    driver.write(OUT_LOW, SEND)
    assert driver.read(RESULT) == driver.context


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<IIIIQ", 1, 2, 24, 0, 0),  # no such form
        struct.pack("<IIIIQ", 1, 0, 23, 0, 0),  # less than a head
        struct.pack("<IIIIQ", 1, 0, 0xFFFFFFFF, 0, 0),
        struct.pack("<IIIIQ", 1, 1, 65, 0, 0),  # too many pieces
        struct.pack("<IIIIQQQ", 1, 1, 1, 0, 0, RAM - 8, 24),
        struct.pack("<IIIIQQQ", 1, 1, 1, 0, 0, (1 << 64) - 8, 1 << 63),
        struct.pack("<IIIIQIIIIQ", 1, 0, 24, 0, 0, 0, GET_CONTEXT, *ANONYMOUS, 1),  # one too few
    ],
)
def test_transfers_that_cannot_be_are_refused(header: bytes) -> None:
    driver = Driver(transfers=True)
    driver.start()
    driver.vm.write_memory(SEND, header)
    driver.write(OUT_LOW, SEND)
    assert driver.read(RESULT) == 0xFFFFFFFE
    assert driver.vm.read_memory(SEND, 4) == bytes(4)
    driver.write(IN_LOW, SEND)
    driver.write(IN_LOW, 0xFFFF_FFF8)
    driver.write(OUT_LOW, 0xFFFF_FFF8)
    assert driver.send(GET_CONTEXT, b"") == driver.context


def test_queue_pairs_are_of_memory_that_is_there(driver: Driver) -> None:
    handle = (driver.context, 7)
    pages = driver.pages(6)
    for wrong in (
        {"pages": pages[:5]},
        {"pages": [*pages, 0x300]},
        {"pages": [*pages[:5], RAM // PAGE]},
        {"pages": [RAM // PAGE, *pages[1:]]},
        {"pages": [*pages[:5], 1 << 52]},
        {"pages": [*pages[:5], (1 << 64) - 1]},
        {"pages": pages, "count": 5},
        {"pages": pages, "count": 1 << 61},
        {"pages": pages, "flags": 0x10},
        {"pages": pages, "flags": 2},
    ):
        assert driver.alloc(handle, 2 * PAGE, 2 * PAGE, **wrong) == -2
    assert driver.alloc((driver.context, 0xFFFFFFFF), 2 * PAGE, 2 * PAGE, pages) == -2
    assert driver.alloc(handle, 0, 2 * PAGE, pages) == -24
    for size in (1 << 63, (1 << 64) - 1, 128 << 20):
        assert driver.alloc(handle, size, size, pages) == -19
    assert driver.alloc(handle, 2 * PAGE, 2 * PAGE, pages, flags=1) == -21
    assert driver.alloc((HOST, 7), 2 * PAGE, 2 * PAGE, pages) == -7
    assert driver.alloc(handle, 2 * PAGE, 2 * PAGE, pages, peer=77) == -7
    assert driver.send(ALLOC, b"short") == -2
    assert driver.detach(handle) == -21
    assert driver.alloc(handle, 2 * PAGE, PAGE + 1, pages) == 4
    assert driver.alloc(handle, 2 * PAGE, PAGE + 1, pages) == -22
    assert (driver.detach(handle), driver.detach(handle)) == (3, -21)
    driver.device.function.write_config(COMMAND, 2, 0)
    assert driver.alloc(handle, 2 * PAGE, 2 * PAGE, pages) == -20


def test_there_are_only_so_many_queue_pairs() -> None:
    driver = Driver(transfers=True)
    driver.start()
    pages = driver.pages(4)
    for number in range(2048):
        assert driver.alloc((driver.context, number), 1, 1, pages) == 4
    assert driver.alloc((driver.context, 2048), 1, 1, pages) == -19
    assert driver.detach((driver.context, 5)) == 3
    assert driver.alloc((driver.context, 2048), 1, 1, pages) == 4


def test_all_queue_pairs_together_have_only_so_many_bytes() -> None:
    driver = Driver(transfers=True)
    driver.start()
    size = 16 << 20
    pages = [0x300] * (2 * size // PAGE + 2)
    assert len(pages) * 8 < 17 * PAGE
    for number in range(4):
        assert driver.alloc((driver.context, number), size, size, pages) == 4
    assert driver.alloc((driver.context, 4), 1, 1, pages[:4]) == -19
    assert driver.detach((driver.context, 0)) == 3
    assert driver.alloc((driver.context, 4), 1, 1, pages[:4]) == 4


def test_there_are_no_more_doorbells_than_flags() -> None:
    driver = Driver(transfers=True)
    driver.start()
    for number in range(4096):
        assert driver.link(number + 100, 0) == 0
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
    assert driver.read(CAPS) == DATAGRAM | PPN64 | TRANSFERS
    driver.start()
    assert driver.send(QUERY, struct.pack("<IIII", 2, 0, GET_CONTEXT, LINK)) == 1
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
    # What is no state is refused, and leaves the device as after a reset.
    device = state["device"]
    for damage in (
        {"doorbells": [8, 5000]},
        {"doorbells": [8]},
        {"addresses": [0, 0, 1 << 40]},
        {"addresses": [0, 0, 1 << 60]},
        {"sent": [0] * 100_000},
        {"page": [0] * 100_000},
        {"interrupts": [1]},
        {"pairs": "none"},
    ):
        with pytest.raises(StateError, match="damaged"):
            other.device.load(state | {"device": device | damage})
        assert not other.device.ring((driver.context, 7))
    with pytest.raises(StateError, match="damaged"):
        other.device.load({"pci": state["pci"]})


def test_queue_pairs_of_a_saved_machine_are_without_another_end() -> None:
    driver = Driver(transfers=True)
    driver.start()
    handle = (driver.context, 7)
    assert driver.alloc(handle, PAGE, PAGE, driver.pages(4)) == 4
    other = Driver(transfers=True)
    other.context = driver.context
    other.device.load(driver.device.save())
    other.fetch()
    assert list(other.events) == [(2, 0, driver.context, 0)]  # all connections are gone
    assert other.alloc(handle, PAGE, PAGE, other.pages(4)) == -22
    assert (other.detach(handle), other.detach(handle)) == (3, -21)


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
