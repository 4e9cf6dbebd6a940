"""Keyboard, mouse and tablet by a driver in Python."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.virtio.driver import Driver, Mmio, wait_until
from tests.virtio.test_served import Wire

from tetrarch import Machine
from tetrarch._native import Vm
from tetrarch.errors import ConfigError, StateError
from tetrarch.testing import pvh_kernel
from tetrarch.virtio.input import InputDevice, InputKind
from tetrarch.virtio.mmio import VirtioMmio

DATA = 0x80_0000
EVENTS, STATUS = 0, 1
SYN = (0, 0, 0)

Make = Callable[[str], "Bench"]


class Bench:
    """A device of a model, and its driver."""

    def __init__(self, model: str, raised: list[BaseException]) -> None:
        self.vm = Vm("bt", 16 << 20)
        self.kind = InputKind(self.vm, model, "input0", raised.append)
        self.registers = VirtioMmio(self.kind, Wire())
        self.driver = Driver(self.vm, Mmio(self.registers))
        self.offered = 0

    @property
    def device(self) -> InputDevice:
        return self.kind.device

    def ask(self, select: int, subsel: int) -> bytes:
        over = self.driver.device
        over.write_config(0, 1, select)
        over.write_config(1, 1, subsel)
        assert (over.config(0, 1), over.config(1, 1)) == (select, subsel)
        return bytes(over.config(8 + at, 1) for at in range(over.config(2, 1)))

    def give(self, buffers: int, size: int = 8) -> None:
        for _ in range(buffers):
            place = DATA + 0x100 * (self.offered % 64)
            self.driver.offer(EVENTS, [(place, size, True)])
            self.offered += 1

    def take(self, count: int) -> list[tuple[Any, ...]]:
        """The next events."""
        found = []
        for _ in range(count):
            head, written = self.driver.wait(EVENTS)
            assert written == 8
            found.append(struct.unpack("<HHi", self.vm.read_memory(DATA + 0x100 * head, 8)))
        return found

    def light(self, *events: tuple[int, int, int]) -> None:
        self.vm.write_memory(DATA, b"".join(struct.pack("<HHi", *event) for event in events))
        self.driver.ask(STATUS, [(DATA, 8 * len(events), False)])


@pytest.fixture
def make() -> Iterator[Make]:
    benches: list[Bench] = []
    raised: list[BaseException] = []

    def make(model: str) -> Bench:
        benches.append(Bench(model, raised))
        return benches[-1]

    yield make
    for bench in benches:
        bench.kind.close()
    assert not raised


def bits(data: bytes) -> set[int]:
    number = int.from_bytes(data, "little")
    return {bit for bit in range(number.bit_length()) if number >> bit & 1}


def test_configuration_says_what_each_model_has(make: Make) -> None:
    keyboard, mouse, tablet = map(make, ("keyboard", "mouse", "tablet"))
    assert keyboard.ask(1, 0) == b"Tetrarch keyboard"
    assert tablet.ask(1, 0) == b"Tetrarch tablet"
    assert mouse.ask(2, 0) == b"input0"
    assert struct.unpack("<4H", mouse.ask(3, 0)) == (6, 0x1AF4, 2, 1)
    assert {1, 30, 57, 113, 248} <= bits(keyboard.ask(0x11, 1))
    assert max(bits(keyboard.ask(0x11, 1))) < 0x100
    assert bits(keyboard.ask(0x11, 0x11)) == {0, 1, 2}
    assert bits(keyboard.ask(0x11, 0x14)) == {0, 1}
    assert bits(mouse.ask(0x11, 1)) == set(range(0x110, 0x115))
    assert bits(mouse.ask(0x11, 2)) == {0, 1, 6, 8}
    assert bits(tablet.ask(0x11, 3)) == {0, 1}
    assert bits(tablet.ask(0x11, 2)) == {6, 8}
    assert struct.unpack("<5I", tablet.ask(0x12, 1)) == (0, 0x7FFF, 0, 0, 0)
    for bench, select, subsel in (
        (keyboard, 0, 0),
        (keyboard, 1, 1),
        (keyboard, 0x10, 0),
        (keyboard, 0x12, 0),
        (mouse, 0x11, 3),
        (tablet, 0x12, 2),
        (tablet, 0xFF, 0xFF),
    ):
        assert bench.ask(select, subsel) == b""


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 64) - 1))
    )
)
def test_configuration_takes_any_write(make: Make, writes: list[tuple[int, int, int]]) -> None:
    bench = make("tablet")
    expected = bytearray(2)
    for offset, size, value in writes:
        bench.registers.registers.write_config(offset, size, value)
        for at, byte in enumerate(value.to_bytes(8, "little")[:size], start=offset):
            if at < 2:
                expected[at] = byte
    config = bench.device.config
    assert len(config) == 136
    assert config[:2] == expected
    assert config[2] <= 128
    assert not any(config[8 + config[2] :])


def test_every_selection_has_an_answer(make: Make) -> None:
    for model in ("keyboard", "mouse", "tablet"):
        device = make(model).device
        for select in range(256):
            for subsel in range(256):
                device.write_config(0, bytes((select, subsel)))
                assert len(device.config) == 136


def test_reports_are_what_was_done(make: Make) -> None:
    keyboard, mouse, tablet = map(make, ("keyboard", "mouse", "tablet"))
    for bench in (keyboard, mouse, tablet):
        bench.driver.start(2)
        bench.give(32)
    assert keyboard.device.press("leftctrl", "c")
    assert keyboard.device.release("c")
    assert keyboard.take(5) == [(1, 29, 1), (1, 46, 1), SYN, (1, 46, 0), SYN]
    keyboard.device.type("A\n")
    down_up = [(1, 42, 1), SYN, (1, 30, 1), SYN, (1, 30, 0), SYN, (1, 42, 0), SYN]
    assert keyboard.take(12) == [*down_up, (1, 28, 1), SYN, (1, 28, 0), SYN]
    assert mouse.device.move(5, -7)
    assert mouse.device.key("left")
    assert mouse.device.scroll(-1)
    moved = [(2, 0, 5), (2, 1, -7), SYN]
    assert mouse.take(9) == [*moved, (1, 0x110, 1), SYN, (1, 0x110, 0), SYN, (2, 8, -1), SYN]
    assert tablet.device.move(0, 0x7FFF)
    assert tablet.take(3) == [(3, 0, 0), (3, 1, 0x7FFF), SYN]


def test_what_a_model_has_not_is_refused(make: Make) -> None:
    keyboard, mouse, tablet = (make(model).device for model in ("keyboard", "mouse", "tablet"))
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: keyboard.press("any"), "a keyboard has no 'any'"),
        (lambda: mouse.press("a"), "a mouse has no 'a'"),
        (lambda: keyboard.move(1, 1), "a keyboard has no event of type 0x2"),
        (lambda: keyboard.send((0x11, 0, 1)), "no event of type 0x11"),
        (lambda: keyboard.send((0, 0, 0)), "no event of type 0x0"),
        (lambda: tablet.move(0, 0x8000), "value is 32768"),
        (lambda: mouse.move(1 << 31, 0), "value is 2147483648"),
        (lambda: keyboard.type("aé"), "no key gives 'é'"),
    ]
    for call, words in refused:
        with pytest.raises(ConfigError, match=words):
            call()


def test_report_is_dropped_as_a_whole_or_comes_as_a_whole(make: Make) -> None:
    bench = make("mouse")
    assert not bench.device.move(1, 1), "there is no driver"
    bench.driver.start(2)
    sent = 0
    while bench.device.move(sent, 1):
        sent += 1
    assert sent == 1024 // 3
    # One event has room, which no report of a movement is.
    assert not bench.device.key("left")
    found: list[tuple[Any, ...]] = []
    while len(found) < 3 * sent:
        count = min(32, 3 * sent - len(found))
        bench.give(count)
        found += bench.take(count)
    assert found == [event for number in range(sent) for event in ((2, 0, number), (2, 1, 1), SYN)]
    assert bench.device.move(9, 9)
    bench.give(3)
    assert bench.take(3) == [(2, 0, 9), (2, 1, 9), SYN]


def test_text_waits_for_the_guest_and_says_where_it_does_not_come(make: Make) -> None:
    bench = make("keyboard")
    with pytest.raises(TimeoutError, match="has not taken the keys"):
        bench.device.type("a", timeout=0.01)
    bench.driver.start(2)
    with pytest.raises(TimeoutError):
        bench.device.type("a" * 257, timeout=0.01)
    bench.give(4)
    assert bench.take(4) == [(1, 30, 1), SYN, (1, 30, 0), SYN]
    bench.device.type("b")


def test_buffer_without_room_for_an_event_goes_back_empty(make: Make) -> None:
    bench = make("keyboard")
    bench.driver.start(2)
    bench.give(1, size=7)
    bench.give(2)
    assert bench.device.press("a")
    assert bench.driver.wait(EVENTS)[1] == 0
    assert bench.take(2) == [(1, 30, 1), SYN]


def test_leds_are_what_the_guest_has_lit(make: Make) -> None:
    bench = make("keyboard")
    bench.driver.start(2)
    bench.light((0x11, 1, 1), (0x11, 0, 1), (0x11, 3, 1), (0x14, 0, 250), (0x11, 0xFFFF, 1))
    assert bench.device.leds == {"caps", "num"}
    bench.light((0x11, 1, 0))
    assert bench.device.leds == {"num"}
    for length in (0, 7, 0x10_0000):
        bench.driver.ask(STATUS, [(DATA, length, False)] if length else [(DATA, 8, True)])
    bench.driver.start(2)
    assert bench.device.leds == frozenset(), "after a reset"


def test_reset_forgets_what_waits(make: Make) -> None:
    bench = make("keyboard")
    bench.driver.start(2)
    assert bench.device.press("a")
    bench.driver.start(2)
    bench.give(2)
    assert bench.device.press("b")
    assert bench.take(2) == [(1, 48, 1), SYN]


def test_saved_device_goes_on(make: Make) -> None:
    one, two = make("keyboard"), make("keyboard")
    one.driver.start(2)
    one.light((0x11, 2, 1))
    one.driver.device.write_config(0, 1, 1)
    assert one.device.press("a")
    state = one.kind.save()
    two.driver.start(2)
    two.kind.load(state)
    assert two.device.leds == {"scroll"}
    assert two.driver.device.config(2, 1) == len("Tetrarch keyboard")
    two.give(2)
    assert two.take(2) == [(1, 30, 1), SYN]
    for damaged in ({}, {"device": 7}, {"device": {**state["device"], "waiting": "x"}}):
        with pytest.raises(StateError):
            two.kind.load(damaged)


def test_events_of_a_held_machine_come_when_it_goes_on(make: Make) -> None:
    bench = make("keyboard")
    bench.driver.start(2)
    bench.give(4)
    bench.vm.hold()
    assert bench.device.press("a")
    assert bench.driver.used_index(EVENTS) == 0
    bench.vm.resume()
    wait_until(lambda: bench.driver.used_index(EVENTS) == 2, "the events")
    assert bench.take(2) == [(1, 30, 1), SYN]


def test_machine_has_those_that_it_is_given(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4\xeb\xfd"))  # hlt; jmp
    with Machine(engine="bt", kernel=kernel, memory="16M", input=["mouse", "keyboard"]) as vm:
        assert [device.model for device in vm.inputs] == ["mouse", "keyboard"]
    with Machine(engine="bt", kernel=kernel, memory="16M") as vm:
        assert vm.inputs == ()
    with pytest.raises(ConfigError, match="input: 'pen' is no input device; there are"):
        Machine(engine="bt", kernel=kernel, input="pen")  # type: ignore[arg-type]
