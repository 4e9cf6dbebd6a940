"""The high precision event timers (IA-PC HPET Specification 1.0a): a counter, and comparators that
interrupt.

Time is not counted but computed: the counter is the machine's clock since it was enabled. There is
no legacy replacement, which the specification leaves free (2.3.4, LEG_RT_CAP): PIT and clock keep
their lines, and each timer has one of its own to choose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from tetrarch.devices._access import MAX_ACCESS, all_ones
from tetrarch.devices._line import IrqLine
from tetrarch.devices._state import DeviceState, State, counter, register
from tetrarch.devices._timer import TimerThread
from tetrarch.errors import StateError

__all__ = [
    "BASE",
    "BLOCK_ID",
    "BYTES",
    "GSIS",
    "MIN_TICK",
    "Hpet",
    "HpetCore",
    "HpetState",
    "TimerState",
    "Wire",
]

BASE: Final = 0xFED0_0000
BYTES: Final = 0x400
#: The lines that a timer can have.
GSIS: Final = (20, 21, 22, 23)

TICK_NS: Final = 10
FEMTOSECONDS: Final = 1_000_000
TIMERS: Final = 3
#: Of the capabilities: revision 1, the number of timers, a counter of 64 bits, Intel.
BLOCK_ID: Final = 1 | TIMERS - 1 << 8 | 1 << 13 | 0x8086 << 16
#: Less than this a program had better not ask for periodically: 100 us.
MIN_TICK: Final = 10_000

# Offsets of registers (2.3.2), each of 64 bits.
CAPABILITIES: Final = 0x000
CONFIGURATION: Final = 0x010
STATUS: Final = 0x020
COUNTER: Final = 0x0F0
FIRST_TIMER: Final = 0x100
TIMER_BYTES: Final = 0x20
REGISTER_BYTES: Final = 8

ENABLE: Final = 1 << 0

# Of a timer's configuration (2.3.8).
LEVEL: Final = 1 << 1
INTERRUPT: Final = 1 << 2
PERIODIC: Final = 1 << 3
PERIODIC_CAP: Final = 1 << 4
SIZE_CAP: Final = 1 << 5
SET_VALUE: Final = 1 << 6
MODE_32: Final = 1 << 8
ROUTE_SHIFT: Final = 9
ROUTE: Final = 0x1F << ROUTE_SHIFT
WRITABLE: Final = LEVEL | INTERRUPT | PERIODIC | SET_VALUE | MODE_32 | ROUTE
ROUTES: Final = sum(1 << gsi for gsi in GSIS)

MASK_32: Final = (1 << 32) - 1
MASK_64: Final = (1 << 64) - 1


@dataclass
class TimerState(DeviceState):
    kind = "hpet_timer"

    config: int = register(0, WRITABLE)
    comparator: int = register(MASK_64, MASK_64)
    period: int = register(0, MASK_64)

    @property
    def mask(self) -> int:
        return MASK_32 if self.config & MODE_32 else MASK_64

    @property
    def gsi(self) -> int:
        return (self.config & ROUTE) >> ROUTE_SHIFT


@dataclass
class HpetState(DeviceState):
    kind = "hpet"

    config: int = register(0, ENABLE)
    status: int = register(0, (1 << TIMERS) - 1)
    value: int = register(0, MASK_64)
    """Of the counter when it stood last."""
    since_ns: int = counter()
    """When it began to run from there, on the machine's clock."""
    seen: int = register(0, MASK_64)
    """The count up to which the comparators have been looked at."""

    def __post_init__(self) -> None:
        self.timers = [TimerState() for _ in range(TIMERS)]

    def reset(self) -> None:
        super().reset()
        for timer in self.timers:
            timer.reset()

    def save(self) -> State:
        return super().save() | {"timers": [timer.save() for timer in self.timers]}

    def load(self, state: Mapping[str, Any]) -> None:
        timers, states = [TimerState() for _ in range(TIMERS)], state.get("timers")
        if not isinstance(states, list) or len(states) != TIMERS:
            raise StateError("saved state of 'hpet' has no timers", mend="save it again")
        for timer, one in zip(timers, states, strict=True):
            timer.load(one)
        super().load(state)
        self.timers = timers


