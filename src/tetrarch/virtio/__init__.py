"""Virtio devices (OASIS virtio 1.2): negotiation, transports, and each kind of device."""

from tetrarch.virtio.kind import VirtioKind
from tetrarch.virtio.mmio import VirtioMmio
from tetrarch.virtio.pci import VirtioPci
from tetrarch.virtio.registers import VirtioRegisters

__all__ = ["VirtioKind", "VirtioMmio", "VirtioPci", "VirtioRegisters"]
