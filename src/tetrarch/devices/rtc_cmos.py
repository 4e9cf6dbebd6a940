"""The MC146818A real-time clock with the PC's CMOS memory.

Registers follow the Motorola MC146818A data sheet (1984); what is in the memory behind them is the
PC/AT's, as firmware would have left it.

Time is not counted but computed: the clock is the machine's clock plus an offset, which starts as
the host's wall clock and which the guest sets. While the guest holds updates (SET, or the divider
in reset) the registers are plain memory.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tetrarch.devices._access import read_bytes, write_bytes
from tetrarch.devices._adapter import Adapter
from tetrarch.devices._state import DeviceState, State, counter, memory, register
from tetrarch.devices._timer import TimerThread

__all__ = [
    "CENTURY",
    "GSI",
    "PORTS",
    "PORT_BASE",
    "RtcCmos",
    "RtcCmosCore",
    "RtcCmosState",
    "civil_from_days",
    "days_from_civil",
]

PORT_BASE: Final = 0x70
PORTS: Final = 2
GSI: Final = 8

SECONDS: Final = 0x00
SECONDS_ALARM: Final = 0x01
MINUTES: Final = 0x02
MINUTES_ALARM: Final = 0x03
HOURS: Final = 0x04
HOURS_ALARM: Final = 0x05
DAY_OF_WEEK: Final = 0x06
DAY_OF_MONTH: Final = 0x07
MONTH: Final = 0x08
YEAR: Final = 0x09
REG_A: Final = 0x0A
REG_B: Final = 0x0B
REG_C: Final = 0x0C
REG_D: Final = 0x0D
#: Not the chip's: where the FADT says the century is.
CENTURY: Final = 0x32
#: Where SeaBIOS reads which kinds of devices it boots from, 4 bits each, the first lowest
#: (SeaBIOS, src/boot.c, boot_init).
BOOT_ORDER: Final = 0x3D
DISKS_THEN_CDROMS: Final = 0x32
#: Its high half is the third kind.
BOOT_ORDER_LAST: Final = 0x38
FLOPPIES: Final = 0x10
#: The types of the floppy drives, the first in the high half.
FLOPPY_TYPES: Final = 0x10
#: Bit 0: there is one; the highest two bits: one less than there are.
EQUIPMENT: Final = 0x14
TIME_REGISTERS: Final = frozenset(
    {SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY}
)

A_UIP: Final = 0x80
A_DIVIDER: Final = 0x70
A_DIVIDER_RESET: Final = 0x60
A_RATE: Final = 0x0F
_OFFSET_NS_MAX: Final = (1 << 63) - 1
#: 32.768 kHz time base and 1024 Hz: the PC's settings.
A_INITIAL: Final = 0x26

B_SET: Final = 0x80
B_PIE: Final = 0x40
B_AIE: Final = 0x20
B_UIE: Final = 0x10
B_SQWE: Final = 0x08
B_BINARY: Final = 0x04
B_24H: Final = 0x02

C_IRQF: Final = 0x80
C_PF: Final = 0x40
C_AF: Final = 0x20
C_UF: Final = 0x10

D_VALID: Final = 0x80

HOUR_PM: Final = 0x80
ALARM_ANY: Final = 0xC0

NS: Final = 1_000_000_000
#: UIP rises this long before the registers change.
UIP_NS: Final = 244_000
DAY: Final = 86_400
CMOS_SIZE: Final = 128


def days_from_civil(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 in the proleptic Gregorian calendar, for any year."""
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468


def civil_from_days(days: int) -> tuple[int, int, int]:
    era, of_era = divmod(days + 719_468, 146_097)
    year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    shifted = (5 * of_year + 2) // 153
    day = of_year - (153 * shifted + 2) // 5 + 1
    month = shifted + 3 if shifted < 10 else shifted - 9
    return era * 400 + year + (month <= 2), month, day


