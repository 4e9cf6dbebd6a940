"""Disk controllers on the PCI bus for guests without virtio."""

from tetrarch.storage.ahci import AhciController
from tetrarch.storage.drives import AtaDrive
from tetrarch.storage.ide import IdeController
from tetrarch.storage.nvme import NvmeController

__all__ = ["AhciController", "AtaDrive", "IdeController", "NvmeController"]
