"""What fw_cfg tells firmware about its machine."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tetrarch.boot.bzimage import parse_setup_header
from tetrarch.boot.e820 import E820Entry, E820Type, pack_e820
from tetrarch.boot.initrd import open_initrd
from tetrarch.boot.source import Source
from tetrarch.boot.unified import open_kernel
from tetrarch.devices.fw_cfg import FwCfgItem, Key
from tetrarch.machine import map as machine_map

__all__ = ["FileItem", "cpu_items", "kernel_items", "memory_file"]

#: Where kernels of the boot protocol take their parts; firmware may choose others.
REAL_MODE_ADDRESS: Final = 0x1_0000
CMDLINE_ADDRESS: Final = 0x2_0000
KERNEL_ADDRESS: Final = 0x10_0000


class FileItem:
    """A part of an open file, which is read when the guest reads it: on the thread of a vCPU,
    which may open none where the machine is confined."""

    def __init__(self, source: Source, offset: int, size: int) -> None:
        self._source = source
        self._offset = offset
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        return self._source.read(self._offset + offset, length)


def _number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def cpu_items(cpus: int, most: int) -> dict[int, bytes]:
    """How many there are, and can be."""
    return {Key.NB_CPUS: _number(cpus, 2), Key.MAX_CPUS: _number(most, 2)}


def memory_file(ram: Iterable[tuple[int, int]]) -> bytes:
    """``etc/e820``: RAM as firmware finds it, before it takes its own from it."""
    ecam, ecam_end = machine_map.ECAM
    entries = [E820Entry(base, length, E820Type.RAM) for base, length in ram]
    entries.append(E820Entry(ecam, ecam_end - ecam, E820Type.RESERVED))
    return pack_e820(sorted(entries))


def kernel_items(
    kernel: Path, initrd: Path | None, cmdline: str, files: ExitStack
) -> dict[int, bytes | FwCfgItem]:
    """A bzImage in its two parts, its initrd and command line; a unified kernel image is one part,
    the firmware's to run. ``files`` has what they are read from. Raises BootError."""
    with open_kernel(kernel) as file:
        setup = 0 if file.unified else parse_setup_header(file.kernel).setup_size
    whole = files.enter_context(Source.open(kernel, "kernel"))
    rest = whole.size - setup
    words = cmdline.encode("utf-8", "surrogateescape") + b"\0"
    items: dict[int, bytes | FwCfgItem] = {
        Key.SETUP_ADDR: _number(REAL_MODE_ADDRESS),
        Key.SETUP_SIZE: _number(setup),
        Key.SETUP_DATA: FileItem(whole, 0, setup),
        Key.KERNEL_ADDR: _number(KERNEL_ADDRESS),
        Key.KERNEL_SIZE: _number(rest),
        Key.KERNEL_DATA: FileItem(whole, setup, rest),
        Key.CMDLINE_ADDR: _number(CMDLINE_ADDRESS),
        Key.CMDLINE_SIZE: _number(len(words)),
        Key.CMDLINE_DATA: words,
    }
    if initrd is not None:
        joined = files.enter_context(open_initrd(initrd))
        items |= {
            Key.INITRD_SIZE: _number(joined.size),
            Key.INITRD_DATA: FileItem(joined, 0, joined.size),
        }
    return items
