"""Loading a kernel: what kind of file it is decides the boot protocol."""

import os
from typing import Final

from tetrarch.boot import elf
from tetrarch.boot.bzimage import is_bzimage, load_bzimage
from tetrarch.boot.layout import GuestMemory
from tetrarch.boot.multiboot import find_header, load_multiboot
from tetrarch.boot.multiboot2 import HEADER_WITHIN, load_multiboot2
from tetrarch.boot.multiboot2 import find_header as find_header2
from tetrarch.boot.pvh import load_pvh, pvh_entry
from tetrarch.boot.source import Source
from tetrarch.boot.unified import open_kernel
from tetrarch.boot.vmlinux import extract_vmlinux
from tetrarch.errors import BootError

__all__ = ["load_kernel"]

COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x89LZO": "lzop",
    b"\x5d\0\0": "lzma",
}


def load_kernel(
    vm: GuestMemory,
    kernel_path: str | os.PathLike[str],
    initrd_path: str | os.PathLike[str] | None,
    cmdline: str,
    acpi_rsdp: int,
    *,
    vga: bool = False,
    pvh: bool = False,
) -> dict[str, int]:
    """Loads kernel, initrd and command line; the registers to start the first vCPU with.

    Takes a bzImage (Linux's boot protocol), alone or in a unified kernel image, a Multiboot kernel
    of either version, or an ELF file with a PVH entry.
    ``vga``: there is a screen in text mode. ``pvh``: a bzImage is unpacked, and its kernel starts
    by its PVH entry where it has one.
    Raises ``BootError``.
    """
    with open_kernel(kernel_path) as file:
        source = file.kernel
        start = source.read(0, min(source.size, HEADER_WITHIN))
        if is_bzimage(start):
            if pvh and file.initrd is None and (vmlinux := _with_pvh_entry(source)) is not None:
                return load_pvh(vm, vmlinux, initrd_path, cmdline, acpi_rsdp)
            return load_bzimage(
                vm, source, initrd_path, cmdline, acpi_rsdp, vga=vga, first_initrd=file.initrd
            )
        if (header := find_header(start)) is not None:
            return load_multiboot(vm, source, header, initrd_path, cmdline)
        if (header2 := find_header2(start)) is not None:
            return load_multiboot2(vm, source, header2, initrd_path, cmdline, acpi_rsdp, vga=vga)
        if start.startswith(elf.MAGIC):
            return load_pvh(vm, source, initrd_path, cmdline, acpi_rsdp)
        raise _unknown(source, start)


def _with_pvh_entry(bzimage: Source) -> Source | None:
    """The kernel in a bzImage. None: it has no such entry."""
    try:
        data = extract_vmlinux(bzimage.read(0, bzimage.size))
    except ValueError as error:
        raise bzimage.error(
            f"cannot be unpacked: {error}", mend="name its vmlinux, or use the platform pc"
        ) from error
    vmlinux = Source(lambda at, size: data[at : at + size], len(data), bzimage.what, bzimage.path)
    return None if pvh_entry(elf.parse_elf(vmlinux)) is None else vmlinux


def _unknown(source: Source, start: bytes) -> BootError:
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            return source.error(f"is a {name} file, no kernel image", mend="unpack it first")
    if start.startswith(b"070701"):
        return source.error(
            "is a cpio archive, which looks like an initrd", mend="pass it as --initrd"
        )
    if start.startswith(b"MZ"):
        return source.error("is an EFI program, but no x86 bzImage", mend="use an x86-64 vmlinuz")
    return source.error(
        "is no kernel",
        mend="name a bzImage (vmlinuz), an ELF vmlinux or a Multiboot kernel",
    )
