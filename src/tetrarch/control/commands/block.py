"""Disks (QEMU, qapi/block-core.json and qapi/block.json)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tetrarch._native import EngineError
from tetrarch.block.spec import DiskSpec
from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.machine.blocks import BlockNode, BlockNodes

__all__ = [
    "BackingNode",
    "CacheOptions",
    "FileNode",
    "block_resize",
    "blockdev_add",
    "blockdev_del",
    "query_block",
    "query_blockstats",
]

_NO_LIMITS = {"bps_rd": 0, "bps_wr": 0, "iops_rd": 0, "iops_wr": 0}


class FileNode(BaseModel):
    """BlockdevOptionsFile, as far as it goes here."""

    model_config = ConfigDict(strict=True, extra="forbid")

    driver: Literal["file"]
    filename: str


class BackingNode(BaseModel):
    """An image below another. Its format is what the other says."""

    model_config = ConfigDict(strict=True, extra="forbid")

    driver: Literal["raw", "qcow2"]
    file: FileNode
    backing: BackingNode | None = None


class CacheOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    direct: bool = False


@command("query-block")
def query_block(monitor: Monitor) -> list[dict[str, Any]]:
    """BlockInfo of each image."""
    return list(_each(monitor, _block_info))


@command("query-blockstats")
def query_blockstats(monitor: Monitor) -> list[dict[str, Any]]:
    return list(_each(monitor, _block_stats))


@command("block_resize")
def block_resize(
    monitor: Monitor, size: int, device: str | None = None, node_name: str | None = None
) -> None:
    """The driver of the disk hears of it."""
    blocks = monitor.machine.pc.blocks
    node = _find(blocks, device, node_name)
    if size <= 0 or size % 512:
        raise QmpError("Parameter 'size' expects a multiple of 512 above 0")
    blocks.resize(node, size)


@command("blockdev-add")
def blockdev_add(
    monitor: Monitor,
    driver: Literal["file", "raw", "qcow2", "vmdk"],
    node_name: str,
    filename: str | None = None,
    file: FileNode | None = None,
    backing: BackingNode | None = None,
    read_only: bool = False,
    cache: CacheOptions | None = None,
) -> None:
    """Opens an image, for a device. ``file`` is raw; the others have theirs in ``file``.

    A file may be one of a set, /dev/fdset/N; then so are those of ``backing``, which else is
    what the image says.
    """
    if driver == "file":
        if file is not None:
            raise QmpError("Parameter 'file' is unexpected")
        path = filename
    else:
        if filename is not None:
            raise QmpError("Parameter 'filename' is unexpected")
        path = None if file is None else file.filename
    if not path:
        raise QmpError(f"Parameter '{'filename' if driver == 'file' else 'file'}' is missing")
    files: list[int] | None = None
    if given := monitor.descriptors.in_set(path):
        path = given.get("opaque", path)
        files = [given["fd"], *_backing_files(monitor, backing)]
    elif backing is not None:
        raise QmpError("Parameter 'backing' is for files of /dev/fdset alone")
    spec = DiskSpec(
        Path(path),
        format="raw" if driver == "file" else driver,
        readonly=read_only,
        cache="none" if cache is not None and cache.direct else "writeback",
    )
    monitor.machine.pc.blocks.open(node_name, spec, kept=True, files=files)


def _backing_files(monitor: Monitor, backing: BackingNode | None) -> Iterator[int]:
    while backing is not None:
        info = monitor.descriptors.in_set(backing.file.filename)
        if info is None:
            raise QmpError("Parameter 'backing' expects files of /dev/fdset")
        yield info["fd"]
        backing = backing.backing


@command("blockdev-del")
def blockdev_del(monitor: Monitor, node_name: str) -> None:
    monitor.machine.pc.blocks.remove(node_name)


def _find(blocks: BlockNodes, device: str | None, node_name: str | None) -> BlockNode:
    for node in blocks.all():
        if node_name == node.name or (node_name is None and device in (node.name, node.device)):
            return node
    raise QmpError(
        f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'", "DeviceNotFound"
    )


def _device(node: BlockNode) -> dict[str, str]:
    """A drive of the configuration has the name of its image, one that was added none."""
    named = {"device": "" if node.kept else node.name}
    return named if node.device is None else {**named, "qdev": f"/machine/peripheral/{node.device}"}


def _each(
    monitor: Monitor, about: Callable[[BlockNode], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Of each image, but for those that somebody closes meanwhile."""
    blocks = monitor.machine.pc.blocks
    for node in blocks.all():
        try:
            yield about(node)
        except EngineError:
            if blocks.get(node.name) is node:
                raise


def _block_stats(node: BlockNode) -> dict[str, Any]:
    return {
        **_device(node),
        "node-name": node.name,
        "stats": {
            **node.disk.stats(),
            "rd_merged": 0,
            "wr_merged": 0,
            "unmap_merged": 0,
            "account_invalid": True,
            "account_failed": True,
            "timed_stats": [],
        },
    }


def _block_info(node: BlockNode) -> dict[str, Any]:
    spec = node.spec
    return {
        **_device(node),
        "type": "unknown",
        "removable": node.removable,
        "locked": False,
        **({"tray_open": False} if node.removable else {}),
        "io-status": "ok",
        "inserted": {
            "file": str(spec.path),
            "node-name": node.name,
            "ro": spec.readonly,
            "drv": node.format,
            "backing_file_depth": int(node.layered),
            "encrypted": False,
            "detect_zeroes": "off",
            "bps": spec.bps or 0,
            "iops": spec.iops or 0,
            **_NO_LIMITS,
            "cache": {"writeback": True, "direct": spec.cache == "none", "no-flush": False},
            "write_threshold": 0,
            "image": {
                "filename": str(spec.path),
                "format": node.format,
                "virtual-size": node.disk.size,
                "actual-size": node.allocated,
            },
        },
    }
