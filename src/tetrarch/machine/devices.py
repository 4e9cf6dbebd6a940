"""The devices that a program gives to a machine, and takes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tetrarch._native import Vm
from tetrarch.errors import ConfigError, MachineStateError
from tetrarch.machine.assembly import AssembledMachine
from tetrarch.machine.config import DiskOption, NetOption, make_config
from tetrarch.machine.engine_vm import BusRegion, EngineVm, InterruptWire
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.plugged import PciDevice
from tetrarch.virtio.served import ServedKind, VirtioUserDevice

if TYPE_CHECKING:  # Device is a protocol: of the stub file alone
    from tetrarch._native import Device

__all__ = ["DeviceMethods"]


class DeviceMethods(AssembledMachine):
    def attach_ports(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        name: str | None = None,
    ) -> BusRegion:
        """Puts a device of yours on I/O ports, before start().

        It sees accesses of ``sizes`` bytes, by default of any; others pass it by. The region
        can be moved, unmapped and detached at any time. A saved machine knows the device by
        ``name``, which is its class and ``base`` if it is not given.
        """
        self._life.require("attach_ports", Phase.MADE)
        region = self._vm.attach_ports(base, length, device, sizes=sizes)
        self._attached.add(name, base, device)
        return region

    def attach_mmio(
        self,
        base: int,
        length: int,
        device: Device,
        *,
        sizes: Sequence[int] | None = None,
        name: str | None = None,
    ) -> BusRegion:
        """Puts a device of yours on guest physical addresses, before start()."""
        self._life.require("attach_mmio", Phase.MADE)
        region = self._vm.attach_mmio(base, length, device, sizes=sizes)
        self._attached.add(name, base, device)
        return region

    def attach_virtio(self, device: VirtioUserDevice, *, name: str | None = None) -> None:
        """Gives the guest a virtio device of yours, before start().

        Its requests are served on a thread of its own; what it raises stops the machine. A
        saved machine knows it by ``name``, which is its class if it is not given.
        """
        self._life.require("attach_virtio", Phase.MADE)
        if self._pc.virtio is None or not isinstance(self._vm, Vm):
            raise MachineStateError("a stand-in for the engine has no virtio", mend="give none")
        name = name or type(device).__qualname__
        self._attached.require_free(name)
        kind = ServedKind(self._vm, device, name, self._conclusion.post)
        try:
            self._attached.add_virtio(name, kind, self._pc.virtio.plug(kind))
        except ConfigError:
            kind.close()
            raise

    @property
    def engine_vm(self) -> EngineVm:
        """What a ``PciFunction`` and the vectors of a device of yours are made with."""
        return self._vm

    def attach_pci(
        self, device: PciDevice, *, slot: int | None = None, name: str | None = None
    ) -> int:
        """Puts a PCI device of yours into a slot, a free one if none is given; gives its number.

        The guest is told if it runs. ``name``, by default the device's class, is what
        ``detach`` and a saved machine know it by.
        """
        self._life.require("attach_pci", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
        announce = self.phase is not Phase.MADE
        name = type(device).__qualname__ if name is None else name
        return self._pc.plugged.plug(name, device, slot, announce=announce)

    def attach_disk(self, disk: DiskOption, *, name: str | None = None) -> str:
        """Puts a disk into a slot, at virtio, nvme or pvscsi, as ``disk=`` is written; gives the
        device's name, which ``detach`` takes.

        Raises ConfigError for what a disk that comes later cannot be, ImageError where the image
        cannot be used.
        """
        self._life.require("attach_disk", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
        (spec,) = make_config({"disk": disk}).disk
        from tetrarch.machine.added import add_disk

        return add_disk(self._pc, spec, name, announce=self.phase is not Phase.MADE)

    def attach_net(self, net: NetOption, *, name: str | None = None) -> str:
        """Puts a network card into a slot, as ``net=`` is written; gives the device's name, which
        ``detach`` takes.

        Raises HostError where the host does not give the network.
        """
        self._life.require("attach_net", Phase.MADE, Phase.RUNNING, Phase.PAUSED)
        (spec,) = make_config({"net": net}).net
        from tetrarch.machine.added import add_net

        return add_net(self._pc, spec, name, announce=self.phase is not Phase.MADE)

    def detach(self, device: PciDevice | str, *, timeout: float | None = 30.0) -> None:
        """Takes a PCI device out, by itself or its name; returns when the guest has given it up.

        Raises TimeoutError if that has not come about after ``timeout`` seconds; the guest may
        still do it.
        """
        self._life.require("detach", Phase.MADE, Phase.RUNNING)
        self._not_on_a_device("detach it on another thread")
        ask = self.phase is Phase.RUNNING
        gone = self._pc.plugged.unplug(device, ask=ask, timeout=timeout)
        self._await_gone(repr(device), gone, timeout)

    def plug_vcpu(self, number: int | None = None) -> int:
        """Puts a CPU into the machine, the first that is not in it if none is named, and gives its
        number; the guest is told, and may bring it online.

        Raises MachineStateError where it cannot have it: see ``max`` of ``cpus``.
        """
        self._life.require("plug_vcpu", Phase.RUNNING, Phase.PAUSED)
        self._not_on_a_device("plug it in on another thread")
        return self._pc.vcpus.plug(number)

    def unplug_vcpu(self, number: int, *, timeout: float | None = 30.0) -> None:
        """Takes a CPU out; returns when the guest has given it up.

        Raises TimeoutError if that has not come about after ``timeout`` seconds; the guest may
        still do it. Raises MachineStateError for CPU 0, and one that is not in the machine.
        """
        self._life.require("unplug_vcpu", Phase.RUNNING)
        self._not_on_a_device("take it out on another thread")
        self._await_gone(f"CPU {number}", self._pc.vcpus.unplug(number, timeout), timeout)

    def _not_on_a_device(self, mend: str) -> None:
        if self._threads.current or self._attached.current:
            raise MachineStateError("a device cannot wait for its own guest", mend=mend)

    def _await_gone(self, what: str, gone: bool | None, timeout: float | None) -> None:
        if gone is None:
            raise MachineStateError(
                f"the machine ended before its guest gave {what} up", mend="take it out earlier"
            )
        if not gone:
            raise TimeoutError(f"the guest has not given {what} up within {timeout:g} s")

    def irq_source(self, gsi: int) -> InterruptWire:
        """A wire of its own to an interrupt line, to be driven from any thread.

        The line is high while any of its wires is.
        """
        self._life.require("irq_source", *Phase)
        return self._vm.irq_source(gsi)

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drives one more wire to the line, which all callers of this share."""
        self._life.require("irq_line", *Phase)
        self._vm.irq_line(gsi, level)
