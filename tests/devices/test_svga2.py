"""VMware's SVGA II, by a driver that knows no more than Linux's header."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.devices.svga_driver import (
    ALPHA_CURSOR,
    ANY_FENCE,
    BUSY,
    DEFINE_CURSOR,
    ENABLE,
    FENCE,
    FIFO,
    GOAL,
    IRQMASK,
    LAST_FENCE,
    MIN,
    NEXT,
    PITCHLOCK,
    PROGRESS,
    RAM,
    RECT_COPY,
    STOP,
    STRIDE,
    SYNC,
    UPDATE,
    VRAM,
    WIDTH,
    Driver,
)

from tetrarch._native import EngineError, Vm, engine_available
from tetrarch.devices.svga2 import FIFO_BYTES, VRAM_BYTES
from tetrarch.display.frame import Rect
from tetrarch.errors import StateError
from tetrarch.pci.function import COMMAND, MEMORY_SPACE

LIMIT_S = 30


@pytest.fixture(params=["bt", "kvm"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    if reason := engine_available(request.param):
        pytest.skip(": ".join(reason))
    made = Driver(request.param)
    yield made
    made.device.close()


def test_registers_say_what_there_is(driver: Driver) -> None:
    function = driver.function
    assert function.read_config(0, 4) == 0x0405_15AD
    for bar, size in ((0x10, 16), (0x14, VRAM_BYTES), (0x18, FIFO_BYTES)):
        before = function.read_config(bar, 4)
        function.write_config(bar, 4, 0xFFFF_FFFF)
        assert -(function.read_config(bar, 4) & ~0xF) & 0xFFFF_FFFF == size
        function.write_config(bar, 4, before)
    assert driver.read(13) == VRAM
    assert driver.read(18) == FIFO
    assert driver.read(15) == VRAM_BYTES
    assert (driver.read(7), driver.read(6), driver.read(9)) == (32, 24, 0xFF_0000)
    assert driver.read(17) & 0x6_8022 == 0x6_8022
    driver.write(0, 0x9000_0003)  # SVGA 3
    assert driver.read(0) == 0x9000_0002
    driver.write(1024 + 768, 77)
    assert driver.read(1024 + 768) == 77
    assert driver.read(0xFFFF_FFFF) == 0


def test_what_is_drawn_is_shown_where_it_was_told(driver: Driver) -> None:
    assert driver.device.look() is None
    driver.start()
    points, parts = driver.look()
    assert (len(points), parts) == (4 * 64 * 32, None)
    driver.draw(3, 2, 0x11_2233, 0x44_5566)
    same, parts = driver.look()
    assert same is points
    assert parts == []
    driver.send(UPDATE, 3, 2, 2, 1)
    points, parts = driver.look()
    assert parts == [Rect(3, 2, 2, 1)]
    assert points[4 * (2 * 64 + 3) :][:8] == bytes.fromhex("33221100 66554400")
    driver.write(WIDTH, 32)
    assert driver.look()[1] is None
    driver.write(ENABLE, 3)  # hidden
    assert driver.device.look() is None
    assert driver.device.still() is None


def test_lines_may_be_longer(driver: Driver) -> None:
    driver.start()
    driver.write(PITCHLOCK, 512)
    assert driver.read(STRIDE) == 512
    driver.draw(0, 1, 1)
    points, _ = driver.look()
    assert points[4 * 64] == 1
    driver.write(PITCHLOCK, VRAM_BYTES)  # no place for all of it
    assert driver.device.look() is None
    driver.write(PITCHLOCK, 3)
    assert driver.read(STRIDE) == 256


@pytest.mark.parametrize("to", [(8, 5), (3, 1), (3, 3), (2, 2), (4, 2)])
def test_parts_are_copied_over_each_other(driver: Driver, to: tuple[int, int]) -> None:
    driver.start(16, 12)
    picture = {(x, y): 100 * y + x for x in range(16) for y in range(12)}
    for y in range(12):
        driver.draw(0, y, *(picture[x, y] for x in range(16)))
    driver.send(RECT_COPY, 3, 2, *to, 5, 4)
    copied = {(to[0] + x, to[1] + y): picture[3 + x, 2 + y] for x in range(5) for y in range(4)}
    points, _ = driver.look()
    want = [(picture | copied)[x, y] for y in range(12) for x in range(16)]
    assert struct.unpack("<192I", points) == tuple(want)
    for outside in ((12, 0, 0, 0, 5, 1), (0, 0, 0, 9, 1, 4), (0xFFFF_FFFF, 0, 0, 0, 2, 1)):
        driver.send(RECT_COPY, *outside)
    assert driver.look()[0] == points


def test_one_access_copies_no_more_than_a_moment_takes(driver: Driver) -> None:
    driver.start(640, 400)
    driver.draw(0, 0, 7)
    for _ in range(100):
        driver.send(RECT_COPY, 0, 0, 0, 1, 640, 399, sync=False)  # nearly 1 MiB
    driver.send(FENCE, 1, sync=False)
    accesses = 1
    driver.write(SYNC, 1)
    while driver.read(BUSY):
        assert driver.word(LAST_FENCE) == 0
        accesses += 1
    assert driver.word(LAST_FENCE) == 1
    assert driver.word(STOP) == driver.word(NEXT)
    assert accesses == 3
    points, _ = driver.look()
    column = [int.from_bytes(points[2560 * y : 2560 * y + 4], "little") for y in range(400)]
    assert column == [7] * 101 + [0] * 299


def test_fences_pass_and_interrupt_who_waits(driver: Driver) -> None:
    driver.start()
    driver.send(FENCE, 5)
    assert driver.word(LAST_FENCE) == 5
    assert not driver.wire.is_high()
    driver.write(IRQMASK, ANY_FENCE | GOAL)
    driver.set_words(289, 7)
    driver.send(FENCE, 6)
    assert driver.wire.is_high()
    assert driver.ports.read(8, 4) == ANY_FENCE
    driver.ports.write(8, 4, ANY_FENCE)
    assert not driver.wire.is_high()
    driver.send(FENCE, 7)
    assert driver.ports.read(8, 4) == ANY_FENCE | GOAL
    driver.write(IRQMASK, 0)
    assert not driver.wire.is_high()
    driver.write(IRQMASK, PROGRESS)
    driver.send(UPDATE, 0, 0, 1, 1)
    assert driver.ports.read(8, 4) & PROGRESS


def test_commands_go_around_and_may_come_in_pieces(driver: Driver) -> None:
    driver.start()
    for number in range(1, 40_000, 7):
        driver.send(FENCE, number)
    assert driver.word(LAST_FENCE) == number
    at = driver.word(NEXT)
    driver.send(FENCE, sync=False)
    driver.write(SYNC, 1)
    assert driver.word(STOP) == at
    driver.send(99)
    assert driver.word(LAST_FENCE) == 99


def test_cursor_is_a_picture_of_its_own(driver: Driver) -> None:
    driver.start()
    driver.set_words(9, 1)  # it is on
    assert driver.device.cursor() is None
    driver.send(ALPHA_CURSOR, 0, 1, 0, 2, 1, 0x8011_2233, 0xFF44_5566)
    cursor = driver.device.cursor()
    assert cursor is not None
    assert (cursor.width, cursor.height, cursor.x, cursor.y) == (2, 1, 1, 0)
    assert cursor.points == bytes.fromhex("33221180 665544ff")
    # Of masks: kept, white, black, turned over.
    driver.send(DEFINE_CURSOR, 0, 0, 0, 4, 1, 1, 1, 0b1001_0000, 0b0101_0000)
    cursor = driver.device.cursor()
    assert cursor is not None
    assert cursor.points == bytes.fromhex("00000000 ffffffff 000000ff 000000ff")
    driver.set_words(9, 0)
    assert driver.device.cursor() is None
    driver.send(ALPHA_CURSOR, 0, 0, 0, 0x1_0000, 0x1_0000)  # passed over with what is behind it


def test_command_that_there_is_not_ends_what_is_behind_it(driver: Driver) -> None:
    driver.start()
    driver.send(FENCE, 1, 0xDEAD, FENCE, 2)
    assert driver.word(LAST_FENCE) == 1
    driver.send(FENCE, 3)
    assert driver.word(LAST_FENCE) == 3


def ram_at(vm: Vm, address: int) -> bool:
    return any(first <= address <= last for first, last, _ in vm.mmio_regions())


def test_memory_goes_where_its_register_goes(driver: Driver) -> None:
    driver.start()
    driver.draw(0, 0, 0xABCD)
    driver.place(0xD100_0000, 0xD900_0000)
    assert driver.vm.read_memory(0xD100_0000, 2) == b"\xcd\xab"
    end = time.monotonic() + LIMIT_S
    while ram_at(driver.vm, VRAM):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ram_at(driver.vm, 0xD100_0000)
    driver.send(FENCE, 3)
    assert driver.word(LAST_FENCE) == 3
    # It is no RAM of the machine's.
    assert driver.vm.ram == [(0, RAM)]
    driver.function.write_config(COMMAND, 2, 0)
    while ram_at(driver.vm, 0xD100_0000):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert driver.look()[0][:2] == b"\xcd\xab"


def test_memory_that_is_asked_for_its_size_stays(driver: Driver) -> None:
    for _ in range(50):
        driver.function.write_config(COMMAND, 2, 0)
        driver.function.write_config(0x14, 4, 0xFFFF_FFFF)
        driver.function.write_config(0x14, 4, VRAM)
        driver.function.write_config(COMMAND, 2, MEMORY_SPACE)
        driver.vm.read_memory(VRAM, 1)
    time.sleep(0.2)
    assert ram_at(driver.vm, VRAM)


def test_memory_upon_something_else_is_nowhere(driver: Driver) -> None:
    driver.place(0, FIFO)
    driver.device.vram.map(0)  # RAM is there
    assert driver.vm.read_memory(0, 4) == bytes(4)
    driver.device.vram.write(0, b"kept")
    assert driver.device.vram.read(0, 4) == b"kept"
    with pytest.raises(EngineError):
        driver.vm.add_memory(FIFO, 4096)


def test_state_goes_on_in_another(driver: Driver) -> None:
    driver.start()
    driver.draw(1, 1, 0x77)
    driver.set_words(9, 1)
    driver.send(ALPHA_CURSOR, 0, 0, 0, 1, 1, 0xFF00_0000)
    driver.write(IRQMASK, ANY_FENCE)
    driver.send(FENCE, 4)
    state = driver.device.save()
    other = Driver()
    other.device.load(state)
    assert other.wire.is_high()
    assert other.look()[0] == driver.look()[0]
    assert other.word(LAST_FENCE) == 4
    assert other.vm.read_memory(VRAM + 260, 1) == b"\x77"
    cursor = other.device.cursor()
    assert cursor is not None
    assert cursor.points == b"\0\0\0\xff"
    for part, wrong in (
        ("vram", None),
        ("vram", "no base 64"),
        ("fifo", state["vram"]),
        ("cursor", {"size": [1, 1, 0, 300], "points": ""}),
        ("cursor", None),
        ("registers", {}),
    ):
        with pytest.raises(StateError):
            other.device.load({**state, part: wrong})
    driver.device.reset()
    assert driver.device.look() is None
    other.device.close()


numbers = st.one_of(
    st.integers(0, 40),
    st.sampled_from([0xFFFF_FFFF, 1 << 31, 4096, 1 << 18]),
    st.integers(0, 1 << 32),
).map(lambda number: number & 0xFFFF_FFFF)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    registers=st.lists(st.tuples(numbers, numbers), max_size=8),
    head=st.lists(numbers, min_size=4, max_size=4),
    words=st.lists(numbers, max_size=60),
    sane=st.booleans(),
)
def test_nothing_that_a_driver_does_is_too_much(
    driver: Driver,
    registers: list[tuple[int, int]],
    head: list[int],
    words: list[int],
    sane: bool,
) -> None:
    driver.device.reset()
    driver.place(VRAM, FIFO)
    driver.start()
    for register, value in registers:
        driver.write(register, value)
        driver.read(register)
    if sane:
        driver.set_words(MIN, 4096, FIFO_BYTES, 4096 + 4 * len(words), 4096)
    else:
        driver.set_words(MIN, *head)
    driver.set_words(1024, *words)
    driver.write(SYNC, 1)
    driver.device.look()
    driver.device.still()
    driver.device.cursor()
