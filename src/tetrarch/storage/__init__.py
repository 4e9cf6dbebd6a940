"""Disk controllers on the PCI bus for guests without virtio."""

from tetrarch.storage.nvme import NvmeController

__all__ = ["NvmeController"]
