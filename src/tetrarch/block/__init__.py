"""Disks: how they are written down, opened, made, looked at and copied."""

from typing import TYPE_CHECKING

from tetrarch._lazy import lazy_names

if TYPE_CHECKING:
    from tetrarch.block.disk import open_disk
    from tetrarch.block.spec import CdromSpec, DiskSpec
    from tetrarch.block.tools import check, convert, create, info, resize

__all__ = ["CdromSpec", "DiskSpec", "check", "convert", "create", "info", "open_disk", "resize"]

_HOMES = {
    "CdromSpec": "tetrarch.block.spec",
    "DiskSpec": "tetrarch.block.spec",
    "check": "tetrarch.block.tools",
    "convert": "tetrarch.block.tools",
    "create": "tetrarch.block.tools",
    "info": "tetrarch.block.tools",
    "open_disk": "tetrarch.block.disk",
    "resize": "tetrarch.block.tools",
}

__getattr__ = lazy_names(__name__, _HOMES, globals())
