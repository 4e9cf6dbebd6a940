"""The event timers' registers and interrupts, as IA-PC HPET 1.0a has them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tetrarch import Machine, StopReason
from tetrarch.devices.hpet import GSIS, Hpet, HpetCore, Wire
from tetrarch.errors import StateError
from tetrarch.testing import pvh_kernel

CONFIGURATION, STATUS, COUNTER = 0x10, 0x20, 0xF0
LEVEL, INTERRUPT, PERIODIC, SET_VALUE, MODE_32 = 2, 4, 8, 0x40, 0x100
TICK_NS = 10


def config(index: int) -> int:
    return 0x100 + 0x20 * index


def comparator(index: int) -> int:
    return 0x108 + 0x20 * index


class Bench:
    def __init__(self) -> None:
        self.core = HpetCore()
        self.now = 0

    def read(self, offset: int, size: int = 8) -> int:
        return self.core.read(offset, size, self.now)

    def write(self, offset: int, value: int, size: int = 8) -> None:
        self.core.write(offset, size, value, self.now)

    def later(self, ticks: int) -> list[int]:
        """Lines that interrupted by an edge meanwhile."""
        self.now += ticks * TICK_NS
        self.core.advance(self.now)
        return self.core.take_edges()


def test_capabilities() -> None:
    bench = Bench()
    value = bench.read(0)
    assert value & 0xFF == 1  # revision
    assert (value >> 8 & 0x1F) + 1 == 3
    assert value >> 13 & 1  # 64 bits
    assert value >> 16 & 0xFFFF == 0x8086
    assert value >> 32 == TICK_NS * 1_000_000 <= 0x05F5_E100
    bench.write(0, 0)
    assert bench.read(0) == value
    for index in range(3):
        timer = bench.read(config(index))
        assert timer & 0x30 == 0x30  # periodic and 64 bits
        assert timer >> 32 == sum(1 << gsi for gsi in GSIS)


def test_counter_stands_until_it_is_enabled() -> None:
    bench = Bench()
    bench.write(COUNTER, 1000)
    bench.later(5)
    assert bench.read(COUNTER) == 1000
    bench.write(CONFIGURATION, 1)
    bench.later(7)
    assert bench.read(COUNTER) == 1007
    bench.write(CONFIGURATION, 0)
    bench.later(7)
    assert bench.read(COUNTER) == 1007


def test_halves_of_a_register() -> None:
    bench = Bench()
    bench.write(COUNTER, 0x1111_2222, 4)
    bench.write(COUNTER + 4, 0x3333_4444, 4)
    assert bench.read(COUNTER) == 0x3333_4444_1111_2222
    assert bench.read(COUNTER + 4, 4) == 0x3333_4444
    assert bench.read(COUNTER + 6, 4) == 0xFFFF_FFFF  # across two registers


def test_one_shot_interrupts_once_by_an_edge() -> None:
    bench = Bench()
    bench.write(config(1), INTERRUPT | 21 << 9)
    bench.write(comparator(1), 100)
    bench.write(CONFIGURATION, 1)
    assert bench.core.next_event(bench.now) == 100 * TICK_NS
    assert bench.later(99) == []
    assert bench.later(1) == [21]
    assert bench.later(1000) == []
    assert bench.read(STATUS) == 0


def test_level_stays_until_its_status_is_cleared() -> None:
    bench = Bench()
    bench.write(config(0), INTERRUPT | LEVEL | 23 << 9)
    bench.write(comparator(0), 10)
    bench.write(CONFIGURATION, 1)
    assert not bench.core.level(23)
    assert bench.later(10) == []
    assert (bench.read(STATUS), bench.core.level(23), bench.core.level(22)) == (1, True, False)
    bench.write(STATUS, 0)
    assert bench.core.level(23)
    bench.write(STATUS, 1)
    assert not bench.core.level(23)


def test_periodic_timer_goes_on_from_its_accumulator() -> None:
    bench = Bench()
    bench.write(CONFIGURATION, 1)
    bench.write(config(0), INTERRUPT | PERIODIC | SET_VALUE | 20 << 9)
    assert bench.read(config(0)) & SET_VALUE
    bench.write(comparator(0), 50)
    assert not bench.read(config(0)) & SET_VALUE
    bench.write(comparator(0), 20)
    assert bench.read(comparator(0)) == 50
    assert bench.later(50) == [20]
    assert bench.read(comparator(0)) == 70
    # Several that were missed are one.
    assert bench.later(65) == [20]
    assert bench.read(comparator(0)) == 130
    assert bench.later(15) == [20]


def test_timer_of_32_bits_comes_around() -> None:
    bench = Bench()
    bench.write(COUNTER, 0x5_FFFF_FFF0)
    bench.write(config(2), INTERRUPT | MODE_32 | 22 << 9)
    bench.write(comparator(2), 0xFFFF_0000_0000_0004)
    assert bench.read(comparator(2)) == 4
    bench.write(CONFIGURATION, 1)
    assert bench.later(19) == []
    assert bench.later(1) == [22]
    assert bench.later((1 << 32) - 1) == []
    assert bench.later(1) == [22]


def test_line_that_a_timer_cannot_have_is_not_taken() -> None:
    bench = Bench()
    bench.write(config(0), INTERRUPT | 5 << 9)
    assert bench.read(config(0)) >> 9 & 0x1F == 0
    bench.write(comparator(0), 3)
    bench.write(CONFIGURATION, 1)
    assert bench.core.next_event(bench.now) is None
    assert bench.later(10) == []


def test_saved_timers_go_on() -> None:
    one, other = Bench(), Bench()
    one.write(config(1), INTERRUPT | LEVEL | 21 << 9)
    one.write(comparator(1), 100)
    one.write(CONFIGURATION, 1)
    one.later(60)
    other.core.state.load(one.core.state.save())
    other.now = one.now
    assert other.read(COUNTER) == 60
    other.later(40)
    assert other.core.level(21)
    with pytest.raises(StateError, match="no timers"):
        other.core.state.load(one.core.state.save() | {"timers": []})


def test_guest_waits_for_a_timer(tmp_path: Path) -> None:
    # mov esi, 0xfed00000 ; mov dword [esi+0x100], 0x2806 (level, enabled, line 20)
    # mov dword [esi+0x10], 1 ; mov eax, [esi+0xf0] ; add eax, 20000000 ; mov [esi+0x108], eax
    # mov dword [esi+0x10c], 0 ; wait: test dword [esi+0x20], 1 ; jz wait
    # mov edx, 0x604 ; mov eax, 0x3400 ; out dx, ax ; jmp $
    code = bytes.fromhex(
        "be0000d0fe c78600010000 06280000 c74610 01000000 8b86f0000000 05002d3101"
        "898608010000 c7860c010000 00000000 f7462001000000 74f7"
        "ba04060000 b800340000 66ef ebfe"
    )
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(code))
    with Machine(engine="bt", kernel=kernel, memory="16M", hpet=True) as vm:
        assert vm.run(timeout=60).reason is StopReason.POWERED_OFF
        assert vm.uptime >= 0.002


def test_machine_has_none_unless_it_is_asked_for(tmp_path: Path) -> None:
    # mov eax, [0xfed00000] ; cmp eax, -1 ; jne $ ; mov edx, 0x604 ; mov eax, 0x3400 ; out dx, ax
    code = bytes.fromhex("a10000d0fe 83f8ff 75fe ba04060000 b800340000 66ef ebfe")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(code))
    with Machine(engine="bt", kernel=kernel, memory="16M") as vm:
        assert vm.run(timeout=60).reason is StopReason.POWERED_OFF


def test_thread_interrupts_and_ends_with_the_last_event() -> None:
    pulses: list[int] = []
    came = threading.Event()

    def pulse() -> None:
        pulses.append(1)
        came.set()

    wires = [Wire(lambda level: None, pulse if gsi == 20 else lambda: None) for gsi in GSIS]
    device = Hpet(wires, time.monotonic_ns)
    device.write(config(0), 8, INTERRUPT | 20 << 9)
    device.write(CONFIGURATION, 8, 1)
    device.write(comparator(0), 8, device.read(COUNTER, 8) + 1_000_000)
    assert came.wait(30)
    device.close()
    assert pulses == [1]
