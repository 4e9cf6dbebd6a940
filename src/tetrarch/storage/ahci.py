"""An AHCI controller (Serial ATA AHCI 1.3.1): its PCI function.

Registers, ports and drives are ``AhciPorts``: every command is an access to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from tetrarch._native import AhciPorts, EngineError, Intx, MsiVectors
from tetrarch.devices._state import State
from tetrarch.errors import ConfigError, StateError
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction
from tetrarch.storage.drives import AtaDrive, drive_form, refuse_stopped

if TYPE_CHECKING:
    from tetrarch._native import Vm

__all__ = ["AhciController"]

#: That of Intel's ICH9, which every system knows.
VENDOR: Final = 0x8086
DEVICE: Final = 0x2922
#: Mass storage, SATA, AHCI 1.0 (AHCI 2.1.5).
CLASS: Final = 0x010601

REGISTERS_BAR: Final = 5
REGISTERS_BYTES: Final = 0x2000


class AhciController:
    """A controller with a drive at each of its ports, as a device to plug in."""

    def __init__(self, vm: Vm, drives: Sequence[AtaDrive], *, name: str = "ahci") -> None:
        if not 0 < len(drives) <= AhciPorts.MAX_PORTS:
            raise ConfigError(
                f"an AHCI controller has 1 to {AhciPorts.MAX_PORTS} drives, not {len(drives)}",
                mend="put further ones at another controller",
            )
        self.name = name
        self.drives = tuple(drives)
        self._closed = False
        line, messages = Intx(), MsiVectors(vm, 1)
        forms = [drive_form(drive) for drive in drives]
        self.ports = AhciPorts(vm, name, forms, line, messages.vector(0))
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS, revision=2, subsystem_vendor=VENDOR, subsystem=DEVICE),
            [Bar(REGISTERS_BAR, REGISTERS_BYTES, [BarPart(0, REGISTERS_BYTES, self.ports)])],
            intx=line,
            on_bus_master=self.ports.set_master,
        )
        self.function.add_msi(messages)

    # Life

    def retry(self) -> None:
        """The machine goes on: what the host failed is tried anew."""
        for drive in () if self._closed else self.drives:
            drive.disk.retry()

    def reset(self) -> None:
        self.ports.reset()
        self.function.reset()

    def close(self) -> None:
        """Lets go of the images: the device is out, or the machine has ended."""
        self._closed = True
        self.ports.close()
        for drive in self.drives:
            drive.disk.close()

    def save(self) -> State:
        """To be called while the machine is held."""
        refuse_stopped(self.drives, self.ports.stopped)
        controller, ports = self.ports.save()
        return {"controller": controller, "ports": ports, "pci": self.function.save()}

    def load(self, state: State) -> None:
        pci = state.get("pci")
        self.function.load(pci if isinstance(pci, dict) else {})
        try:
            self.ports.load(state["controller"], state["ports"])
        except (EngineError, KeyError, TypeError, OverflowError) as error:
            self.ports.reset()
            raise StateError(
                f"{self.name}: a saved AHCI controller is damaged, or of another",
                mend="make the machine as it was when it was saved",
            ) from error
