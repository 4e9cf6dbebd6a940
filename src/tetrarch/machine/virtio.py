"""Virtio devices in the machine, by the transport that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tetrarch.errors import ConfigError
from tetrarch.machine import map as machine_map
from tetrarch.machine.config import VirtioTransport
from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.mmio import NOTIFY, REGISTERS, VirtioMmio
from tetrarch.virtio.pci import VirtioPci

if TYPE_CHECKING:
    from tetrarch._native import Vm
    from tetrarch.machine.plugged import PluggedDevices

__all__ = ["VirtioSlots"]


class VirtioSlots:
    """Where virtio devices are put: on the PCI bus, or into pages of the memory map."""

    def __init__(
        self, vm: Vm, pci: PluggedDevices, transport: VirtioTransport, dsdt: list[bytes]
    ) -> None:
        """``dsdt`` gets what names a device to the guest that no bus names."""
        self._vm = vm
        self._pci = pci
        self._transport = transport
        self._dsdt = dsdt
        self._pages = 0

    def plug(self, kind: VirtioKind) -> VirtioMmio | None:
        """None of a device on the PCI bus, which is then saved and reset with those there."""
        if self._transport == "pci":
            self._pci.plug(kind.name, VirtioPci(self._vm, kind))
            return None
        from tetrarch.boot.acpi import virtio_mmio_device

        device = self._map(kind, self._pages)
        self._dsdt.append(virtio_mmio_device(self._pages))
        self._pages += 1
        return device

    def _map(self, kind: VirtioKind, index: int) -> VirtioMmio:
        if index >= machine_map.VIRTIO_MMIO_SLOTS:
            raise ConfigError(
                f"virtio-mmio has room for {machine_map.VIRTIO_MMIO_SLOTS} devices",
                mend="give the machine fewer, or virtio over PCI",
            )
        base, gsi = machine_map.virtio_mmio_slot(index)
        device = VirtioMmio(kind, self._vm.irq_source(gsi))
        self._vm.attach_mmio(base, NOTIFY, device.below)
        self._vm.attach_mmio(base + NOTIFY, 4, device.doorbells)
        self._vm.attach_mmio(base + NOTIFY + 4, REGISTERS - NOTIFY - 4, device.above)
        return device