class HpetCore:
    """The registers. Time comes with each call, in ns of the machine's clock."""

    def __init__(self) -> None:
        self.state = HpetState()
        self._edges: list[int] = []

    def level(self, gsi: int) -> bool:
        """What the timers that are level-triggered want of a line."""
        return any(
            self.state.status >> index & 1 and timer.config & INTERRUPT and timer.gsi == gsi
            for index, timer in enumerate(self.state.timers)
        )

    def take_edges(self) -> list[int]:
        """Lines on which timers that are edge-triggered interrupted since the last call."""
        edges, self._edges = self._edges, []
        return edges

    def count(self, now_ns: int) -> int:
        state = self.state
        if not state.config & ENABLE:
            return state.value
        return state.value + max(now_ns - state.since_ns, 0) // TICK_NS & MASK_64

    # The side of the bus.

    def read(self, offset: int, size: int, now_ns: int) -> int:
        """Within one register, as a chipset has it (2.3.1); elsewhere all ones."""
        at = offset % REGISTER_BYTES
        if not 0 <= offset < BYTES or at + size > REGISTER_BYTES:
            return all_ones(size)
        self.advance(now_ns)
        return self._register(offset - at, now_ns) >> 8 * at & all_ones(size)

    def write(self, offset: int, size: int, value: int, now_ns: int) -> None:
        at = offset % REGISTER_BYTES
        size = min(size, MAX_ACCESS)
        if not 0 <= offset < BYTES or at + size > REGISTER_BYTES:
            return
        self.advance(now_ns)
        mask, moved = all_ones(size) << 8 * at, (value & all_ones(size)) << 8 * at
        if offset - at == STATUS:
            self.state.status &= ~moved
            return
        merged = self._register(offset - at, now_ns) & ~mask | moved
        self._write_register(offset - at, merged, now_ns)

    def _register(self, offset: int, now_ns: int) -> int:
        if offset == CAPABILITIES:
            return BLOCK_ID | TICK_NS * FEMTOSECONDS << 32
        if offset == CONFIGURATION:
            return self.state.config
        if offset == STATUS:
            return self.state.status
        if offset == COUNTER:
            return self.count(now_ns)
        index, at = divmod(offset - FIRST_TIMER, TIMER_BYTES)
        if not 0 <= index < TIMERS:
            return 0
        timer = self.state.timers[index]
        match at:
            case 0x00:
                return timer.config | PERIODIC_CAP | SIZE_CAP | ROUTES << 32
            case 0x08:
                return timer.comparator & timer.mask
            case _:
                return 0

    def _write_register(self, offset: int, value: int, now_ns: int) -> None:
        state = self.state
        if offset == CONFIGURATION:
            state.value, state.since_ns = self.count(now_ns), now_ns
            state.config = value & ENABLE
        elif offset == COUNTER:
            state.value, state.since_ns, state.seen = value, now_ns, value
        else:
            index, at = divmod(offset - FIRST_TIMER, TIMER_BYTES)
            if 0 <= index < TIMERS and at == 0x00:
                self._configure(index, value)
            elif 0 <= index < TIMERS and at == 0x08:
                timer = state.timers[index]
                self._compare(timer, value & timer.mask)

    def _configure(self, index: int, value: int) -> None:
        timer = self.state.timers[index]
        timer.config = value & WRITABLE
        if timer.gsi not in GSIS:
            # What a timer cannot have is not taken: that is how software finds out (2.3.8).
            timer.config &= ~ROUTE
        if not timer.config & LEVEL:
            self.state.status &= ~(1 << index)

    def _compare(self, timer: TimerState, value: int) -> None:
        """Of a periodic timer the comparator itself is written behind SET_VALUE, and otherwise
        how much it goes up each time (2.3.9.2.2)."""
        if not timer.config & PERIODIC or timer.config & SET_VALUE:
            timer.comparator = value
        if timer.config & PERIODIC:
            timer.period = value
        timer.config &= ~SET_VALUE

    # Events.

    def advance(self, now_ns: int) -> None:
        """Notes what happened since the last call."""
        state, count = self.state, self.count(now_ns)
        passed, before = count - state.seen & MASK_64, state.seen
        state.seen = count
        if not state.config & ENABLE or not passed:
            return
        for index, timer in enumerate(state.timers):
            if self._distance(timer, before) > passed:
                continue
            if timer.config & PERIODIC and timer.period:
                beyond = (count - timer.comparator & timer.mask) // timer.period + 1
                timer.comparator = timer.comparator + beyond * timer.period & timer.mask
            if timer.config & LEVEL:
                state.status |= 1 << index
            elif timer.config & INTERRUPT and timer.gsi:
                self._edges.append(timer.gsi)

    def _distance(self, timer: TimerState, count: int) -> int:
        """Ticks until the comparator is met next; all around where it is met now."""
        return (timer.comparator - count - 1 & timer.mask) + 1

    def next_event(self, now_ns: int) -> int | None:
        """When, on the machine's clock, the next interrupt is due that is not there already."""
        state = self.state
        if not state.config & ENABLE:
            return None
        waiting = [
            self._distance(timer, state.seen)
            for index, timer in enumerate(state.timers)
            if timer.config & INTERRUPT and timer.gsi and not state.status >> index & 1
        ]
        if not waiting:
            return None
        since_seen = self.count(now_ns) - state.seen & MASK_64
        return now_ns + (min(waiting) - since_seen) * TICK_NS


