"""An NVMe controller (NVM Express 1.4): its PCI function and registers (section 3).

Queues, commands and doorbells are ``NvmeQueues``, on the I/O thread.
"""

from __future__ import annotations

import logging
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import EngineError, Intx, MsixTable, NvmeQueues
from tetrarch._seldom import Seldom
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, flag, register
from tetrarch.errors import StateError
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction

if TYPE_CHECKING:
    from tetrarch._native import Disk, NvmeState, Vm

__all__ = ["NvmeController", "NvmeRegistersState"]

log = logging.getLogger(__name__)

#: Of nobody: drivers find the controller by its class, and have no exceptions for it.
VENDOR: Final = 0x1234
DEVICE: Final = 0x0CE1
#: Mass storage, non-volatile memory, NVM Express (NVMe 2.1.5).
CLASS: Final = 0x010802
MODEL: Final = "Tetrarch NVMe disk"

PAGE: Final = 0x1000
REGISTERS_BAR: Final = 0
DOORBELLS: Final = 0x1000
MSIX_BAR: Final = 4

#: Addresses of the admin queues (figure 68); the other registers are where they are read.
ASQ, ACQ = 0x28, 0x30

#: Entries of a queue less one; queues lie in one piece; 10 s to become ready; the NVM command
#: set; pages of 4 KiB.
CAP_VALUE: Final = 1023 | 1 << 16 | 20 << 24 | 1 << 37
VS_VALUE: Final = 0x0001_0400

# Controller configuration (3.1.5).
ENABLE: Final = 1 << 0
#: Command set, page size and arbitration: 0 is all there is.
CHOICES: Final = 0x7 << 4 | 0xF << 7 | 0x7 << 11
SHUTDOWN: Final = 0x3 << 14
CC_BITS: Final = ENABLE | CHOICES | SHUTDOWN | 0xFF << 16

# Controller status (3.1.6).
READY: Final = 1 << 0
FATAL: Final = 1 << 1
SHUTTING_DOWN: Final = 1 << 2
SHUT_DOWN: Final = 2 << 2

#: Numbers of entries less one: of commands, and of completions from bit 16.
AQA_BITS: Final = 0x0FFF_0FFF
_PAGE_MASK: Final = ~0xFFF & (1 << 64) - 1
_U32: Final = 0xFFFF_FFFF

#: For UUIDs of namespaces, which are the same at each start of a machine.
_NAMES: Final = uuid.UUID("2f2a6a0c-93a5-4bd1-8a4c-5d7f6f1c0b11")


@dataclass
class NvmeRegistersState(DeviceState):
    kind = "nvme"

    mask: int = register(0, 0xFFFF_FFFF)
    configuration: int = register(0, CC_BITS)
    ready: bool = flag()
    fatal: bool = flag()
    shutting_down: bool = flag()
    shut_down: bool = flag()
    """When it was saved."""
    aqa: int = register(0, AQA_BITS)
    asq: int = register(0, _PAGE_MASK)
    acq: int = register(0, _PAGE_MASK)


