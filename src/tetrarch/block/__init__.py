"""Disks: how they are written down, opened, made, looked at and copied."""

from tetrarch.block.disk import open_disk
from tetrarch.block.spec import CdromSpec, DiskSpec
from tetrarch.block.tools import check, convert, create, info, resize

__all__ = ["CdromSpec", "DiskSpec", "check", "convert", "create", "info", "open_disk", "resize"]
