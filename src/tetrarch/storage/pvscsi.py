"""VMware's paravirtual SCSI controller (Linux, drivers/scsi/vmw_pvscsi.h): its PCI function, and
the registers of its commands.

Rings, targets and the registers of requests and interrupts are ``PvscsiRings``, on the I/O thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tetrarch._native import EngineError, Intx, MsiVectors, MsixTable, PvscsiRings
from tetrarch._patience import patience
from tetrarch._seldom import Seldom
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, queue, register
from tetrarch.errors import ConfigError, StateError
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction
from tetrarch.storage.drives import ScsiDrive, drive_form, refuse_stopped

if TYPE_CHECKING:
    from tetrarch._native import PvscsiState, Vm

__all__ = ["PvscsiController", "PvscsiRegistersState"]

log = logging.getLogger(__name__)

VENDOR: Final = 0x15AD
DEVICE: Final = 0x07C0
#: Mass storage, Serial Attached SCSI, as VMware's own is; revision 2 has messages.
CLASS: Final = 0x010700
REVISION: Final = 2

PAGE: Final = 0x1000
BAR: Final = 0
BAR_BYTES: Final = 8 * PAGE
#: Pages of what is ``PvscsiRings``, and that of MSI-X.
RINGS: Final = PAGE
RINGS_BYTES: Final = 4 * PAGE
MSIX: Final = 6 * PAGE

# Registers of the first page.
COMMAND: Final = 0x0
COMMAND_DATA: Final = 0x4
COMMAND_STATUS: Final = 0x8

# Commands.
ADAPTER_RESET, ISSUE_SCSI, SETUP_RINGS, RESET_BUS, RESET_DEVICE = 1, 2, 3, 4, 5
ABORT_CMD, CONFIG, SETUP_MSG_RING, SETUP_REQCALLTHRESHOLD = 6, 7, 8, 10

_RING, _MESSAGES = PvscsiRings.MAX_RING_PAGES, PvscsiRings.MAX_MESSAGE_PAGES
#: How many words of 32 bits of data each command takes.
WORDS: Final = {
    ADAPTER_RESET: 0,
    ISSUE_SCSI: 4,
    SETUP_RINGS: 4 + 2 * 2 * _RING,
    RESET_BUS: 0,
    RESET_DEVICE: 3,
    ABORT_CMD: 4,
    CONFIG: 6,
    SETUP_MSG_RING: 2 + 2 * _MESSAGES,
    SETUP_REQCALLTHRESHOLD: 1,
}
#: The status of a command that is not known, or has failed.
FAILED: Final = 0xFFFF_FFFF
_U32: Final = 0xFFFF_FFFF

#: How often a driver is looked after that is to let go of a target.
_POLL_S: Final = 0.02


@dataclass
class PvscsiRegistersState(DeviceState):
    kind = "pvscsi"

    command: int = register(0, 0xFF)
    """The one that takes data; 0 where none does."""
    words: deque[int] = queue(WORDS[SETUP_RINGS], _U32)
    """Its data, so far."""
    status: int = register(0, _U32)


class PvscsiController:
    """A controller with a drive at each of its targets, as a device to plug in.

    Drives are those of the first targets. Others can come, and go, while the guest runs.
    """

    TARGETS: Final = PvscsiRings.MAX_TARGETS

    def __init__(self, vm: Vm, drives: Sequence[ScsiDrive] = (), *, name: str = "pvscsi") -> None:
        if len(drives) > self.TARGETS:
            raise ConfigError(
                f"a PVSCSI controller has {self.TARGETS} drives at most, not {len(drives)}",
                mend="put further ones at another controller",
            )
        self.name = name
        self.drives: dict[int, ScsiDrive] = {}
        """By their targets."""
        self.state = PvscsiRegistersState()
        self._closed = False
        self._lock = threading.Lock()
        self._complaint = Seldom()
        line, messages, self.msix = Intx(), MsiVectors(vm, 1), MsixTable(vm, 1)
        self.rings = PvscsiRings(vm, name, line, [messages.vector(0), self.msix.vector(0)])
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, REVISION, subsystem_vendor=VENDOR, subsystem=DEVICE),
            [
                Bar(
                    BAR,
                    BAR_BYTES,
                    [
                        BarPart(0, PAGE, _Commands(self)),
                        BarPart(RINGS, RINGS_BYTES, self.rings),
                        BarPart(MSIX, PAGE, self.msix),
                    ],
                )
            ],
            intx=line,
            on_bus_master=self.rings.set_master,
        )
        self.function.add_msi(messages)
        self.function.add_msix(self.msix, BAR, MSIX)
        for drive in drives:
            self.attach(drive)

    # Targets

    def attach(self, drive: ScsiDrive, target: int | None = None) -> int:
        """Puts a drive at a target, the first that is free unless one is named; gives its number.
        A driver that runs is told. Raises ConfigError where there is none."""
        with self._lock:
            free = [number for number in range(self.TARGETS) if number not in self.drives]
            if (target is None and not free) or (target is not None and target not in free):
                what = "is full" if target is None else f"has no free target {target}"
                raise ConfigError(f"{self.name} {what}", mend="take another controller")
            number = free[0] if target is None else target
            self.rings.attach(number, drive_form(drive))
            self.drives[number] = drive
            return number

    def detach(self, target: int, *, timeout: float | None = 30.0) -> None:
        """Takes a drive away and closes its image, when its driver has let go of it.

        Raises LookupError where there is none, and TimeoutError where the driver has not after
        ``timeout`` seconds: then it may still do so, and the drive stays.
        """
        limit = patience(timeout)
        gone = LookupError(f"{self.name} has no target {target}")
        drive = self.drives.get(target)
        if drive is None:
            raise gone
        self.rings.ask_to_leave(target)
        end = None if limit is None else time.monotonic() + limit
        # Its driver says so in memory alone.
        while not self.rings.has_left(target):
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(
                    f"the guest has not given target {target} of {self.name} up; end what uses it"
                )
            time.sleep(_POLL_S)
        with self._lock:
            if self.drives.get(target) is not drive:
                raise gone  # somebody else was faster
            del self.drives[target]
            self.rings.detach(target)
        drive.disk.close()

    # Registers

    def read_register(self, offset: int) -> int:
        """Of 32 bits, at a multiple of 4."""
        return self.state.status if offset == COMMAND_STATUS else 0

    def write_register(self, offset: int, value: int) -> None:
        with self._lock:
            state = self.state
            if offset == COMMAND:
                state.words.clear()
                known = value in WORDS
                state.command = value if known else 0
                # How many words are wanted: by this drivers ask whether there is a command.
                state.status = WORDS[value] if known else FAILED
            elif offset == COMMAND_DATA and state.command:
                state.words.append(value)
            else:
                return
            if state.command and len(state.words) == WORDS[state.command]:
                self._execute()

    def _execute(self) -> None:
        state = self.state
        command, words = state.command, list(state.words)
        state.command, state.status = 0, 0
        state.words.clear()
        try:
            self._carry_out(command, words)
        except EngineError as error:
            state.status = FAILED
            if self._complaint.due():
                log.warning("%s: its driver's command %d: %s", self.name, command, error)

    def _carry_out(self, command: int, words: list[int]) -> None:
        rings, state = self.rings, self.state
        if command == ADAPTER_RESET:
            rings.reset_adapter()
        elif command == ISSUE_SCSI:
            rings.issue(*_quads(words))
        elif command == SETUP_RINGS:
            requests, completions = words[:2]
            pages, first = _quads(words[2:]), 1 + _RING
            _at_most(_RING, requests, completions)
            rings.set_up_rings(pages[0], pages[1 : 1 + requests], pages[first:][:completions])
        elif command == RESET_BUS:
            rings.reset_targets()
        elif command == RESET_DEVICE:
            if any(words[1:]):  # each target has unit 0 alone
                raise EngineError("there is no such unit")
            rings.reset_targets(words[0])
        elif command == ABORT_CMD:
            rings.abort()
        elif command == CONFIG:
            at, address = _quads(words[:4])
            rings.configuration(words[4], address, at)
        elif command == SETUP_MSG_RING:
            _at_most(_MESSAGES, words[0])
            rings.set_up_messages(_quads(words[2:])[: words[0]])
            state.status = WORDS[SETUP_MSG_RING]
        elif command == SETUP_REQCALLTHRESHOLD:
            rings.set_threshold(bool(words[0]))
            state.status = int(bool(words[0]))  # whether it is on now

    # Life

    def retry(self) -> None:
        """The machine goes on: what the host failed is tried anew."""
        for drive in () if self._closed else list(self.drives.values()):
            drive.disk.retry()

    def reset(self) -> None:
        with self._lock:
            self.rings.reset()
            self.state.reset()
        self.function.reset()

    def close(self) -> None:
        """Lets go of the images: the device is out, or the machine has ended."""
        self._closed = True
        self.rings.close()
        for drive in self.drives.values():
            drive.disk.close()

    def save(self) -> State:
        """To be called while the machine is held."""
        refuse_stopped(list(self.drives.values()), self.rings.stopped)
        with self._lock:
            registers = self.state.save()
        return {
            "registers": registers,
            "rings": dict(self.rings.save()),
            "pci": self.function.save(),
        }

    def load(self, state: State) -> None:
        self.reset()
        registers, pci = (state.get(part) for part in ("registers", "pci"))
        self.function.load(pci if isinstance(pci, dict) else {})
        with self._lock:
            self.state.load(registers if isinstance(registers, dict) else {})
            if len(self.state.words) >= WORDS.get(self.state.command, 0):
                self.state.command = 0  # none that waits for data
            try:
                rings: PvscsiState = state["rings"]
                self.rings.load(rings)
            except (EngineError, KeyError, TypeError, ValueError, OverflowError) as error:
                self.state.reset()
                raise StateError(
                    f"{self.name}: a saved PVSCSI controller is damaged, or of another",
                    mend="make the machine as it was when it was saved",
                ) from error


def _quads(words: Sequence[int]) -> list[int]:
    """Numbers of 64 bits, the low half first."""
    return [low | high << 32 for low, high in zip(words[::2], words[1::2], strict=True)]


def _at_most(most: int, *counts: int) -> None:
    if any(count > most for count in counts):
        raise EngineError(f"a ring of more than {most} pages")


class _Commands:
    """The page of the registers for commands: words of 32 bits."""

    def __init__(self, controller: PvscsiController) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        at = offset & ~3
        return self._controller.read_register(at) >> 8 * (offset - at) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if size >= 4:
            self._controller.write_register(offset, value & _U32)
