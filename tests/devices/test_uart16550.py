"""The UART, driven as Linux's 8250 driver does and by the data sheet."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.devices.uart_model import ModelUart

from tetrarch.devices import Uart16550
from tetrarch.errors import StateError

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR


class Line:
    def __init__(self) -> None:
        self.level = False
        self.edges = 0

    def set(self, level: bool) -> None:
        assert level != self.level
        self.level = level
        self.edges += level


def model(line: Line) -> ModelUart:
    return ModelUart(line.set)


KINDS: list[Any] = [Uart16550, model]


class Bench:
    def __init__(self, make: Callable[[Line], Any]) -> None:
        self.make = make
        self.line = Line()
        self.uart = make(self.line)
        self._sent = bytearray()

    @property
    def sent(self) -> bytes:
        self._sent += self.uart.take_output()
        return bytes(self._sent)

    def raised(self) -> bool:
        return self.line.level

    def get(self, offset: int) -> int:
        value: int = self.uart.read(offset, 1)
        return value

    def put(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)


@pytest.fixture(params=KINDS, ids=["rust", "model"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_linux_autoconfig_finds_a_16550a(bench: Bench) -> None:
    # drivers/tty/serial/8250/8250_port.c, autoconfig() and autoconfig_16550a(), step by step.
    bench.put(IER, 0)
    assert bench.get(IER) & 0x0F == 0
    bench.put(IER, 0x0F)
    assert bench.get(IER) & 0x0F == 0x0F
    bench.put(IER, 0)

    bench.put(MCR, 0x10 | 0x0A)
    assert bench.get(MSR) & 0xF0 == 0x90
    bench.put(MCR, 0)

    bench.put(LCR, 0xBF)
    bench.put(FCR, 0)  # EFR on later chips
    bench.put(LCR, 0)
    bench.put(FCR, 1)
    assert bench.get(IIR) >> 6 == 3
    bench.put(LCR, 0x80)
    assert bench.get(IIR) != 0  # no EFR: not a 16650
    bench.put(LCR, 0xBF)
    assert bench.get(IIR) != 0

    bench.put(LCR, 0)
    bench.put(FCR, 1)
    without = bench.get(IIR) >> 5
    bench.put(FCR, 0)
    bench.put(LCR, 0x80)
    bench.put(FCR, 0x21)
    assert (without, bench.get(IIR) >> 5) == (6, 6)  # no 64-byte FIFO: not a TI16750
    bench.put(LCR, 0)
    bench.put(IER, 0x40)
    assert not bench.get(IER) & 0x40  # no UUE bit: not an XScale


def test_linux_thre_and_txen_tests_find_no_bugs(bench: Bench) -> None:
    for _ in range(2):
        bench.put(IER, 0x02)
        assert bench.get(IIR) & 0x0F == 0x02
        bench.put(IER, 0)
    bench.put(IER, 0x02)
    assert bench.get(LSR) & 0x60 == 0x60
    assert not bench.get(IIR) & 1
    bench.put(IER, 0)


def test_transmitted_bytes_reach_the_output_in_order(bench: Bench) -> None:
    for byte in b"hello":
        bench.put(DATA, byte)
    assert bench.sent == b"hello"


def test_thre_interrupt_goes_by_reading_iir_and_comes_by_writing(bench: Bench) -> None:
    bench.put(IER, 0x02)
    assert bench.raised()
    assert bench.get(IIR) == 0x02
    assert not bench.raised()
    assert bench.get(IIR) == 0x01
    bench.put(DATA, 0x41)
    assert bench.raised()
    assert bench.line.edges == 2


def test_received_data_interrupts_until_it_is_read(bench: Bench) -> None:
    bench.put(FCR, 0x01)
    bench.put(IER, 0x01)
    bench.uart.receive(b"ab")
    assert bench.raised()
    assert bench.get(IIR) == 0xC4
    assert bench.get(LSR) & 1
    assert [bench.get(DATA), bench.get(DATA)] == [*b"ab"]
    assert not bench.raised()
    assert not bench.get(LSR) & 1


def test_below_the_trigger_level_it_is_a_timeout(bench: Bench) -> None:
    bench.put(FCR, 0xC1)  # 14 bytes
    bench.put(IER, 0x01)
    bench.uart.receive(b"x" * 13)
    assert bench.get(IIR) == 0xCC
    bench.uart.receive(b"x")
    assert bench.get(IIR) == 0xC4


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x47, 4), (0x87, 8), (0xC7, 14)])
@pytest.mark.parametrize("loop", [False, True])
def test_at_the_trigger_level_it_is_received_data(
    bench: Bench, fcr: int, level: int, loop: bool
) -> None:
    bench.put(MCR, 0x1B if loop else 0x0B)
    bench.put(FCR, fcr)
    bench.put(IER, 0x01)
    for count in range(1, level + 1):
        if loop:
            bench.put(DATA, count)
        else:
            bench.uart.receive(b"x")
        assert bench.get(IIR) == (0xC4 if count >= level else 0xCC)


def test_break_goes_through_the_loop(bench: Bench) -> None:
    bench.put(FCR, 0x01)
    bench.put(IER, 0x04)
    bench.put(MCR, 0x10)
    bench.put(DATA, 0x41)
    bench.put(LCR, 0x43)  # break, held for a while
    bench.put(LCR, 0x43)
    assert bench.get(IIR) == 0xC1  # errors are told when their byte comes to the top
    assert bench.get(LSR) == 0x80 | 0x61
    assert bench.get(DATA) == 0x41
    assert bench.get(IIR) == 0xC6
    assert bench.get(LSR) == 0x80 | 0x61 | 0x18
    assert bench.get(LSR) == 0x61
    assert (bench.get(DATA), bench.get(LSR)) == (0, 0x60)


def test_break_without_the_loop_goes_out_and_is_not_received(bench: Bench) -> None:
    bench.put(LCR, 0x43)
    assert bench.get(LSR) == 0x60


def test_line_is_driven_whatever_out2_says(bench: Bench) -> None:
    # A PC's board gates it; small guests forget that, so ours does not.
    bench.put(MCR, 0x03)
    bench.put(IER, 0x01)
    bench.uart.receive(b"x")
    assert bench.raised()


def test_interrupts_come_by_priority(bench: Bench) -> None:
    bench.put(FCR, 0x01)
    bench.put(MCR, 0x1F)
    for _ in range(17):
        bench.put(DATA, ord("x"))  # one more than the FIFO holds
    bench.put(MCR, 0x0F)  # loop left: modem inputs have changed
    bench.put(IER, 0x0F)
    assert bench.get(IIR) == 0xC6
    assert bench.get(LSR) & 0x02
    assert bench.get(IIR) == 0xC4
    for _ in range(16):
        bench.get(DATA)
    assert bench.get(IIR) == 0xC2
    assert bench.get(IIR) == 0xC0
    bench.get(MSR)
    assert bench.get(IIR) == 0xC1
    assert not bench.raised()


def test_overrun_without_fifo_keeps_the_newest_byte(bench: Bench) -> None:
    bench.put(MCR, 0x10)
    bench.put(DATA, ord("a"))
    bench.put(DATA, ord("b"))
    assert bench.get(LSR) & 0x03 == 0x03
    assert bench.get(LSR) & 0x03 == 0x01
    assert bench.get(DATA) == ord("b")


def test_overrun_with_fifo_keeps_the_oldest_bytes(bench: Bench) -> None:
    bench.put(MCR, 0x10)
    bench.put(FCR, 0x01)
    for byte in range(20):
        bench.put(DATA, byte)
    assert bench.get(LSR) & 0x02
    assert [bench.get(DATA) for _ in range(16)] == list(range(16))


def test_input_beyond_the_fifo_waits_and_nothing_is_lost(bench: Bench) -> None:
    text = bytes(range(256)) * 8
    bench.put(FCR, 0x01)
    bench.uart.receive(text)
    got = bytearray()
    while bench.get(LSR) & 0x01:
        got.append(bench.get(DATA))
    assert got == text
    assert bench.uart.queued == 0
    assert not bench.get(LSR) & 0x02


def test_input_before_the_driver_starts_is_not_lost(bench: Bench) -> None:
    bench.uart.receive(b"early input")
    # As Linux: probe with MCR, port startup clears the FIFOs and throws a byte away,
    # then raises DTR and RTS.
    bench.put(MCR, 0)
    bench.put(FCR, 0x01)
    bench.put(FCR, 0x07)
    bench.put(FCR, 0x00)
    bench.get(LSR)
    bench.get(DATA)
    bench.put(FCR, 0x81)
    bench.put(IER, 0x05)
    bench.put(MCR, 0x0B)
    got = bytearray()
    while bench.get(LSR) & 0x01:
        got.append(bench.get(DATA))
    assert got == b"early input"


def test_without_rts_nothing_is_received(bench: Bench) -> None:
    bench.put(MCR, 0x01)
    bench.uart.receive(b"x")
    assert not bench.get(LSR) & 0x01
    bench.put(MCR, 0x03)
    assert bench.get(LSR) & 0x01


def test_guest_that_only_enables_the_interrupt_receives(bench: Bench) -> None:
    # As xv6: MCR 0, IER 1.
    bench.put(MCR, 0)
    bench.uart.receive(b"x")
    bench.put(IER, 0x01)
    assert bench.raised()
    assert bench.get(DATA) == ord("x")


def test_guest_that_only_polls_receives(bench: Bench) -> None:
    # As OVMF: MCR 0, IER 0, and LSR is read until there is something.
    bench.put(FCR, 0x01)
    bench.put(MCR, 0)
    bench.uart.receive(b"key")
    for _ in range(3):
        assert not bench.get(LSR) & 0x01
    bench.put(IER, 0)
    reads = 0
    while not bench.get(LSR) & 0x01:
        reads += 1
        assert reads < 100
    assert reads > 3
    assert [bench.get(DATA) for _ in range(3)] == list(b"key")


def test_loopback_returns_what_is_sent_and_sends_nothing(bench: Bench) -> None:
    bench.put(FCR, 0x01)
    bench.put(MCR, 0x10)
    bench.put(DATA, 0x5A)
    assert bench.get(DATA) == 0x5A
    assert bench.sent == b""


def test_modem_status_deltas_clear_by_reading(bench: Bench) -> None:
    bench.put(MCR, 0x10)
    bench.get(MSR)
    bench.put(MCR, 0x14)  # OUT1 raises RI: no trailing edge yet
    assert bench.get(MSR) == 0x40
    bench.put(MCR, 0x10)
    assert bench.get(MSR) == 0x04
    assert bench.get(MSR) == 0x00


def test_divisor_latch_hides_data_and_ier(bench: Bench) -> None:
    bench.put(LCR, 0x83)
    bench.put(DATA, 0x0C)
    bench.put(IER, 0x01)
    assert (bench.get(DATA), bench.get(IER)) == (0x0C, 0x01)
    bench.put(LCR, 0x03)
    assert bench.get(IER) == 0
    assert bench.sent == b""


def test_scratch_register_keeps_its_value(bench: Bench) -> None:
    bench.put(SCR, 0xA5)
    assert bench.get(SCR) == 0xA5


def test_wide_access_is_a_row_of_byte_accesses(bench: Bench) -> None:
    bench.uart.write(DATA, 2, 0x0241)
    assert bench.sent == b"A"
    assert bench.get(IER) == 0x02
    assert bench.uart.read(SCR, 2) == 0xFF00


@pytest.mark.parametrize("make", KINDS, ids=["rust", "model"])
def test_saved_state_continues_where_it_was(bench: Bench, make: Any) -> None:
    bench.put(FCR, 0x01)
    bench.put(IER, 0x01)
    bench.uart.receive(b"0123456789abcdefgh")
    other = Bench(make)
    other.uart.load(bench.uart.save())
    assert other.raised()
    assert bytes(other.get(DATA) for _ in range(18)) == b"0123456789abcdefgh"


def test_state_of_another_version_is_refused(bench: Bench) -> None:
    with pytest.raises(StateError, match="version 9"):
        bench.uart.load(bench.uart.save() | {"version": 9})


def test_input_from_another_thread_all_arrives(bench: Bench) -> None:
    bench.put(FCR, 0x01)
    bench.put(IER, 0x01)
    text = bytes(i & 0xFF for i in range(5000))

    def feed() -> None:
        for i in range(0, len(text), 7):
            bench.uart.receive(text[i : i + 7])

    thread = threading.Thread(target=feed)
    thread.start()
    got = bytearray()
    while len(got) < len(text):
        if bench.get(LSR) & 1:
            got.append(bench.get(DATA))
    thread.join()
    assert got == text
    assert not bench.raised()


# What drivers do, which leads far into the chip, and what none does. Write, offset, size, value.
DRIVER_WRITES = st.one_of(
    st.tuples(st.just(True), st.just(DATA), st.just(1), st.integers(0, 0xFF)),
    st.tuples(st.just(True), st.just(IER), st.just(1), st.integers(0, 0x0F)),
    st.tuples(
        st.just(True),
        st.just(FCR),
        st.just(1),
        st.sampled_from([0x00, 0x01, 0x03, 0x07, 0x41, 0x81, 0xC1, 0xC7]),
    ),
    st.tuples(st.just(True), st.just(LCR), st.just(1), st.sampled_from([0x03, 0x43, 0x83])),
    st.tuples(st.just(True), st.just(MCR), st.just(1), st.sampled_from([0, 1, 0x0B, 0x10, 0x1F])),
)
READS = st.tuples(st.just(False), st.integers(0, 7), st.just(1), st.just(0))
ANYTHING = st.tuples(
    st.booleans(),
    st.integers(0, 9),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1),
)
# With the input that comes then, and whether the state is saved and loaded.
STEPS = st.lists(
    st.tuples(
        st.one_of(DRIVER_WRITES, DRIVER_WRITES, READS, ANYTHING),
        st.one_of(st.just(b""), st.binary(max_size=20)),
        st.integers(0, 9).map(lambda lot: lot == 9),
    ),
    min_size=10,
    max_size=80,
)


@settings(max_examples=300)
@given(STEPS)
def test_rust_and_model_are_the_same_to_a_guest(steps: list[Any]) -> None:
    rust, python = Bench(Uart16550), Bench(model)
    for (write, offset, size, value), typed, saved in steps:
        if write:
            for bench in rust, python:
                bench.uart.write(offset, size, value)
        else:
            assert rust.uart.read(offset, size) == python.uart.read(offset, size)
        for bench in rust, python:
            bench.uart.receive(typed)
        assert rust.get(IIR) == python.get(IIR)
        assert (rust.raised(), rust.line.edges) == (python.raised(), python.line.edges)
        assert rust.sent == python.sent
        assert rust.uart.queued == python.uart.queued
        state = rust.uart.save()
        assert state == python.uart.save()
        assert json.loads(json.dumps(state)) == state
        if saved:  # each goes on with what the other has saved
            rust.uart.reset()
            rust.uart.load(python.uart.save())
            python.uart.load(state)
            rust.line.edges = python.line.edges


@pytest.mark.parametrize("make", KINDS, ids=["rust", "model"])
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 255), st.booleans(), st.binary(max_size=20))
    )
)
def test_line_follows_iir_whatever_the_guest_does(make: Any, steps: list[Any]) -> None:
    bench = Bench(make)
    for offset, value, is_write, data in steps:
        if is_write:
            bench.put(offset, value)
        else:
            bench.get(offset)
        bench.uart.receive(data)
        level = bench.raised()
        if not bench.uart.save()["lcr"] & 0x80:
            assert level == (not bench.get(IIR) & 1)


def test_reset_is_as_after_power_on(bench: Bench) -> None:
    new = Bench(bench.make).uart.save()
    for offset in range(8):
        bench.put(offset, 0x5F)
    bench.put(LCR, 0)
    bench.put(IER, 0x03)
    bench.uart.receive(b"typed")
    assert bench.raised()
    bench.uart.reset()
    assert bench.uart.save() == new
    assert not bench.raised()


def test_wire_that_cannot_be_driven_is_refused() -> None:
    with pytest.raises(TypeError, match="'set'"):
        Uart16550(object())  # type: ignore[arg-type]


def test_output_is_handed_over_in_batches_and_to_the_last_byte() -> None:
    uart = Uart16550(Line())
    text = bytes(i & 0xFF for i in range(100_000))
    batches: list[bytes] = []

    def drain() -> None:
        while batch := uart.wait_output():
            batches.append(batch)

    reader = threading.Thread(target=drain)
    reader.start()
    for byte in text:
        uart.write(DATA, 1, byte)
    assert uart.flush_output(60)
    assert b"".join(batches) == text
    uart.write(DATA, 1, 0x21)
    uart.end_output()
    reader.join()
    assert b"".join(batches) == text + b"!"
    assert len(batches) < len(text) // 16
