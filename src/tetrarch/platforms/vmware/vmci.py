"""VMCI, VMware's communication interface (Linux, include/linux/vmw_vmci_defs.h and
drivers/misc/vmw_vmci): a PCI function by which the guest's kernel asks its hypervisor, and by
which it is woken.

A question is a datagram, written byte by byte to one port; its answer is a number in a register. To
be woken the guest gives a page of flags, and links a doorbell, that it names to others, to one of
them: who rings it sets the flag and raises an interrupt. Nobody sends datagrams to the guest, and
there are no queue pairs, which VMware's sockets would need.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import Intx, MsiVectors, MsixTable
from tetrarch.devices._access import all_ones
from tetrarch.devices._state import DeviceState, State, flag, queue, register
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["Doorbell", "Vmci", "VmciState"]

VENDOR: Final = 0x15AD
DEVICE: Final = 0x0740
#: A system peripheral of no other kind; revision 0x10 is that of VMware's own.
CLASS: Final = 0x088000
REVISION: Final = 0x10

PORTS_BAR: Final = 0
PORTS: Final = 64
MSIX_BAR: Final = 2
MSIX_BYTES: Final = 0x1000

# Registers.
STATUS, CONTROL, ICR, IMR = 0x00, 0x04, 0x08, 0x0C
DATA_OUT, DATA_IN, CAPS = 0x10, 0x14, 0x18
RESULT_LOW, RESULT_HIGH = 0x1C, 0x20

INTERRUPTS_ON: Final = 1 << 0
CONTROL_RESET, ENABLE_INTERRUPTS, DISABLE_INTERRUPTS = 1 << 0, 1 << 1, 1 << 2
CAPS_DATAGRAM, CAPS_NOTIFICATIONS, CAPS_PPN64 = 1 << 2, 1 << 3, 1 << 4
#: Of ICR and IMR. With two vectors each has its own: 0 and 1.
NOTIFICATION: Final = 1 << 1
VECTORS: Final = 2

#: Whom a datagram is for.
HYPERVISOR: Final = 0
#: The guest's own number; those up to 2 are hypervisor and host.
GUEST: Final = 3
#: Destination, source, and bytes that follow.
_HEADER: Final = struct.Struct("<IIIIQ")
MAX_DATAGRAM: Final = 17 * 4096

# Questions to the hypervisor.
RESOURCES_QUERY, GET_CONTEXT_ID, SET_NOTIFY_BITMAP = 0, 1, 2
DOORBELL_LINK, DOORBELL_UNLINK, DOORBELL_NOTIFY = 3, 4, 5

# Answers.
SUCCESS: Final = 0
INVALID_RESOURCE, INVALID_ARGS, DST_UNREACHABLE = -1, -2, -10
PAYLOAD_TOO_LARGE, NO_RESOURCES, NOT_FOUND, ALREADY_EXISTS = -11, -19, -21, -22

PAGE: Final = 4096
#: Flags of the page, of a byte each, and so doorbells that there can be.
FLAGS: Final = PAGE
_U32: Final = 0xFFFF_FFFF

Doorbell = tuple[int, int]
"""Its context, and its number there."""


@dataclass
class VmciState(DeviceState):
    kind = "vmci"

    imr: int = register(0, _U32)
    icr: int = register(0, NOTIFICATION)
    interrupts: bool = flag()
    caps: int = register(0, CAPS_DATAGRAM | CAPS_NOTIFICATIONS | CAPS_PPN64)
    """Those that the guest uses."""
    result: int = register(0, _U32)
    flags_page: int = register(0, (1 << 52) - 1)
    """Where the flags are, as a page's number; 0: nowhere."""
    datagram: deque[int] = queue(MAX_DATAGRAM)
    """As far as it has come."""
    doorbells: deque[int] = queue(3 * FLAGS, _U32)
    """Context, number and flag of each."""


