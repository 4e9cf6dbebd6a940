"""The i8042 keyboard controller, with nothing plugged in.

Guests use it to reset the machine, and probe it while they start. A byte sent to the absent
keyboard is answered as by a real controller whose keyboard does not clock: status TIMEOUT and data
0xFE (IBM PS/2 Technical Reference, keyboard and auxiliary device controller). Linux's libps2 takes
that as an immediate failure, where silence would cost it a timeout for each command.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from tetrarch.devices import _state
from tetrarch.devices._access import all_ones
from tetrarch.devices._line import IrqLine

__all__ = ["DATA_PORT", "GSI", "I8042", "STATUS_PORT", "I8042Core", "I8042Port"]

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


class I8042Core:
    """The controller's registers. No bus, no threads, no I/O."""

    def __init__(self) -> None:
        # As firmware leaves it after its own tests.
        self._ram = bytearray(32)
        self._ram[0] = CTR_SYSTEM | CTR_TRANSLATE | CTR_KBD_IRQ | CTR_AUX_DISABLED
        self._output_port = OUTPUT_NO_RESET | OUTPUT_A20
        self._queue: deque[tuple[int, int]] = deque()
        self._last = 0
        self._expects = 0
        self._last_was_command = False
        self._reset = False

    @property
    def irq(self) -> bool:
        """IRQ 1, the keyboard's."""
        return bool(
            self._queue and not self._queue[0][1] & STATUS_AUX and self._ram[0] & CTR_KBD_IRQ
        )

    def take_reset(self) -> bool:
        """Whether the guest pulsed the CPU's reset line since the last call."""
        reset, self._reset = self._reset, False
        return reset

    def read_status(self) -> int:
        status = STATUS_UNLOCKED | (self._ram[0] & CTR_SYSTEM)
        if self._last_was_command:
            status |= STATUS_COMMAND
        if self._queue:
            status |= STATUS_OBF | self._queue[0][1]
        return status

    def read_data(self) -> int:
        if self._queue:
            self._last = self._queue.popleft()[0]
        return self._last

    def write_command(self, value: int) -> None:
        value &= 0xFF
        self._last_was_command = True
        self._expects = value if value in WITH_BYTE else 0
        match value:
            case _ if 0x20 <= value < 0x40:
                self._answer(self._ram[value & 0x1F])
            case 0xA7:
                self._ram[0] |= CTR_AUX_DISABLED
            case 0xA8:
                self._ram[0] &= ~CTR_AUX_DISABLED
            case 0xA9:
                self._answer(AUX_TEST_FAILED)
            case 0xAA:
                self._queue.clear()
                self._ram[0] |= CTR_SYSTEM
                self._answer(SELF_TEST_PASSED)
            case 0xAB:
                self._answer(0)
            case 0xAD:
                self._ram[0] |= CTR_KBD_DISABLED
            case 0xAE:
                self._ram[0] &= ~CTR_KBD_DISABLED
            case 0xC0:
                self._answer(INPUT_PORT)
            case 0xD0:
                self._answer(self._output_port)
            case _ if value >= 0xF0 and not value & OUTPUT_NO_RESET:
                # Pulse output bits: those that are 0 in the command go low for a moment.
                self._reset = True
            case _:
                pass

    def write_data(self, value: int) -> None:
        value &= 0xFF
        self._last_was_command = False
        expects, self._expects = self._expects, 0
        match expects:
            case _ if 0x60 <= expects < 0x80:
                self._ram[expects & 0x1F] = value
            case 0xD1:
                # A20 stays open whatever is written: no guest of ours needs it shut.
                self._output_port = value | OUTPUT_A20
                if not value & OUTPUT_NO_RESET:
                    self._output_port |= OUTPUT_NO_RESET
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
        if len(self._queue) < QUEUE_MAX:
            self._queue.append((value, status))

    def save(self) -> _state.State:
        return {
            "device": "i8042",
            "version": 1,
            "ram": list(self._ram),
            "output_port": self._output_port,
            "queue": [data | status << 8 for data, status in self._queue],
            "last": self._last,
            "expects": self._expects,
            "last_was_command": self._last_was_command,
        }

    def load(self, state: _state.State) -> None:
        _state.check(state, "i8042", 1)
        ram = [int(byte) & 0xFF for byte in state["ram"]][:32]
        self._ram = bytearray(ram).ljust(32, b"\0")
        self._output_port = int(state["output_port"]) & 0xFF
        queue = state["queue"][:QUEUE_MAX]
        self._queue = deque((int(item) & 0xFF, int(item) >> 8 & 0x60) for item in queue)
        self._last = int(state["last"]) & 0xFF
        expects = int(state["expects"])
        self._expects = expects if expects in WITH_BYTE else 0
        self._last_was_command = bool(state["last_was_command"])
        self._reset = False


class I8042:
    """The controller on a machine. Attach ``data`` at port 0x60 and ``status`` at 0x64."""

    def __init__(self, irq: Callable[[bool], None], reset: Callable[[], None]) -> None:
        self._core = I8042Core()
        self._reset = reset
        self._lock = threading.Lock()
        self._line = IrqLine(irq, self._wanted)
        self.data = I8042Port(self._read_data, self._write_data)
        self.status = I8042Port(self._read_status, self._write_command)

    def _wanted(self) -> bool:
        with self._lock:
            return self._core.irq

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

    def save(self) -> _state.State:
        with self._lock:
            return self._core.save()

    def load(self, state: _state.State) -> None:
        with self._lock:
            self._core.load(state)
        self._line.update()


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