def _memory_sizes(ram: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """(register, bytes, value): memory sizes as BIOSes keep them."""
    low = high = 0
    for base, length in ram:
        if base < 1 << 32:
            low += length
        else:
            high += length
    extended_kib = min(max(low - (1 << 20), 0) >> 10, 0xFFFF)
    yield 0x15, 2, 639
    yield 0x17, 2, extended_kib
    yield 0x30, 2, extended_kib
    yield 0x34, 2, min(max(low - (16 << 20), 0) >> 16, 0xFFFF)
    yield 0x5B, 3, min(high >> 16, 0xFF_FFFF)


@dataclass
class RtcCmosState(DeviceState):
    """All but the interrupts' enables and flags is kept by the battery."""

    kind = "rtc_cmos"

    index: int = register(0, 0x7F)
    cmos: bytearray = memory(CMOS_SIZE, survives_reset=True)
    flags: int = register(0, C_PF | C_AF | C_UF)
    offset_ns: int = counter(survives_reset=True)
    """The time in ns since 1970, less the machine's clock."""
    seen_ns: int = counter(survives_reset=True)
    """Update and periodic events up to here are in the flags."""

    def reset(self) -> None:
        super().reset()
        # Data sheet, table 4: RESET clears PIE, AIE, UIE and SQWE.
        self.cmos[REG_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.cmos[REG_A] &= ~A_UIP  # told, not kept


class RtcCmosCore:
    """Clock and memory. Time comes with each call, in ns of the machine's clock."""

    def __init__(
        self,
        now_ns: int,
        wall_ns: int,
        ram: Iterable[tuple[int, int]] = (),
        floppies: Sequence[int] = (),
    ) -> None:
        """``wall_ns``: the time in ns since 1970 when the machine's clock is ``now_ns``.

        ``ram``: (address, length) of each range; ``floppies``: the type of each drive.
        """
        self.state = RtcCmosState(offset_ns=wall_ns - now_ns, seen_ns=now_ns)
        self.state.cmos[REG_A] = A_INITIAL
        self.state.cmos[REG_B] = B_24H
        self.state.cmos[BOOT_ORDER] = DISKS_THEN_CDROMS
        if floppies:
            self.state.cmos[BOOT_ORDER_LAST] = FLOPPIES
            self.state.cmos[FLOPPY_TYPES] = floppies[0] << 4 | (
                floppies[1] if len(floppies) > 1 else 0
            )
            self.state.cmos[EQUIPMENT] = 1 | len(floppies) - 1 << 6
        for first, length, value in _memory_sizes(ram):
            self.state.cmos[first : first + length] = value.to_bytes(length, "little")
        self._store_time(now_ns)

    @property
    def irq(self) -> bool:
        # C_PF, C_AF and C_UF lie where B has their enables.
        return bool(self.state.flags & self.state.cmos[REG_B] & (C_PF | C_AF | C_UF))

    @property
    def _held(self) -> bool:
        a, b = self.state.cmos[REG_A], self.state.cmos[REG_B]
        return bool(b & B_SET or a & A_DIVIDER_RESET == A_DIVIDER_RESET)

    def _clock(self, now_ns: int) -> int:
        return now_ns + self.state.offset_ns

    # The side of the bus.

    def read(self, offset: int, now_ns: int) -> int:
        # The index register is write-only.
        return self._read_register(self.state.index, now_ns) if offset == 1 else 0xFF

    def write(self, offset: int, value: int, now_ns: int) -> None:
        value &= 0xFF
        if offset == 0:
            # Bit 7 is the PC's NMI mask, which nothing here drives.
            self.state.index = value & 0x7F
        elif offset == 1:
            self._write_register(self.state.index, value, now_ns)

    def _read_register(self, register: int, now_ns: int) -> int:
        self.advance(now_ns)
        if register in TIME_REGISTERS:
            if not self._held:
                self._store_time(now_ns)
        elif register == REG_A:
            return self.state.cmos[REG_A] | (A_UIP if self._updating(now_ns) else 0)
        elif register == REG_C:
            value = self.state.flags | (C_IRQF if self.irq else 0)
            self.state.flags = 0
            return value
        elif register == REG_D:
            return D_VALID
        return self.state.cmos[register]

    def _write_register(self, register: int, value: int, now_ns: int) -> None:
        self.advance(now_ns)
        if register in (REG_C, REG_D):
            return
        held = self._held
        if not held:
            self._store_time(now_ns)
        if register == REG_A:
            self.state.cmos[REG_A] = value & ~A_UIP
        elif register == REG_B:
            # Data sheet: setting SET clears UIE.
            self.state.cmos[REG_B] = value & ~B_UIE if value & B_SET else value
        else:
            self.state.cmos[register] = value
        # The clock runs on from the registers when it is let go, and also when the guest sets
        # the time without holding it.
        if not self._held and (held or register in TIME_REGISTERS):
            offset_ns = self._stored_time(self._clock(now_ns) % NS, held) - now_ns
            # As far as a saved machine has it: from 1677 to 2262.
            self.state.offset_ns = min(max(offset_ns, -_OFFSET_NS_MAX), _OFFSET_NS_MAX)
            self.state.seen_ns = now_ns

    def _updating(self, now_ns: int) -> bool:
        return not self._held and self._clock(now_ns) % NS >= NS - UIP_NS

    # Registers and time.

    def _encode(self, value: int) -> int:
        if self.state.cmos[REG_B] & B_BINARY:
            return value & 0xFF
        return (value // 10 % 10) << 4 | value % 10

    def _decode(self, value: int) -> int:
        if self.state.cmos[REG_B] & B_BINARY:
            return value
        return (value >> 4) * 10 + (value & 0xF)

    def _encode_hour(self, hour: int) -> int:
        if self.state.cmos[REG_B] & B_24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (HOUR_PM if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self.state.cmos[REG_B] & B_24H:
            return self._decode(value)
        hour = self._decode(value & ~HOUR_PM)
        return hour % 12 + (12 if value & HOUR_PM else 0)

    def _store_time(self, now_ns: int) -> None:
        days, second = divmod(self._clock(now_ns) // NS, DAY)
        year, month, day = civil_from_days(days)
        encode = self._encode
        self.state.cmos[SECONDS] = encode(second % 60)
        self.state.cmos[MINUTES] = encode(second // 60 % 60)
        self.state.cmos[HOURS] = self._encode_hour(second // 3600)
        # 1970-01-01 was a Thursday; 1 is Sunday.
        self.state.cmos[DAY_OF_WEEK] = (days + 4) % 7 + 1
        self.state.cmos[DAY_OF_MONTH] = encode(day)
        self.state.cmos[MONTH] = encode(month)
        self.state.cmos[YEAR] = encode(year % 100)
        self.state.cmos[CENTURY] = encode(year // 100 % 100)

    def _stored_time(self, fraction_ns: int, restart: bool) -> int:
        """What the registers say, in ns. Nonsense gives some time, never an error."""
        decode = self._decode
        year = decode(self.state.cmos[CENTURY]) * 100 + decode(self.state.cmos[YEAR])
        month = min(max(decode(self.state.cmos[MONTH]), 1), 12)
        days = days_from_civil(year, month, max(decode(self.state.cmos[DAY_OF_MONTH]), 1))
        second = decode(self.state.cmos[SECONDS]) + 60 * decode(self.state.cmos[MINUTES])
        second += 3600 * self._decode_hour(self.state.cmos[HOURS])
        # Released from hold, the first update comes half a second later (data sheet, "divider
        # control"); Linux's rtc_cmos sets its time for that.
        return (days * DAY + second) * NS + (NS // 2 if restart else fraction_ns)

    # Events.

    def _period_ns(self) -> int:
        """Of the periodic interrupt; 0: none. Data sheet, table 5, 32.768 kHz time base."""
        rate = self.state.cmos[REG_A] & A_RATE
        if rate == 0 or self.state.cmos[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET:
            return 0
        if rate <= 2:
            rate += 7
        return (NS << (rate - 1)) // 32_768

    def _next_alarm(self, after: int) -> int | None:
        """The first second later than ``after`` that matches the alarm registers."""
        fields = []
        for alarm, limit in ((HOURS_ALARM, 24), (MINUTES_ALARM, 60), (SECONDS_ALARM, 60)):
            raw = self.state.cmos[alarm]
            if raw & ALARM_ANY == ALARM_ANY:
                fields.append(range(limit))
                continue
            value = self._decode_hour(raw) if alarm == HOURS_ALARM else self._decode(raw)
            if value >= limit:
                return None
            fields.append(range(value, value + 1))
        hours, minutes, seconds = fields
        day, now = divmod(after, DAY)
        for hour in hours:
            if hour < now // 3600:
                continue
            for minute in minutes:
                if hour * 60 + minute < now // 60:
                    continue
                for second in seconds:
                    moment = hour * 3600 + minute * 60 + second
                    if moment > now:
                        return day * DAY + moment
        first = hours[0] * 3600 + minutes[0] * 60 + seconds[0]
        return (day + 1) * DAY + first

    def advance(self, now_ns: int) -> None:
        """Notes in the flags what happened since the last call."""
        if now_ns <= self.state.seen_ns:
            return
        before, after = self._clock(self.state.seen_ns), self._clock(now_ns)
        self.state.seen_ns = now_ns
        period = self._period_ns()
        if period and before // period != after // period:
            self.state.flags |= C_PF
        if not self._held and before // NS != after // NS:
            self.state.flags |= C_UF
            if not self.state.flags & C_AF:
                alarm = self._next_alarm(before // NS)
                if alarm is not None and alarm <= after // NS:
                    self.state.flags |= C_AF

    def next_event(self, now_ns: int) -> int | None:
        """When, on the machine's clock, the next enabled interrupt is due."""
        enabled = self.state.cmos[REG_B] & ~self.state.flags
        clock = self._clock(now_ns)
        due = []
        period = self._period_ns()
        if enabled & B_PIE and period:
            due.append((clock // period + 1) * period)
        if not self._held:
            if enabled & B_UIE:
                due.append((clock // NS + 1) * NS)
            if enabled & B_AIE:
                alarm = self._next_alarm(clock // NS)
                if alarm is not None:
                    due.append(alarm * NS)
        return min(due) - self.state.offset_ns if due else None


class RtcCmos(Adapter[RtcCmosCore]):
    """The clock on a machine, at PORT_BASE.

    A timer thread exists only while the guest has an interrupt enabled whose flag is not yet set;
    ``close`` ends it.
    """

    def __init__(
        self,
        irq: Callable[[bool], None],
        clock_ns: Callable[[], int],
        ram: Iterable[tuple[int, int]] = (),
        floppies: Sequence[int] = (),
        *,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """What is told in the CMOS memory: ``ram``, (address, length) of the machine's ranges, and
        ``floppies``, the type of each drive."""
        self._clock_ns = clock_ns
        self._wall_ns = wall_ns
        self._ahead_ns = wall_ns() - clock_ns()
        """The host's time, less the machine's clock, when they were last compared."""
        super().__init__(RtcCmosCore(clock_ns(), wall_ns(), ram, floppies), irq)
        self._timer = TimerThread("rtc", self._lock, clock_ns, self._core.next_event, self._tick)

    def read(self, offset: int, size: int) -> int:
        now = self._clock_ns()
        with self._lock:
            value = read_bytes(lambda at: self._core.read(at, now), offset, size)
            cleared = offset + size > 1 and self._core.state.index == REG_C
            self._timer.arm(now)
        if cleared:
            # The line was low, even if the next event has come meanwhile: that is an edge.
            self._line.renew()
        else:
            self._line.update()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        now = self._clock_ns()
        with self._lock:
            write_bytes(lambda at, byte: self._core.write(at, byte, now), offset, size, value)
            self._timer.arm(now)
        self._line.update()

    def reset(self) -> None:
        """A system that starts anew takes its time from here: the clock catches up with the host's
        for as long as the machine has stood. What the guest has set it to counts on."""
        with self._lock:
            ahead_ns = self._wall_ns() - self._clock_ns()
            self._core.state.offset_ns += ahead_ns - self._ahead_ns
            self._ahead_ns = ahead_ns
        super().reset()

    def close(self) -> None:
        self._timer.close()

    def _tick(self) -> None:
        with self._lock:
            self._core.advance(self._clock_ns())
            irq = self._core.irq
        if irq:
            self._line.update()

    def load(self, state: State) -> None:
        super().load(state)
        with self._lock:
            now = self._clock_ns()
            # What is loaded goes on as it was: its clock stands where it stood.
            self._ahead_ns = self._wall_ns() - now
            self._timer.arm(now)
