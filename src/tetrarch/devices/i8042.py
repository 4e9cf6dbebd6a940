"""The i8042 keyboard controller, with nothing plugged in.

Guests use it to reset the machine, and probe it while they start. A byte sent to the absent
keyboard is answered as by a real controller whose keyboard does not clock: status TIMEOUT and data
0xFE (IBM PS/2 Technical Reference, keyboard and auxiliary device controller). Linux's libps2 takes
that as an immediate failure, where silence would cost it a timeout for each command.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._adapter import Adapter
from tetrarch.devices._state import DeviceState, flag, memory, queue, register

__all__ = ["DATA_PORT", "GSI", "I8042", "STATUS_PORT", "I8042Core", "I8042Port", "I8042State"]

DATA_PORT: Final = 0x60
STATUS_PORT: Final = 0x64
GSI: Final = 1

STATUS_OBF: Final = 0x01
STATUS_SYSTEM: Final = 0x04
STATUS_COMMAND: Final = 0x08
#: Not locked: Linux warns of an active keylock otherwise.
STATUS_UNLOCKED: Final = 0x10
STATUS_AUX: Final = 0x20
STATUS_TIMEOUT: Final = 0x40

CTR_KBD_IRQ: Final = 0x01
CTR_AUX_IRQ: Final = 0x02
CTR_SYSTEM: Final = 0x04
CTR_KBD_DISABLED: Final = 0x10
CTR_AUX_DISABLED: Final = 0x20
CTR_TRANSLATE: Final = 0x40

#: Input port: no manufacturing jumper, colour display absent, keyboard not inhibited.
INPUT_PORT: Final = 0xB0
OUTPUT_NO_RESET: Final = 0x01
OUTPUT_A20: Final = 0x02
RESEND: Final = 0xFE
SELF_TEST_PASSED: Final = 0x55
#: Auxiliary clock line stuck low: there is no port.
AUX_TEST_FAILED: Final = 0x01
#: A controller buffers one byte; ours may hold the answers to a few commands sent in haste.
QUEUE_MAX: Final = 16

#: Commands followed by a byte on the data port.
WITH_BYTE: Final = frozenset({0xD1, 0xD2, 0xD3, 0xD4, *range(0x60, 0x80)})


@dataclass
class I8042State(DeviceState):
    """The registers, as firmware leaves them after its own tests."""

    kind = "i8042"

    ram: bytearray = memory(
        32, bytes([CTR_SYSTEM | CTR_TRANSLATE | CTR_KBD_IRQ | CTR_AUX_DISABLED])
    )
    output_port: int = register(OUTPUT_NO_RESET | OUTPUT_A20, 0xFF)
    answers: deque[int] = queue(QUEUE_MAX, 0xFF | (STATUS_AUX | STATUS_TIMEOUT) << 8)
    """Each a byte, and above it the bits of the status register that come with it."""
    last: int = register(0, 0xFF)
    expects: int = register(0, 0xFF)
    """The command whose byte is still to come; 0 is none."""
    last_was_command: bool = flag()


class I8042Core:
    """What the controller does. No bus, no threads, no I/O."""

    def __init__(self) -> None:
        self.state = I8042State()
        self._reset = False

    @property
    def irq(self) -> bool:
        """IRQ 1, the keyboard's."""
        answers = self.state.answers
        return bool(
            answers and not answers[0] >> 8 & STATUS_AUX and self.state.ram[0] & CTR_KBD_IRQ
        )

    def take_reset(self) -> bool:
        """Whether the guest pulsed the CPU's reset line since the last call."""
        reset, self._reset = self._reset, False
        return reset

    def read_status(self) -> int:
        status = STATUS_UNLOCKED | (self.state.ram[0] & CTR_SYSTEM)
        if self.state.last_was_command:
            status |= STATUS_COMMAND
        if self.state.answers:
            status |= STATUS_OBF | self.state.answers[0] >> 8
        return status

    def read_data(self) -> int:
        if self.state.answers:
            self.state.last = self.state.answers.popleft() & 0xFF
        return self.state.last

    def write_command(self, value: int) -> None:
        value &= 0xFF
        self.state.last_was_command = True
        self.state.expects = value if value in WITH_BYTE else 0
        match value:
            case _ if 0x20 <= value < 0x40:
                self._answer(self.state.ram[value & 0x1F])
            case 0xA7:
                self.state.ram[0] |= CTR_AUX_DISABLED
            case 0xA8:
                self.state.ram[0] &= ~CTR_AUX_DISABLED
            case 0xA9:
                self._answer(AUX_TEST_FAILED)
            case 0xAA:
                self.state.answers.clear()
                self.state.ram[0] |= CTR_SYSTEM
                self._answer(SELF_TEST_PASSED)
            case 0xAB:
                self._answer(0)
            case 0xAD:
                self.state.ram[0] |= CTR_KBD_DISABLED
            case 0xAE:
                self.state.ram[0] &= ~CTR_KBD_DISABLED
            case 0xC0:
                self._answer(INPUT_PORT)
            case 0xD0:
                self._answer(self.state.output_port)
            case _ if value >= 0xF0 and not value & OUTPUT_NO_RESET:
                # Pulse output bits: those that are 0 in the command go low for a moment.
                self._reset = True
            case _:
                pass

    def write_data(self, value: int) -> None:
        value &= 0xFF
        self.state.last_was_command = False
        expects, self.state.expects = self.state.expects, 0
        match expects:
            case _ if 0x60 <= expects < 0x80:
                self.state.ram[expects & 0x1F] = value
            case 0xD1:
                # A20 stays open whatever is written: no guest of ours needs it shut.
                self.state.output_port = value | OUTPUT_A20
                if not value & OUTPUT_NO_RESET:
                    self.state.output_port |= OUTPUT_NO_RESET
                    self._reset = True
            case 0xD2 | 0xD3:
                # The AUX loop answers as keyboard data, as on a controller without auxiliary
                # port: Linux then knows at once that there is none.
                self._answer(value)
            case 0xD4:
                self._answer(RESEND, STATUS_AUX | STATUS_TIMEOUT)
            case _:
                self._answer(RESEND, STATUS_TIMEOUT)

    def _answer(self, value: int, status: int = 0) -> None:
        if len(self.state.answers) < QUEUE_MAX:
            self.state.answers.append(value | status << 8)


