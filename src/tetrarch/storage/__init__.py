"""Disk controllers on the PCI bus for guests without virtio."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.storage.ahci import AhciController
    from tetrarch.storage.drives import AtaDrive, ScsiDrive
    from tetrarch.storage.ide import IdeController
    from tetrarch.storage.nvme import NvmeController
    from tetrarch.storage.pvscsi import PvscsiController

__all__ = [
    "AhciController",
    "AtaDrive",
    "IdeController",
    "NvmeController",
    "PvscsiController",
    "ScsiDrive",
]

_HOMES = {
    "AhciController": "tetrarch.storage.ahci",
    "AtaDrive": "tetrarch.storage.drives",
    "IdeController": "tetrarch.storage.ide",
    "NvmeController": "tetrarch.storage.nvme",
    "PvscsiController": "tetrarch.storage.pvscsi",
    "ScsiDrive": "tetrarch.storage.drives",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
