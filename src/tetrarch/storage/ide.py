"""An IDE controller as in Intel's PIIX3 (82371SB): its PCI function and the ports of every PC.

Registers, channels and drives are ``IdeChannels``: every word of data is an access to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from tetrarch._native import EngineError, IdeChannels
from tetrarch.devices._state import State
from tetrarch.errors import ConfigError, StateError
from tetrarch.machine.map import IDE_CHANNELS, IDE_TASK_PORTS
from tetrarch.pci.function import Bar, BarPart, Identity, PciFunction
from tetrarch.storage.drives import AtaDrive, drive_form, refuse_stopped

if TYPE_CHECKING:
    from tetrarch._native import IdeState, Vm

__all__ = ["IdeController"]

VENDOR: Final = 0x8086
DEVICE: Final = 0x7010
#: Mass storage, IDE: both channels at the ports of old, with bus masters.
CLASS: Final = 0x010180

MASTER_BAR: Final = 4
MASTER_PORTS: Final = 16

#: Timings of a channel, in configuration space; the highest bit lets it answer.
TIMINGS: Final = (0x40, 0x42)
DECODES: Final = 1 << 15


class IdeController:
    """A controller with up to four drives, at the machine's ports: there can be one.

    Drives are the first channel's master and slave, then the second's; None where there is none.
    """

    def __init__(self, vm: Vm, drives: Sequence[AtaDrive | None], *, name: str = "ide") -> None:
        most = IdeChannels.CHANNELS * IdeChannels.DRIVES
        if len(drives) > most:
            raise ConfigError(
                f"an IDE controller has {most} drives, not {len(drives)}",
                mend="put further ones at another controller",
            )
        self.name = name
        self.drives = tuple(drive for drive in drives if drive is not None)
        self._closed = False
        lines = (vm.irq_source(IDE_CHANNELS[0][2]), vm.irq_source(IDE_CHANNELS[1][2]))
        forms = [None if drive is None else drive_form(drive) for drive in drives]
        self.channels = IdeChannels(vm, name, forms, lines)
        self.function = PciFunction(
            vm,
            Identity(VENDOR, DEVICE, CLASS),
            [
                Bar(
                    MASTER_BAR,
                    MASTER_PORTS,
                    [BarPart(0, MASTER_PORTS, self.channels.master_ports())],
                    io=True,
                )
            ],
            interrupt_pin=False,
            on_bus_master=self.channels.set_master,
        )
        self._regions = []
        for number, (task, control, _) in enumerate(IDE_CHANNELS):
            first = number * IdeChannels.DRIVES
            there = any(drives[first : first + IdeChannels.DRIVES])
            self.function.config.define(TIMINGS[number], 2, DECODES if there else 0, 0xFFFF)
            if there:
                ports = self.channels.task_ports(number), self.channels.control_port(number)
                self._regions += [
                    vm.attach_ports(task, IDE_TASK_PORTS, ports[0]),
                    vm.attach_ports(control, 1, ports[1]),
                ]

    # Life

    def retry(self) -> None:
        """The machine goes on: what the host failed is tried anew."""
        for drive in () if self._closed else self.drives:
            drive.disk.retry()

    def reset(self) -> None:
        self.channels.reset()
        self.function.reset()

    def close(self) -> None:
        """Lets go of ports and images: the device is out, or the machine has ended."""
        self._closed = True
        while self._regions:
            self._regions.pop().detach()
        self.channels.close()
        for drive in self.drives:
            drive.disk.close()

    def save(self) -> State:
        """To be called while the machine is held."""
        refuse_stopped(self.drives, self.channels.stopped)
        return {"channels": dict(self.channels.save()), "pci": self.function.save()}

    def load(self, state: State) -> None:
        pci = state.get("pci")
        self.function.load(pci if isinstance(pci, dict) else {})
        try:
            saved: IdeState = state["channels"]
            self.channels.load(saved)
        except (EngineError, KeyError, TypeError, OverflowError) as error:
            self.channels.reset()
            raise StateError(
                f"{self.name}: a saved IDE controller is damaged, or of another",
                mend="make the machine as it was when it was saved",
            ) from error