class NvmeController:
    """A controller with one disk, as a device to plug in.

    ``queues`` is the number of queue pairs for I/O; each has an interrupt of its own.
    """

    def __init__(
        self, vm: Vm, disk: Disk, *, name: str = "nvme", serial: str | None = None, queues: int = 1
    ) -> None:
        self.name = name
        self.disk = disk
        self._closed = False
        self.state = NvmeRegistersState()
        self._lock = threading.Lock()
        self._complaint = Seldom()
        self.msix = MsixTable(vm, queues + 1)
        line = Intx()
        self.queues = NvmeQueues(
            vm,
            name,
            disk,
            vendor=VENDOR,
            model=MODEL,
            serial=serial or name,
            uuid=uuid.uuid5(_NAMES, serial or name).bytes,
            interrupts=[self.msix.vector(number) for number in range(queues + 1)],
            line=line,
        )
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, revision=1, subsystem_vendor=VENDOR, subsystem=DEVICE),
            [
                Bar(
                    REGISTERS_BAR,
                    DOORBELLS + PAGE,
                    [
                        BarPart(0, DOORBELLS, _Registers(self)),
                        BarPart(DOORBELLS, PAGE, self.queues.doorbells()),
                    ],
                    wide=True,
                ),
                Bar(MSIX_BAR, PAGE, [BarPart(0, PAGE, self.msix)]),
            ],
            intx=line,
            on_bus_master=self.queues.set_master,
        )
        self.function.add_msix(self.msix, MSIX_BAR)

    # Registers

    def read_register(self, offset: int) -> int:
        """Of 32 bits, at a multiple of 4."""
        with self._lock:
            state = self.state
            match offset:
                case 0x00 | 0x04:  # CAP
                    return CAP_VALUE >> 8 * offset & _U32
                case 0x08:  # VS
                    return VS_VALUE
                case 0x0C | 0x10:  # INTMS, INTMC
                    return state.mask
                case 0x14:  # CC
                    return state.configuration
                case 0x1C:  # CSTS
                    return self._status()
                case 0x24:  # AQA
                    return state.aqa
                case 0x28 | 0x2C:  # ASQ
                    return state.asq >> 8 * (offset - ASQ) & _U32
                case 0x30 | 0x34:  # ACQ
                    return state.acq >> 8 * (offset - ACQ) & _U32
        return 0

    def write_register(self, offset: int, value: int) -> None:
        with self._lock:
            state = self.state
            match offset:
                case 0x0C:  # INTMS: ones set
                    self._set_mask(state.mask | value)
                case 0x10:  # INTMC: ones clear
                    self._set_mask(state.mask & ~value)
                case 0x14:  # CC
                    self._configure(value & CC_BITS)
                case 0x24:  # AQA
                    state.aqa = value & AQA_BITS
                case 0x28 | 0x2C:  # ASQ
                    state.asq = _half(state.asq, offset - ASQ, value)
                case 0x30 | 0x34:  # ACQ
                    state.acq = _half(state.acq, offset - ACQ, value)

    def _status(self) -> int:
        state = self.state
        status = (READY if state.ready else 0) | (FATAL if state.fatal else 0)
        if state.shutting_down:
            status |= SHUT_DOWN if self.queues.is_shut_down else SHUTTING_DOWN
        return status

    def _set_mask(self, mask: int) -> None:
        self.state.mask = mask
        self.queues.set_mask(mask)

    def _configure(self, value: int) -> None:
        state = self.state
        before, enabled = state.configuration, bool(state.configuration & ENABLE)
        # What is chosen stays while the controller is enabled.
        state.configuration = value if not enabled else value & ~CHOICES | before & CHOICES
        if value & ENABLE and not enabled:
            self._enable()
        elif enabled and not value & ENABLE:
            self._disable()
        if value & SHUTDOWN and not before & SHUTDOWN and not state.shutting_down:
            state.shutting_down = True
            self.queues.shut_down()

    def _enable(self) -> None:
        state = self.state
        try:
            if state.configuration & CHOICES:
                raise EngineError(f"there is no such configuration: {state.configuration:#x}")
            self.queues.enable(
                (state.asq, (state.aqa & 0xFFF) + 1), (state.acq, (state.aqa >> 16) + 1)
            )
        except EngineError as error:
            if self._complaint.due():
                log.warning(
                    "%s: its driver set it up in a way that cannot be: %s", self.name, error
                )
            state.fatal = True
        else:
            state.ready = True

    def _disable(self) -> None:
        """A reset by its driver: the places of the admin queues stay (7.3.2)."""
        self.queues.reset()
        state = self.state
        state.ready = state.fatal = state.shutting_down = False
        self._set_mask(0)

    # Life

    def resize(self, size: int) -> None:
        """Gives the disk another size, and the driver word of it."""
        self.disk.resize(size)
        self.queues.resized()

    def retry(self) -> None:
        """The machine goes on: what the host failed is tried anew."""
        if not self._closed:
            self.disk.retry()

    def reset(self) -> None:
        with self._lock:
            self._disable()
            self.state.reset()
        self.function.reset()

    def close(self) -> None:
        """Lets go of the image: the device is out, or the machine has ended."""
        self._closed = True
        self.queues.close()
        self.disk.close()

    def save(self) -> State:
        """To be called while the machine is held."""
        if self.queues.stopped:
            raise StateError(
                f"{self.name}: writes wait for room on the host",
                mend="make room, let the machine go on, and save it then",
            )
        with self._lock:
            self.state.shut_down = self.queues.is_shut_down
            state = self.state.save()
            queues = dict(self.queues.save()) if self.state.ready else {}
        return {"registers": state, "queues": queues, "pci": self.function.save()}

    def load(self, state: State) -> None:
        self.reset()
        parts = [state.get(name) for name in ("registers", "queues", "pci")]
        registers, queues, pci = (part if isinstance(part, dict) else {} for part in parts)
        self.function.load(pci)
        with self._lock:
            self.state.load(registers)
            self._set_mask(self.state.mask)
            if not self.state.ready:
                return
            try:
                self.queues.load(_checked(queues), self.state.shut_down)
            except EngineError as error:
                self.state.reset()
                raise StateError(
                    f"{self.name}: {error}", mend="make the machine as it was when it was saved"
                ) from error


def _half(register: int, shift_bytes: int, value: int) -> int:
    """An address, of which 32 bits are written."""
    kept = register & ~(_U32 << 8 * shift_bytes)
    return (kept | value << 8 * shift_bytes) & _PAGE_MASK


def _checked(queues: State) -> NvmeState:
    """What a file holds, as the form that it should have."""
    rows: dict[str, list[int]] = {}
    for name in ("submissions", "completions", "features", "requests", "events"):
        row = queues.get(name)
        if not isinstance(row, list) or not all(
            type(value) is int and 0 <= value < 1 << 64 for value in row
        ):
            raise EngineError(f"its saved {name} are none")
        rows[name] = row
    return {
        "submissions": rows["submissions"],
        "completions": rows["completions"],
        "features": rows["features"],
        "requests": rows["requests"],
        "events": rows["events"],
    }


class _Registers:
    """The page of registers: words of 32 bits, or two of them (3.1)."""

    def __init__(self, controller: NvmeController) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        at = offset & ~3
        value = self._controller.read_register(at)
        if size == 8 or offset - at + size > 4:
            value |= self._controller.read_register(at + 4) << 32
        return value >> 8 * (offset - at) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size < 4 or offset % size:
            return
        self._controller.write_register(offset, value & _U32)
        if size == 8:
            self._controller.write_register(offset + 4, value >> 32)