class I8042(Adapter[I8042Core]):
    """The controller on a machine. Attach ``data`` at port 0x60 and ``status`` at 0x64."""

    def __init__(self, irq: Callable[[bool], None], reset: Callable[[], None]) -> None:
        super().__init__(I8042Core(), irq)
        self._reset = reset
        self.data = I8042Port(self._read_data, self._write_data)
        self.status = I8042Port(self._read_status, self._write_command)

    def _read_data(self) -> int:
        with self._lock:
            value = self._core.read_data()
        self._line.renew()
        return value

    def _read_status(self) -> int:
        with self._lock:
            return self._core.read_status()

    def _write_data(self, value: int) -> None:
        with self._lock:
            self._core.write_data(value)
            reset = self._core.take_reset()
        self._line.update()
        if reset:
            self._reset()

    def _write_command(self, value: int) -> None:
        with self._lock:
            self._core.write_command(value)
            reset = self._core.take_reset()
        self._line.update()
        if reset:
            self._reset()


class I8042Port:
    """One of the controller's two ports; each is one byte wide."""

    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read = read
        self._write = write

    def read(self, offset: int, size: int) -> int:
        if offset != 0 or size < 1:
            return all_ones(size)
        # The ports that follow are not this device's: they read as ones.
        return all_ones(size) & ~0xFF | self._read()

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size >= 1:
            self._write(value & 0xFF)
