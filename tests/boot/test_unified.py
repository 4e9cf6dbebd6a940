"""Unified kernel images: their sections as the files that they were."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tetrarch.boot import load_kernel
from tetrarch.boot.unified import embedded_cmdline
from tetrarch.devices.fw_cfg import Key
from tetrarch.errors import BootError
from tetrarch.firmware.items import FileItem, kernel_items

MIB = 1 << 20
ZERO_PAGE = 0x7000


def unified(sections: dict[str, bytes], *, machine: int = 0x8664, cut: int = 0) -> bytes:
    """An EFI program with these sections, each padded in the file as linkers do."""
    pe_at, optional = 0x80, 240
    head = bytearray(0x600)
    head[:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, pe_at)
    coff = struct.pack("<HHIIIHH", machine, len(sections), 0, 0, 0, optional, 0x22E)
    head[pe_at : pe_at + 4 + len(coff)] = b"PE\0\0" + coff
    table = pe_at + 4 + len(coff) + optional
    body = b""
    for index, (name, data) in enumerate(sections.items()):
        padded = data.ljust(-(-len(data) // 512) * 512, b"\xee")
        entry = struct.pack(
            "<8sIIII", name.encode(), len(data), 0x1000 * index, len(padded), len(head) + len(body)
        )
        head[table + 40 * index : table + 40 * index + len(entry)] = entry
        body += padded
    whole = bytes(head) + body
    return whole[: len(whole) - cut]


def test_sections_are_loaded_as_their_files(make_vm: Any, make_bzimage: Any, write: Any) -> None:
    payload = bytes(range(256)) * 16
    kernel = make_bzimage(payload=payload)
    sections = {".text": b"\xc3", ".cmdline": b"quiet", ".initrd": b"first", ".linux": kernel}
    image, more = write("uki.efi", unified(sections)), write("more", b"second")
    vm = make_vm(64 * MIB)
    regs = load_kernel(vm, image, more, "console=ttyS0", 0)
    assert regs["rip"] == 16 * MIB + 0x200
    assert vm.memory[16 * MIB : 16 * MIB + len(payload)] == payload
    assert vm.text(vm.u32(ZERO_PAGE + 0x228)) == b"console=ttyS0"
    at, size = vm.u32(ZERO_PAGE + 0x218), vm.u32(ZERO_PAGE + 0x21C)
    assert bytes(vm.memory[at : at + size]) == b"first\0\0\0second"

    load_kernel(vm := make_vm(64 * MIB), image, None, "", 0)
    at, size = vm.u32(ZERO_PAGE + 0x218), vm.u32(ZERO_PAGE + 0x21C)
    assert bytes(vm.memory[at : at + size]) == b"first"


def test_command_line_is_its_own_unless_one_is_given(make_bzimage: Any, write: Any) -> None:
    kernel = make_bzimage()
    image = write("uki.efi", unified({".cmdline": b"root=/dev/vda \n\0", ".linux": kernel}))
    assert embedded_cmdline(image) == "root=/dev/vda "
    assert embedded_cmdline(write("bare.efi", unified({".linux": kernel}))) is None
    assert embedded_cmdline(write("vmlinuz", kernel)) is None


def test_firmware_gets_all_of_it(make_bzimage: Any, write: Any) -> None:
    data = unified({".linux": make_bzimage()})
    with ExitStack() as files:
        items = kernel_items(write("uki.efi", data), None, "", files)
        kernel = items[Key.KERNEL_DATA]
        assert isinstance(kernel, FileItem)
        assert items[Key.SETUP_SIZE] == bytes(4)
        assert items[Key.KERNEL_SIZE] == len(data).to_bytes(4, "little")
        assert kernel.read(0, len(data)) == data


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (unified({".text": b"\xc3"}), "is an EFI program, but no x86 bzImage"),
        (unified({".linux": b"x"}, machine=0xAA64), "is an EFI program, but no x86 bzImage"),
        (unified({".linux": bytes(2000)}), "kernel in .*: is no kernel"),
        (unified({".linux": bytes(2000)}, cut=2048), "cut short in a section that ends at"),
        (unified({".linux": bytes(2000)})[:0x190], "cut short in its table of sections"),
        (unified({".linux": b"x", ".cmdline": b"x" * 70000}), "a command line of 70000 bytes"),
    ],
)
def test_damaged_image_is_refused(make_vm: Any, write: Any, image: bytes, cause: str) -> None:
    path: Path = write("uki.efi", image)
    with pytest.raises(BootError, match=cause) as error:
        load_kernel(make_vm(64 * MIB), path, None, "", 0)
    assert "\n" not in str(error.value)
