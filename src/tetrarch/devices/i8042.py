"""The i8042 keyboard controller, with a keyboard and a mouse or without (IBM PS/2 Hardware
Interface Technical Reference, keyboard and auxiliary device controller, 1990).

Guests use it to reset the machine, and probe it while they start. A byte sent to a keyboard that is
not there is answered as by a real controller whose keyboard does not clock: status TIMEOUT and data
0xFE. Linux's libps2 takes that as an immediate failure, where silence would cost it a timeout for
each command.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tetrarch.devices._access import all_ones
from tetrarch.devices._adapter import Adapter
from tetrarch.devices._line import IrqLine
from tetrarch.devices._state import DeviceState, State, flag, memory, queue, register
from tetrarch.devices.input_user import Event, InputModel, InputUser
from tetrarch.devices.ps2 import RESEND, Ps2Core
from tetrarch.devices.ps2_keyboard import KEYBOARD, Ps2KeyboardCore
from tetrarch.devices.ps2_mouse import MOUSE, Ps2MouseCore
from tetrarch.errors import StateError

__all__ = [
    "AUX_GSI",
    "DATA_PORT",
    "GSI",
    "I8042",
    "STATUS_PORT",
    "I8042Core",
    "I8042Port",
    "I8042State",
    "Ps2Input",
]

DATA_PORT: Final = 0x60
STATUS_PORT: Final = 0x64
GSI: Final = 1
AUX_GSI: Final = 12

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
SELF_TEST_PASSED: Final = 0x55
#: Auxiliary clock line stuck low: there is no port.
AUX_TEST_FAILED: Final = 0x01
#: What the scan codes of set 2 become in set 1 where the command byte has CTR_TRANSLATE; what is
#: not in it stays as it is.
TRANSLATED: Final = bytes.fromhex(
    "ff43413f3d3b3c5864444240 3e0f2959 65382a70 1d10025a 66712c1f 1e11035b"
    "672e2d20 1205045c 68392f21 1413065d 69313023 2215075e 6a723224 1608095f"
    "6b332517 180b0a60 6c343526 27190c61 6d732874 1a0d626e 3a361c1b 752b6376"
    "55567778 797a0e7b 7c4f7d4b 477e7f6f 5253504c 4d480145 574e514a 37494654"
) + bytes([0x80, 0x81, 0x82, 0x41, 0x54])
#: In set 2 a byte of its own says that a key is released, in set 1 a bit.
SET_2_RELEASED: Final = 0xF0
SET_1_RELEASED: Final = 0x80

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
    releasing: bool = flag()
    """Of the keyboard's bytes that are translated: the next is that of a key which is released."""


class I8042Core:
    """What the controller does. No bus, no threads, no I/O."""

    def __init__(self, keyboard: Ps2Core | None = None, mouse: Ps2Core | None = None) -> None:
        self.state = I8042State()
        self.keyboard = keyboard
        self.mouse = mouse
        self._reset = False

    @property
    def irq(self) -> bool:
        """IRQ 1, the keyboard's."""
        answers = self.state.answers
        return bool(
            answers and not answers[0] >> 8 & STATUS_AUX and self.state.ram[0] & CTR_KBD_IRQ
        )

    @property
    def aux_irq(self) -> bool:
        """IRQ 12, the mouse's."""
        answers = self.state.answers
        return bool(answers and answers[0] >> 8 & STATUS_AUX and self.state.ram[0] & CTR_AUX_IRQ)

    def fill(self) -> None:
        """Takes the next byte of a device, if nothing waits to be read."""
        if self.state.answers:
            return
        enabled = ~self.state.ram[0]
        if self.keyboard is not None and enabled & CTR_KBD_DISABLED:
            while not self.state.answers and (value := self.keyboard.take()) is not None:
                self._hear(value)
        if self.mouse is not None and enabled & CTR_AUX_DISABLED and not self.state.answers:
            value = self.mouse.take()
            if value is not None:
                self._answer(value, STATUS_AUX)

    def _hear(self, value: int) -> None:
        """A byte of the keyboard."""
        if not self.state.ram[0] & CTR_TRANSLATE:
            self._answer(value)
        elif value == SET_2_RELEASED:
            self.state.releasing = True
        else:
            code = TRANSLATED[value] if value < len(TRANSLATED) else value
            self._answer(code | SET_1_RELEASED if self.state.releasing else code)
            self.state.releasing = False

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
        self.fill()
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
                self._answer(AUX_TEST_FAILED if self.mouse is None else 0)
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
        self.fill()

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
            case 0xD2:
                self._answer(value)
            case 0xD3:
                # Without a mouse it answers as keyboard data, as a controller without auxiliary
                # port: Linux then knows at once that there is none.
                self._answer(value, 0 if self.mouse is None else STATUS_AUX)
            case 0xD4 if self.mouse is not None:
                self.state.ram[0] &= ~CTR_AUX_DISABLED
                self.mouse.write(value)
            case 0xD4:
                self._answer(RESEND, STATUS_AUX | STATUS_TIMEOUT)
            case _ if self.keyboard is not None:
                # Whoever writes to the keyboard wants its answer.
                self.state.ram[0] &= ~CTR_KBD_DISABLED
                self.keyboard.write(value)
            case _:
                self._answer(RESEND, STATUS_TIMEOUT)
        self.fill()

    def _answer(self, value: int, status: int = 0) -> None:
        if len(self.state.answers) < QUEUE_MAX:
            self.state.answers.append(value | status << 8)


