"""ACPI fixed hardware: PM1a event and control blocks, the PM timer, general-purpose events
(ACPI 6.5, 4.8)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import MAX_ACCESS, all_ones
from tetrarch.devices._adapter import Adapter
from tetrarch.devices._state import DeviceState, counter, register

__all__ = [
    "CPU_HOTPLUG_EVENT",
    "GENERATION_EVENT",
    "GPE0",
    "GPE0_BYTES",
    "GSI",
    "PCI_HOTPLUG_EVENT",
    "PM1_CONTROL",
    "PM1_EVENT",
    "PM_TIMER",
    "PORTS",
    "PORT_BASE",
    "S5_TYPE",
    "AcpiPm",
    "AcpiPmCore",
    "AcpiPmState",
]

PORT_BASE: Final = 0x600
PORTS: Final = 16
GSI: Final = 9
#: The blocks as offsets from PORT_BASE.
PM1_EVENT: Final = 0
PM1_CONTROL: Final = 4
PM_TIMER: Final = 8
GPE0: Final = 12
#: Bytes of the GPE block: 16 bits of status, then as many of enable.
GPE0_BYTES: Final = 4

#: The general-purpose event of PCI hot-plug, as the DSDT names it: \_GPE._L01.
PCI_HOTPLUG_EVENT: Final = 1
#: That of the generation ID (boot/generation.py): \_GPE._E02.
GENERATION_EVENT: Final = 2
#: That of CPU hot-plug: \_GPE._L03.
CPU_HOTPLUG_EVENT: Final = 3
#: SLP_TYP of soft-off, as the DSDT's \_S5 says.
S5_TYPE: Final = 5
#: That of the PIIX4 (Intel 290562, PMCNTRL), which OVMF writes by itself.
PIIX4_S5_TYPE: Final = 0

TIMER_HZ: Final = 3_579_545
NS_PER_S: Final = 1_000_000_000

# PM1 status and enable, tables 4.10 and 4.11.
TMR: Final = 1 << 0
GBL: Final = 1 << 5
PWRBTN: Final = 1 << 8
SLPBTN: Final = 1 << 9
RTC: Final = 1 << 10
WAK: Final = 1 << 15
EVENTS: Final = TMR | GBL | PWRBTN | SLPBTN | RTC
STATUS_BITS: Final = EVENTS | WAK

# PM1 control, table 4.13.
SCI_EN: Final = 1 << 0
BM_RLD: Final = 1 << 1
SLP_TYP_SHIFT: Final = 10
SLP_TYP: Final = 7 << SLP_TYP_SHIFT
SLP_EN: Final = 1 << 13

#: The general-purpose events that there are.
GPES: Final = 1 << PCI_HOTPLUG_EVENT | 1 << GENERATION_EVENT | 1 << CPU_HOTPLUG_EVENT


@dataclass
class AcpiPmState(DeviceState):
    kind = "acpi_pm"

    status: int = register(0, STATUS_BITS)
    enable: int = register(0, EVENTS)
    # There is no SMI: the machine is in ACPI mode from the start.
    control: int = register(SCI_EN, SCI_EN | BM_RLD | SLP_TYP)
    last_timer: int = counter(survives_reset=True)
    gpe_status: int = register(0, GPES)
    gpe_enable: int = register(0, GPES)


class AcpiPmCore:
    """What the registers do. Time comes with each call, in ns of the machine's clock."""

    def __init__(self) -> None:
        self.state = AcpiPmState()
        self._sleep: int | None = None
        # What drives the events: status bits come back as long as it does (4.8.4.1).
        self._gpe_levels = 0

    @property
    def irq(self) -> bool:
        fixed = self.state.status & self.state.enable & EVENTS
        return bool(fixed | self.state.gpe_status & self.state.gpe_enable)

    def set_gpe(self, event: int, level: bool) -> None:
        self._gpe_levels = self._gpe_levels & ~(1 << event) | level << event
        self.state.gpe_status |= self._gpe_levels

    def power_button(self) -> None:
        self.state.status |= PWRBTN

    def take_sleep(self) -> int | None:
        """The SLP_TYP that the guest went to sleep with since the last call."""
        sleep, self._sleep = self._sleep, None
        return sleep

    def advance(self, now_ns: int) -> int:
        """The PM timer's count; sets TMR_STS when its top bit has changed (4.8.2.1)."""
        ticks = max(now_ns, 0) * TIMER_HZ // NS_PER_S
        if ticks >> 31 != self.state.last_timer >> 31:
            self.state.status |= TMR
        self.state.last_timer = ticks
        return ticks & 0xFFFF_FFFF

    def read(self, offset: int, size: int, now_ns: int) -> int:
        timer = self.advance(now_ns)
        # One image for any width, so that a 4-byte timer read is one moment.
        image = (
            self.state.status | self.state.enable << 16 | self.state.control << 32 | 0xFFFF << 48
        )
        image |= timer << 64 | self.state.gpe_status << 96 | self.state.gpe_enable << 112
        if not 0 <= offset < PORTS:
            return all_ones(size)
        # Beyond the block the bus reads ones.
        image |= ((1 << 8 * MAX_ACCESS) - 1) << 8 * PORTS
        return image >> 8 * offset & all_ones(size)

    def write(self, offset: int, size: int, value: int, now_ns: int) -> None:
        self.advance(now_ns)
        for index in range(min(size, MAX_ACCESS)):
            self._write_byte(offset + index, value >> 8 * index & 0xFF)

    def _write_byte(self, offset: int, value: int) -> None:
        match offset:
            case 0 | 1:
                self.state.status &= ~(value << 8 * offset)
            case 2 | 3:
                shift = 8 * (offset - 2)
                enable = self.state.enable & ~(0xFF << shift) | value << shift
                self.state.enable = enable & EVENTS
            case 4:
                self.state.control = self.state.control & ~BM_RLD | value & BM_RLD
            case 5:
                word = value << 8
                self.state.control = self.state.control & ~SLP_TYP | word & SLP_TYP
                if word & SLP_EN:
                    self._sleep = (word & SLP_TYP) >> SLP_TYP_SHIFT
            case 12 | 13:
                self.state.gpe_status &= ~(value << 8 * (offset - GPE0))
                self.state.gpe_status |= self._gpe_levels
            case 14 | 15:
                shift = 8 * (offset - GPE0 - 2)
                enable = self.state.gpe_enable & ~(0xFF << shift) | value << shift
                self.state.gpe_enable = enable & GPES
            case _:
                pass  # the timer is read-only