class Vmci:
    """The function, as a device to plug in.

    Lock: ``_lock``, for all of the state; interrupts are raised under it.
    """

    def __init__(self, vm: Vm, *, notifications: bool = True) -> None:
        """Without ``notifications`` nobody can ring: what the host does to the guest's memory by
        itself would be in no recording."""
        self.notifications = notifications
        self.state = VmciState()
        self._vm = vm
        self._doorbells: dict[Doorbell, int] = {}
        self._lock = threading.Lock()
        self._line = Intx()
        messages, self._msix = MsiVectors(vm, 1), MsixTable(vm, VECTORS)
        self._interrupts = [messages.vector(0), self._msix.vector(1)]
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, REVISION, subsystem_vendor=VENDOR, subsystem=DEVICE),
            [
                Bar(PORTS_BAR, PORTS, [BarPart(0, PORTS, _Ports(self))], io=True),
                Bar(MSIX_BAR, MSIX_BYTES, [BarPart(0, MSIX_BYTES, self._msix)]),
            ],
            intx=self._line,
        )
        self.function.add_msi(messages)
        self.function.add_msix(self._msix, MSIX_BAR)

    def ring(self, doorbell: Doorbell) -> bool:
        """From any thread; False where the guest has no such doorbell."""
        with self._lock:
            return self._ring(doorbell)

    def _ring(self, doorbell: Doorbell) -> bool:
        number, page = self._doorbells.get(doorbell), self.state.flags_page
        if number is None or not page or not self.function.bus_master:
            return False
        at = page * PAGE + number
        (old,) = self._vm.read_memory(at, 1)
        self._vm.write_memory(at, bytes([old | 1]))
        self.state.icr |= NOTIFICATION
        self._update()
        if self.state.interrupts and self.state.imr & NOTIFICATION:
            for interrupt in self._interrupts:
                interrupt.trigger()
        return True

    def _update(self) -> None:
        """The line; messages are sent once."""
        state = self.state
        self._line.set(state.interrupts and bool(state.icr & state.imr))

    # Registers

    def read_register(self, offset: int) -> int:
        """Of 32 bits."""
        with self._lock:
            state, value = self.state, 0
            if offset == STATUS:
                value = INTERRUPTS_ON if state.interrupts else 0
            elif offset == ICR:  # to read it is to acknowledge
                value, state.icr = state.icr, 0
                self._update()
            elif offset == IMR:
                value = state.imr
            elif offset == DATA_IN:
                value = _U32  # the head of a datagram for nobody: there is none
            elif offset == CAPS:
                value = CAPS_DATAGRAM | CAPS_PPN64
                value |= CAPS_NOTIFICATIONS if self.notifications else 0
            elif offset == RESULT_LOW:
                state.datagram.clear()  # who asks for the answer has sent all
                value = state.result
            elif offset == RESULT_HIGH:
                value = _U32 if state.result >> 31 else 0
            return value

    def write_register(self, offset: int, value: int) -> None:
        with self._lock:
            state = self.state
            if offset == CONTROL and value & CONTROL_RESET:
                self._forget()
            elif offset == CONTROL:
                on = state.interrupts or bool(value & ENABLE_INTERRUPTS)
                state.interrupts = on and not value & DISABLE_INTERRUPTS
            elif offset == IMR:
                state.imr = value
            elif offset == CAPS:
                state.caps = value & (CAPS_DATAGRAM | CAPS_NOTIFICATIONS | CAPS_PPN64)
            self._update()

    def write_data(self, data: bytes) -> None:
        """The next bytes of a datagram."""
        with self._lock:
            sent = self.state.datagram
            sent.extend(data)
            if len(sent) < _HEADER.size:
                return
            payload = bytes(sent[at] for at in range(_HEADER.size - 8, _HEADER.size))
            size = _HEADER.size + int.from_bytes(payload, "little")
            if size > MAX_DATAGRAM:
                result = PAYLOAD_TOO_LARGE
            elif len(sent) < size:
                return
            else:
                result = self._datagram(bytes(sent)[:size])
            sent.clear()
            self.state.result = result & _U32

    # Datagrams

    def _datagram(self, datagram: bytes) -> int:
        context, resource, *_ = _HEADER.unpack_from(datagram)
        if context != HYPERVISOR:
            return DST_UNREACHABLE
        asked = self._questions().get(resource)
        if asked is None:
            return INVALID_RESOURCE
        try:
            return asked(datagram[_HEADER.size :])
        except struct.error:
            return INVALID_ARGS

    def _questions(self) -> Mapping[int, Callable[[bytes], int]]:
        always = {RESOURCES_QUERY: self._query, GET_CONTEXT_ID: lambda payload: GUEST}
        if not self.notifications:
            return always
        return always | {
            SET_NOTIFY_BITMAP: self._set_flags,
            DOORBELL_LINK: self._link,
            DOORBELL_UNLINK: self._unlink,
            DOORBELL_NOTIFY: self._notify,
        }

    def _query(self, payload: bytes) -> int:
        """A bit for each question of the list that would be answered."""
        (count,) = struct.unpack_from("<I", payload)
        if count > 32:
            return INVALID_ARGS
        asked = struct.unpack_from(f"<{count}I", payload, 4)
        known = self._questions()
        return sum(1 << at for at, question in enumerate(asked) if question in known)

    def _set_flags(self, payload: bytes) -> int:
        wide = self.state.caps & CAPS_PPN64
        (page,) = struct.unpack_from("<Q" if wide else "<I", payload)
        start, end = page * PAGE, (page + 1) * PAGE
        if not page or not any(at <= start and end <= at + size for at, size in self._vm.ram):
            return INVALID_ARGS
        self.state.flags_page = page
        return SUCCESS

    def _link(self, payload: bytes) -> int:
        context, resource, number = struct.unpack_from("<IIQ", payload)
        if context != GUEST or number >= FLAGS:
            return INVALID_ARGS
        if (context, resource) in self._doorbells:
            return ALREADY_EXISTS
        if len(self._doorbells) == FLAGS:
            return NO_RESOURCES
        self._doorbells[context, resource] = number
        return SUCCESS

    def _unlink(self, payload: bytes) -> int:
        doorbell = struct.unpack_from("<II", payload)
        return NOT_FOUND if self._doorbells.pop(doorbell, None) is None else SUCCESS

    def _notify(self, payload: bytes) -> int:
        context, resource = struct.unpack_from("<II", payload)
        return SUCCESS if self._ring((context, resource)) else NOT_FOUND

    # Life

    def _forget(self) -> None:
        self.state.reset()
        self._doorbells.clear()

    def reset(self) -> None:
        with self._lock:
            self._forget()
            self._update()
        self.function.reset()

    def save(self) -> State:
        """To be called while the machine is held."""
        with self._lock:
            linked = [(*doorbell, number) for doorbell, number in self._doorbells.items()]
            self.state.doorbells = deque(word for entry in linked for word in entry)
            registers = self.state.save()
        return {"registers": registers, "pci": self.function.save()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.reset()
        registers, pci = (state.get(part) for part in ("registers", "pci"))
        self.function.load(pci if isinstance(pci, dict) else {})
        with self._lock:
            self.state.load(registers if isinstance(registers, dict) else {})
            words = list(self.state.doorbells)
            entries = zip(words[::3], words[1::3], words[2::3], strict=False)
            self._doorbells = {
                (context, resource): number
                for context, resource, number in entries
                if number < FLAGS
            }
            page = self.state.flags_page * PAGE
            if not any(at <= page < page + PAGE <= at + size for at, size in self._vm.ram):
                self.state.flags_page = 0
            self._update()


class _Ports:
    """The registers as ports: all of 32 bits, but the data, which come in bytes."""

    def __init__(self, vmci: Vmci) -> None:
        self._vmci = vmci

    def read(self, offset: int, size: int) -> int:
        at = offset & ~3
        return self._vmci.read_register(at) >> 8 * (offset - at) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == DATA_OUT:
            self._vmci.write_data((value & all_ones(size)).to_bytes(size, "little"))
        elif size == 4:
            self._vmci.write_register(offset, value)
