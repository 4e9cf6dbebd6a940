"""Virtio devices (OASIS virtio 1.2): negotiation, transports, and each kind of device."""

from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import VirtioRegisters
from tetrarch.virtio.served import DeviceQueues, VirtioUserDevice

__all__ = [
    "DeviceQueues",
    "VirtioKind",
    "VirtioMmio",
    "VirtioPci",
    "VirtioRegisters",
    "VirtioUserDevice",
]
