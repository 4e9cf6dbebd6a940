"""The clock: time, its formats, its interrupts, and the memory behind it."""

import calendar
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch.devices.rtc_cmos import RtcCmos, RtcCmosCore, civil_from_days, days_from_civil

NS = 1_000_000_000
#: Sunday.
START = calendar.timegm((2024, 3, 31, 23, 59, 58)) * NS


class Bench:
    """A core whose clock says how long the machine runs."""

    def __init__(self, ram: Iterable[tuple[int, int]] = ()) -> None:
        self.now = 0
        self.core = RtcCmosCore(0, START, ram)

    def get(self, register: int) -> int:
        self.core.write(0, register, self.now)
        return self.core.read(1, self.now)

    def put(self, register: int, value: int) -> None:
        self.core.write(0, register, self.now)
        self.core.write(1, value, self.now)

    def irq(self) -> bool:
        self.core.advance(self.now)
        return self.core.irq

    def due(self) -> int | None:
        return self.core.next_event(self.now)

    def time(self) -> list[int]:
        return [self.get(register) for register in (0x32, 9, 8, 7, 4, 2, 0)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_time_is_the_hosts_in_bcd(bench: Bench) -> None:
    assert bench.time() == [0x20, 0x24, 0x03, 0x31, 0x23, 0x59, 0x58]
    assert bench.get(6) == 1


def test_time_goes_on_over_the_end_of_the_month(bench: Bench) -> None:
    bench.now = 2 * NS
    assert bench.time() == [0x20, 0x24, 0x04, 0x01, 0x00, 0x00, 0x00]
    assert bench.get(6) == 2


def test_binary_and_12_hour_formats(bench: Bench) -> None:
    bench.put(0x0B, 0x04)
    assert bench.time() == [20, 24, 3, 31, 0x80 | 11, 59, 58]
    bench.now = 2 * NS
    assert bench.get(4) == 12


def test_time_set_by_the_guest_runs_on(bench: Bench) -> None:
    bench.put(0x0B, 0x82)
    for register, value in ((0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59)):
        bench.put(register, value)
    bench.put(0, 0x59)
    bench.now += 10 * NS
    assert bench.time()[-1] == 0x59
    bench.put(0x0B, 0x02)
    # The first update comes half a second after the release.
    bench.now += NS // 2 - 1
    assert bench.time() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]
    bench.now += 1
    assert bench.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_update_in_progress_only_just_before_the_second(bench: Bench) -> None:
    bench.now = NS - 244_001
    assert not bench.get(0x0A) & 0x80
    bench.now += 1
    assert bench.get(0x0A) & 0x80
    bench.now = NS
    assert not bench.get(0x0A) & 0x80
    bench.put(0x0B, 0x82)
    bench.now = 2 * NS - 1
    assert not bench.get(0x0A) & 0x80


def test_update_interrupt_each_second(bench: Bench) -> None:
    bench.put(0x0B, 0x12)
    assert bench.due() == NS
    bench.now = NS
    assert bench.irq()
    assert bench.due() is None
    # The periodic flag has come too, as it does without its enable.
    assert bench.get(0x0C) == 0xD0
    assert not bench.irq()
    assert bench.due() == 2 * NS


def test_flags_are_set_without_enables_and_clear_by_reading(bench: Bench) -> None:
    bench.now = NS
    assert bench.get(0x0C) == 0x50
    assert bench.get(0x0C) == 0x00


def test_periodic_interrupt_at_its_rate(bench: Bench) -> None:
    bench.put(0x0B, 0x42)
    due = bench.due()
    assert due is not None
    assert 0 < due <= NS // 1024 + 1
    bench.now = due
    assert bench.irq()
    assert bench.get(0x0C) == 0xC0
    bench.put(0x0A, 0x20)  # rate 0: none
    assert bench.due() is None


@pytest.mark.parametrize(
    ("hour", "minute", "second", "after"),
    [
        (0x00, 0x00, 0x00, 2),
        (0x23, 0x59, 0x59, 1),
        (0x23, 0x59, 0x58, 86_400),
        (0xFF, 0xFF, 0x30, 32),
        (0xC0, 0x05, 0x00, 5 * 60 + 2),
        (0x12, 0xFF, 0xFF, 12 * 3600 + 2),
    ],
)
def test_alarm_comes_at_its_time(
    bench: Bench, hour: int, minute: int, second: int, after: int
) -> None:
    for register, value in ((5, hour), (3, minute), (1, second)):
        bench.put(register, value)
    bench.put(0x0B, 0x22)
    assert bench.due() == after * NS
    bench.now = after * NS - 1
    assert not bench.irq()
    bench.now += 1
    assert bench.irq()