class Wire(NamedTuple):
    """A line of the timers'. Its two ends are apart: a pulse leaves the level alone."""

    set_level: Callable[[bool], None]
    pulse: Callable[[], None]


class Hpet:
    """The timers on a machine, at BASE; a wire for each of GSIS.

    A thread exists only while the guest has an interrupt enabled that can come; ``close`` ends it.
    """

    def __init__(self, wires: Sequence[Wire], clock_ns: Callable[[], int]) -> None:
        self._core = HpetCore()
        self._lock = threading.Lock()
        self._clock_ns = clock_ns
        self._pulses = {gsi: wire.pulse for gsi, wire in zip(GSIS, wires, strict=True)}
        self._lines = [
            IrqLine(wire.set_level, partial(self._wanted, gsi))
            for gsi, wire in zip(GSIS, wires, strict=True)
        ]
        self._timer = TimerThread("hpet", self._lock, clock_ns, self._core.next_event, self._tick)

    def _wanted(self, gsi: int) -> bool:
        with self._lock:
            return self._core.level(gsi)

    def read(self, offset: int, size: int) -> int:
        now = self._clock_ns()
        with self._lock:
            value = self._core.read(offset, size, now)
        self._drive()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        now = self._clock_ns()
        with self._lock:
            self._core.write(offset, size, value, now)
            self._timer.arm(now)
        self._drive()

    def close(self) -> None:
        self._timer.close()

    def reset(self) -> None:
        with self._lock:
            self._core.state.reset()
        self._drive()

    def save(self) -> State:
        with self._lock:
            return self._core.state.save()

    def load(self, state: State) -> None:
        with self._lock:
            self._core.state.load(state)
            self._timer.arm(self._clock_ns())
        self._drive()

    def _drive(self) -> None:
        with self._lock:
            edges = self._core.take_edges()
        for line in self._lines:
            line.update()
        for gsi in edges:
            self._pulses[gsi]()

    def _tick(self) -> None:
        with self._lock:
            self._core.advance(self._clock_ns())
        self._drive()
