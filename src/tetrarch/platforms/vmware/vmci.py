"""VMCI, VMware's communication interface (Linux, include/linux/vmw_vmci_defs.h and
drivers/misc/vmw_vmci): a PCI function by which the guest's kernel asks its hypervisor, and by
which it is woken.

A question is a datagram, whose answer is a number in a register. To be woken the guest gives a page
of flags, and links a doorbell, that it names to others, to one of them: who rings it sets the flag
and raises an interrupt. Connections with the host are rings of bytes in the guest's memory, queue
pairs, and datagrams that tell of them. All of that is ``VmciDevice``, the connections on the I/O
thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from tetrarch._native import EngineError, Intx, MsiVectors, MsixTable, VmciDevice
from tetrarch.devices._state import State
from tetrarch.errors import StateError
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction
from tetrarch.vsock import VsockSocket

if TYPE_CHECKING:
    from tetrarch._native import Vm, VmciState

__all__ = ["Doorbell", "Vmci"]

VENDOR: Final = 0x15AD
DEVICE: Final = 0x0740
#: A system peripheral of no other kind; revision 0x10 is that of VMware's own.
CLASS: Final = 0x088000
REVISION: Final = 0x10

PORTS_BAR: Final = 0
PORTS: Final = 64
#: The same registers in memory, by whose size a driver knows that datagrams can be transferred.
MEMORY_BAR: Final = 1
MEMORY_BYTES: Final = 256 << 10
REGISTERS: Final = 128 << 10
REGISTERS_BYTES: Final = 64 << 10
MSIX_BAR: Final = 2
MSIX_BYTES: Final = 0x1000

Doorbell = tuple[int, int]
"""Its context, and its number there."""


class Vmci:
    """The function, as a device to plug in."""

    def __init__(self, vm: Vm, *, notifications: bool = True, sockets: Path | None = None) -> None:
        """Without ``notifications`` nobody can ring: what the host does to the guest's memory by
        itself would be in no recording. ``sockets`` is where programs of the host find the guest's
        vsock ports; without it nobody is at the other end."""
        self.notifications = notifications
        self._socket = VsockSocket(sockets) if sockets is not None else None
        line = Intx()
        messages, self.msix = MsiVectors(vm, 1), MsixTable(vm, VmciDevice.VECTORS)
        vectors = [
            self.msix.vector(number, messages.vector(0)) for number in range(VmciDevice.VECTORS)
        ]
        listens = None
        if self._socket is not None:
            listens = (str(self._socket.path), self._socket.listener.fileno())
        self.device = VmciDevice(vm, line, vectors, notifications, listens)
        if self._socket is not None:
            self._socket.taken()
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, REVISION, subsystem_vendor=VENDOR, subsystem=DEVICE),
            [
                Bar(PORTS_BAR, PORTS, [BarPart(0, PORTS, self.device)], io=True),
                Bar(MEMORY_BAR, MEMORY_BYTES, [BarPart(REGISTERS, REGISTERS_BYTES, self.device)]),
                Bar(MSIX_BAR, MSIX_BYTES, [BarPart(0, MSIX_BYTES, self.msix)]),
            ],
            intx=line,
            on_bus_master=self.device.set_master,
        )
        self.function.add_msi(messages)
        self.function.add_msix(self.msix, MSIX_BAR)

    def ring(self, doorbell: Doorbell) -> bool:
        """From any thread; False where the guest has no such doorbell."""
        return self.device.ring(*doorbell)

    # Life

    def reset(self) -> None:
        self.device.reset()
        self.function.reset()

    def close(self) -> None:
        """Ends all connections, and removes the socket if it is still ours."""
        self.device.close()
        if self._socket is not None:
            self._socket.remove()

    def save(self) -> State:
        """To be called while the machine is held."""
        device = {name: list(value) for name, value in cast(State, self.device.save()).items()}
        return {"device": device, "pci": self.function.save()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Its connections are gone: who was at the other ends is no part of the machine."""
        self.reset()
        pci = state.get("pci")
        self.function.load(pci if isinstance(pci, dict) else {})
        try:
            device: VmciState = state["device"]
            self.device.load(device)
        except (EngineError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise StateError(
                "a saved VMCI device is damaged, or of another",
                mend="make the machine as it was when it was saved",
            ) from error