def test_alarm_at_an_impossible_time_never_comes(bench: Bench) -> None:
    bench.put(5, 0x99)
    bench.put(0x0B, 0x22)
    assert bench.due() is None


def test_valid_ram_is_reported_and_register_d_is_read_only(bench: Bench) -> None:
    bench.put(0x0D, 0)
    assert bench.get(0x0D) == 0x80


def test_memory_sizes_are_told() -> None:
    bench = Bench(ram=[(0, 3 << 30), (4 << 30, 2 << 30)])
    assert bench.get(0x15) | bench.get(0x16) << 8 == 639
    assert bench.get(0x17) | bench.get(0x18) << 8 == 0xFFFF
    low = (3 << 30) - (16 << 20)
    assert bench.get(0x34) | bench.get(0x35) << 8 == low >> 16
    assert bench.get(0x5B) | bench.get(0x5C) << 8 | bench.get(0x5D) << 16 == 2 << 14


def test_cmos_memory_is_kept_and_the_nmi_bit_is_no_address(bench: Bench) -> None:
    bench.put(0x40, 0x5A)
    assert bench.get(0xC0) == 0x5A


def test_saved_state_continues_where_it_was(bench: Bench) -> None:
    bench.put(0x40, 0x5A)
    bench.put(0x0B, 0x12)
    bench.now = 5 * NS
    other = Bench()
    other.now = bench.now
    other.core.state.load(bench.core.state.save())
    other.core.advance(other.now)
    assert other.irq()
    assert other.get(0x40) == 0x5A
    assert other.time() == bench.time()


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255), st.integers(0, 1 << 60))))
def test_any_contents_and_any_time_are_harmless(steps: list[Any]) -> None:
    bench = Bench()
    for register, value, later in steps:
        bench.put(register, value)
        bench.now += later
        bench.get(register)
        bench.time()
        due = bench.due()
        assert due is None or due > bench.now


@given(st.integers(-4_000_000, 4_000_000))
def test_calendar_is_its_own_inverse(days: int) -> None:
    assert days_from_civil(*civil_from_days(days)) == days


@given(st.integers(0, 40_000))
def test_calendar_agrees_with_the_hosts(days: int) -> None:
    host = time.gmtime(days * 86_400)
    assert civil_from_days(days) == (host.tm_year, host.tm_mon, host.tm_mday)


def test_periodic_interrupt_arrives_by_the_timer_thread() -> None:
    raised = threading.Event()
    device = RtcCmos(lambda level: raised.set() if level else None, time.monotonic_ns)
    try:
        device.write(0, 1, 0x0B)
        device.write(1, 1, 0x42)
        assert raised.wait(10)
    finally:
        device.close()


def test_event_right_behind_an_acknowledgement_has_its_own_edge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels: list[bool] = []
    now = 0
    device = RtcCmos(levels.append, lambda: now, wall_ns=lambda: START)

    monkeypatch.setattr(device._timer, "arm", lambda at: None)
    device.write(0, 1, 0x0B)
    device.write(1, 1, 0x42)  # periodic interrupts, 1024 a second
    now = 2_000_000
    device.write(0, 1, 0x0C)
    device._tick()
    assert levels == [True]

    # The timer's thread comes in between.
    monkeypatch.setattr(device._timer, "arm", lambda at: device._core.advance(at + 1_000_000))
    assert device.read(1, 1) == 0xC0
    assert levels == [True, False, True]


def test_reset_catches_up_with_the_time_for_which_the_machine_stood() -> None:
    now = stood = 0
    device = RtcCmos(lambda level: None, lambda: now, wall_ns=lambda: START + now + stood)

    def get(register: int) -> int:
        device.write(0, 1, register)
        return device.read(1, 1)

    stood = 3600 * NS
    now = 2 * NS
    assert [get(register) for register in (7, 4, 2, 0)] == [0x01, 0x00, 0x00, 0x00]
    device.reset()
    assert [get(register) for register in (7, 4, 2, 0)] == [0x01, 0x01, 0x00, 0x00]
    # Half an hour later, by the guest; that stays, and nothing is counted twice.
    device.write(0, 1, 2)
    device.write(1, 1, 0x30)
    device.reset()
    now += NS
    assert [get(register) for register in (7, 4, 2, 0)] == [0x01, 0x01, 0x30, 0x01]
    device.close()


def test_timer_thread_ends_when_the_guest_needs_none() -> None:
    device = RtcCmos(lambda level: None, time.monotonic_ns)
    device.write(0, 2, 0x420B)
    device.write(0, 2, 0x020B)
    device.close()
    assert not [t for t in threading.enumerate() if t.name == "rtc"]