class I8042(Adapter[I8042Core]):
    """The controller on a machine. Attach ``data`` at port 0x60 and ``status`` at 0x64."""

    def __init__(
        self,
        irq: Callable[[bool], None],
        reset: Callable[[], None],
        aux_irq: Callable[[bool], None] = lambda level: None,
        *,
        keyboard: bool = False,
        mouse: bool = False,
    ) -> None:
        core = I8042Core(Ps2KeyboardCore() if keyboard else None, Ps2MouseCore() if mouse else None)
        super().__init__(core, irq)
        self._aux_line = IrqLine(aux_irq, self._aux_wanted)
        self._reset = reset
        self.data = I8042Port(self._read_data, self._write_data)
        self.status = I8042Port(self._read_status, self._write_command)
        self.keyboard = self._user("ps2-keyboard", KEYBOARD, core.keyboard)
        """What is plugged in, for a program."""
        self.mouse = self._user("ps2-mouse", MOUSE, core.mouse)

    def _user(self, name: str, model: InputModel, device: Ps2Core | None) -> Ps2Input | None:
        if device is None:
            return None
        return Ps2Input(name, model, device, self._core, self._lock, self._update)

    def _aux_wanted(self) -> bool:
        with self._lock:
            return self._core.aux_irq

    def _update(self) -> None:
        self._line.update()
        self._aux_line.update()

    def _read_data(self) -> int:
        with self._lock:
            value = self._core.read_data()
            for device in (self.keyboard, self.mouse):
                if device is not None:
                    device.moved_on()
        self._line.renew()
        self._aux_line.renew()
        return value

    def _read_status(self) -> int:
        with self._lock:
            return self._core.read_status()

    def _write_data(self, value: int) -> None:
        with self._lock:
            self._core.write_data(value)
            reset = self._core.take_reset()
        self._update()
        if reset:
            self._reset()

    def _write_command(self, value: int) -> None:
        with self._lock:
            self._core.write_command(value)
            reset = self._core.take_reset()
        self._update()
        if reset:
            self._reset()

    @property
    def _plugged(self) -> Mapping[str, Ps2Core]:
        named = (("keyboard", self._core.keyboard), ("mouse", self._core.mouse))
        return {name: device for name, device in named if device is not None}

    def reset(self) -> None:
        with self._lock:
            for device in self._plugged.values():
                device.state.reset()
        super().reset()
        self._aux_line.update()

    def save(self) -> State:
        with self._lock:
            plugged = {name: device.state.save() for name, device in self._plugged.items()}
            return self._core.state.save() | {"plugged": plugged}

    def load(self, state: Mapping[str, Any]) -> None:
        plugged = state.get("plugged")
        with self._lock:
            if not isinstance(plugged, dict) or plugged.keys() != self._plugged.keys():
                raise StateError(
                    "saved state of 'i8042' has another keyboard or mouse",
                    mend="make the machine as it was when it was saved",
                )
            for name, device in self._plugged.items():
                device.state.load(plugged[name])
            self._core.state.load(state)
        self._update()


class Ps2Input(InputUser):
    """A keyboard or mouse at the controller: a device of ``Machine.inputs``."""

    def __init__(
        self,
        name: str,
        model: InputModel,
        device: Ps2Core,
        core: I8042Core,
        lock: threading.Lock,
        update: Callable[[], None],
    ) -> None:
        super().__init__(name, model, lock)
        self._device = device
        self._core = core
        self._update = update

    @property
    def leds(self) -> frozenset[str]:
        with self._lock:
            return self._device.leds

    def moved_on(self) -> None:
        """The guest has read a byte. The lock is held."""
        self._moved_on.notify_all()

    def _admit(self, events: Sequence[Event]) -> bool:
        taken = self._device.admit(events)
        self._core.fill()
        return taken

    def _sent(self) -> None:
        self._update()


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
