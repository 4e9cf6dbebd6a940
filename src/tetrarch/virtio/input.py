"""Input devices (virtio 1.2, 5.8): a keyboard, a mouse, a tablet, whose user is a program.

Events are rare, so all of it is Python. A report is a change of the device up to its SYN_REPORT.
One that is taken waits until the driver has buffers for all of its events; one for which there is
no room is dropped as a whole (5.8.6.1).
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tetrarch.devices import input_codes as codes
from tetrarch.devices._state import DeviceState, queue, register
from tetrarch.devices.input_user import ABS_MAX, Event, InputModel, InputUser
from tetrarch.virtio.served import DeviceQueues, ServedKind

if TYPE_CHECKING:
    from tetrarch._native import VirtioChain, Vm

__all__ = ["MODELS", "InputDevice", "InputKind", "InputState", "VirtioModel"]

# Queues (5.8.2).
EVENTS: Final = 0
STATUS: Final = 1

# What ``select`` asks for (5.8.4).
ID_NAME: Final = 0x01
ID_SERIAL: Final = 0x02
ID_DEVIDS: Final = 0x03
EV_BITS: Final = 0x11
ABS_INFO: Final = 0x12

#: struct virtio_input_config: select, subsel, size, then the answer at 8.
_CONFIG: Final = struct.Struct("<BBB5x128s")
_SELECTORS: Final = 2
#: struct virtio_input_event: type, code, value.
_EVENT: Final = struct.Struct("<HHi")
#: struct virtio_input_absinfo: least, most, fuzz, flat, resolution.
_ABS_INFO: Final = struct.Struct("<5I")
#: struct virtio_input_devids: bus, vendor, product, version.
_DEVICE_IDS: Final = struct.Struct("<4H")
_VENDOR: Final = 0x1AF4

#: Events that may wait for buffers.
_WAITING_MAX: Final = 1024
#: Linux puts one event into a buffer of the status queue; others may put several.
_STATUS_BYTES_MAX: Final = 64 * _EVENT.size


@dataclass(frozen=True)
class VirtioModel(InputModel):
    title: str = ""
    product: int = 0


#: As the option ``input`` names them.
MODELS: Final[Mapping[str, VirtioModel]] = {
    "keyboard": VirtioModel(
        codes.KEYS,
        {
            codes.EV_LED: tuple(codes.LEDS.values()),
            # The guest repeats a key that stays down.
            codes.EV_REP: (codes.REP_DELAY, codes.REP_PERIOD),
        },
        "Tetrarch keyboard",
        1,
    ),
    "mouse": VirtioModel(
        codes.BUTTONS,
        {codes.EV_REL: (codes.REL_X, codes.REL_Y, codes.REL_HWHEEL, codes.REL_WHEEL)},
        "Tetrarch mouse",
        2,
    ),
    "tablet": VirtioModel(
        codes.BUTTONS,
        {
            codes.EV_REL: (codes.REL_HWHEEL, codes.REL_WHEEL),
            codes.EV_ABS: (codes.ABS_X, codes.ABS_Y),
        },
        "Tetrarch tablet",
        3,
    ),
}


@dataclass
class InputState(DeviceState):
    kind = "input"

    select: int = register(0, 0xFF)
    subsel: int = register(0, 0xFF)
    leds: int = register(0, sum(1 << code for code in codes.LEDS.values()))
    waiting: deque[int] = queue(_WAITING_MAX, (1 << 64) - 1)
    """Events that have no buffer yet, each as the number that its bytes are."""


class InputDevice(InputUser):
    """An input device of virtio: a device of ``Machine.inputs``."""

    device_id: Final = 18
    features: Final = 0
    queue_sizes: Final[Sequence[int]] = (64, 64)
    inputs: Final = (EVENTS,)

    def __init__(self, model: str, serial: str) -> None:
        """``model`` is one of MODELS."""
        self._what = MODELS[model]
        super().__init__(model, self._what, threading.Lock())
        self._serial = serial.encode()
        self._state = InputState()
        self._ready = False

    @property
    def leds(self) -> frozenset[str]:
        """Those that the guest has lit: of "num", "caps", "scroll"."""
        lit = self._state.leds
        return frozenset(name for name, code in codes.LEDS.items() if lit >> code & 1)

    def _admit(self, events: Sequence[Event]) -> bool:
        waiting = self._state.waiting
        if not self._ready or len(waiting) + len(events) > _WAITING_MAX:
            return False
        waiting.extend(int.from_bytes(_EVENT.pack(*event), "little") for event in events)
        self._pump()
        return True

    def _pump(self) -> None:
        waiting = self._state.waiting
        while waiting and (chain := self._queues.take(EVENTS)) is not None:
            # A buffer in which no event has room goes back empty.
            if chain.writable >= _EVENT.size:
                chain.write(waiting.popleft().to_bytes(_EVENT.size, "little"))
            chain.done()

    # What the device's registers and queues ask

    @property
    def config(self) -> bytes:
        answer = self._answer()
        return _CONFIG.pack(self._state.select, self._state.subsel, len(answer), answer)

    def _answer(self) -> bytes:
        """Nothing, for a size of 0, where there is no such thing (5.8.5.1)."""
        select, subsel = self._state.select, self._state.subsel
        if select == EV_BITS:
            bits = sum(1 << code for code in self._model.codes(subsel))
            return bits.to_bytes((bits.bit_length() + 7) // 8, "little")
        if select == ABS_INFO and subsel in self._model.codes(codes.EV_ABS):
            return _ABS_INFO.pack(0, ABS_MAX, 0, 0, 0)
        ids = {
            ID_NAME: self._what.title.encode(),
            ID_SERIAL: self._serial,
            ID_DEVIDS: _DEVICE_IDS.pack(codes.BUS_VIRTUAL, _VENDOR, self._what.product, 1),
        }
        return ids.get(select, b"") if subsel == 0 else b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Only the two selectors are the driver's to write."""
        for at, value in enumerate(data[: max(0, _SELECTORS - offset)], start=offset):
            if at == 0:
                self._state.select = value
            else:
                self._state.subsel = value

    def attached(self, queues: DeviceQueues) -> None:
        self._queues = queues

    def negotiated(self, features: int) -> None:
        with self._moved_on:
            self._ready = bool(features)
            if not features:  # reset
                self._state.reset()
            self._moved_on.notify_all()

    def buffers(self, queue: int) -> None:
        with self._moved_on:
            self._pump()
            self._moved_on.notify_all()

    def handle(self, queue: int, chain: VirtioChain) -> None:
        """The guest lights and puts out LEDs."""
        data = chain.read(_STATUS_BYTES_MAX)
        whole = len(data) // _EVENT.size * _EVENT.size
        has = tuple(self._model.codes(codes.EV_LED))
        for type_, code, value in _EVENT.iter_unpack(data[:whole]):
            if type_ == codes.EV_LED and code in has:
                others = self._state.leds & ~(1 << code)
                self._state.leds = others | bool(value) << code

    def save(self) -> dict[str, Any]:
        with self._lock:
            return self._state.save()

    def load(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._state.load(state)


class InputKind(ServedKind):
    """An input device in its machine."""

    def __init__(self, vm: Vm, model: str, name: str, end: Callable[[BaseException], None]) -> None:
        self.device = InputDevice(model, name)
        super().__init__(vm, self.device, name, end)