class AcpiPm(Adapter[AcpiPmCore]):
    """The fixed hardware on a machine, at PORT_BASE; ``irq`` is the SCI.

    The timer's own event is raised when the guest next touches the block: Linux never enables it.
    """

    def __init__(
        self,
        irq: Callable[[bool], None],
        clock_ns: Callable[[], int],
        poweroff: Callable[[], None],
        *,
        firmware: bool = False,
    ) -> None:
        """``firmware``: soft-off is also by the SLP_TYP of the chipset that firmware knows."""
        super().__init__(AcpiPmCore(), irq)
        self._soft_off = (S5_TYPE, PIIX4_S5_TYPE) if firmware else (S5_TYPE,)
        self._clock_ns = clock_ns
        self._poweroff = poweroff

    def press_power_button(self) -> None:
        """Asks the guest to shut down; from any thread."""
        with self._lock:
            self._core.power_button()
        self._line.update()

    def set_gpe(self, event: int, level: bool) -> None:
        """Drives a general-purpose event; from any thread."""
        with self._lock:
            self._core.set_gpe(event, level)
        self._line.update()

    def read(self, offset: int, size: int) -> int:
        now = self._clock_ns()
        with self._lock:
            value = self._core.read(offset, size, now)
            moved = self._core.irq
        if moved:
            self._line.update()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        now = self._clock_ns()
        with self._lock:
            self._core.write(offset, size, value, now)
            sleep = self._core.take_sleep()
        self._line.update()
        if sleep in self._soft_off:
            self._poweroff()
