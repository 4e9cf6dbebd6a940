"""Starting a Linux kernel by SeaBIOS: an option ROM that takes it from fw_cfg.

The kernel is entered where a boot sector would, in real mode, so that it asks the BIOS itself what
the machine has (Documentation/arch/x86/boot.rst, "the real-mode kernel header" and "running the
kernel"). The ROM is a device to boot from (Plug and Play BIOS Specification 1.0A, 3.2; BIOS Boot
Specification 1.01, 3.3), and the first in SeaBIOS's order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from tetrarch.boot.bzimage import SetupHeader, parse_setup_header
from tetrarch.boot.cmdline import cmdline_bytes
from tetrarch.boot.initrd import open_initrd
from tetrarch.boot.initrd_memory import place_initrd, too_little_memory
from tetrarch.boot.layout import HIGH_MEMORY, GuestMemory, low_ram_top
from tetrarch.boot.unified import open_kernel
from tetrarch.devices.fw_cfg import (
    DMA_COMMAND,
    DMA_PORT,
    DMA_READ,
    DMA_SELECT,
    FwCfgItem,
    Key,
)
from tetrarch.firmware.items import FileItem

__all__ = ["linux_rom"]

ROM_FILE: Final = "genroms/tetrarch-linux.bin"
ORDER_FILE: Final = "bootorder"
#: SeaBIOS keeps its tables at the end of RAM.
BIOS_TABLES: Final = 1 << 20

# Where the parts go. A kernel of protocol 2.01 or older, or one that lies low itself, has its
# setup at 0x90000.
LOW_SETUP, OLD_SETUP = 0x1_0000, 0x9_0000
LOW_KERNEL: Final = 0x1_0000
#: Heap and stack of the setup end here, and the command line begins.
HEAP_END, OLD_HEAP_END = 0xE000, 0x9800
#: What the protocol asks for beside the setup's own bytes.
HEAP_BYTES: Final = 0x1000

# Of the setup header.
NORMAL_MODE: Final = 0xFFFF
CAN_USE_HEAP: Final = 0x80
CMDLINE_MAGIC: Final = 0xA33F
LOADER_UNDEFINED: Final = 0xFF
HEAP_SINCE, CMDLINE_POINTER_SINCE = 0x0201, 0x0202

SECTOR: Final = 512
PNP_AT: Final = 0x20
PNP_BYTES: Final = 0x20
NAMES_AT: Final = PNP_AT + PNP_BYTES
NAMES: Final = b"Tetrarch\0Linux\0"
CODE_AT: Final = 0x60
#: An IPL device, which may be shadowed and made read-only.
PNP_FLAGS: Final = 0x64


class _Part(NamedTuple):
    """An item that goes to an address before the kernel begins."""

    key: Key
    address: int
    size: int


def linux_rom(
    vm: GuestMemory, kernel: Path, initrd: Path | None, cmdline: str, files: ExitStack
) -> tuple[dict[int, bytes | FwCfgItem], dict[str, bytes]]:
    """Items and files for fw_cfg; ``files`` has what they are read from. Raises BootError."""
    file = files.enter_context(open_kernel(kernel))
    source = file.kernel
    header = parse_setup_header(source)
    setup = bytearray(source.read(0, header.setup_size))
    kernel_size = source.size - header.setup_size
    modern = header.version >= CMDLINE_POINTER_SINCE and header.loaded_high
    base, heap_end = (LOW_SETUP, HEAP_END) if modern else (OLD_SETUP, OLD_HEAP_END)
    kernel_at = HIGH_MEMORY if header.loaded_high else LOW_KERNEL
    if len(setup) > heap_end - HEAP_BYTES or (
        kernel_at < HIGH_MEMORY and kernel_at + kernel_size > base
    ):
        raise source.error("does not fit below 1 MiB", mend="get the file again, it is damaged")
    top = low_ram_top(vm) - BIOS_TABLES
    if header.memory_end > top:
        end = header.memory_end + BIOS_TABLES
        raise too_little_memory(vm, source, end, initrd, file.initrd)
    words = cmdline_bytes(cmdline, header.cmdline_size)
    items: dict[int, bytes | FwCfgItem] = {
        Key.KERNEL_DATA: FileItem(source, header.setup_size, kernel_size),
        Key.CMDLINE_DATA: words,
    }
    parts = [
        _Part(Key.SETUP_DATA, base, len(setup)),
        _Part(Key.KERNEL_DATA, kernel_at, kernel_size),
        _Part(Key.CMDLINE_DATA, base + heap_end, len(words)),
    ]
    if initrd is not None or file.initrd is not None:
        joined = files.enter_context(open_initrd(initrd, file.initrd))
        at = place_initrd(vm, joined, header.memory_end, min(top, header.initrd_end))
        items[Key.INITRD_DATA] = FileItem(joined, 0, joined.size)
        parts.append(_Part(Key.INITRD_DATA, at, joined.size))
        struct.pack_into("<II", setup, 0x218, at, joined.size)
    _fill_header(setup, header, base, heap_end, len(words))
    items[Key.SETUP_DATA] = bytes(setup)
    return items, {ROM_FILE: _rom(parts, base, heap_end), ORDER_FILE: b"/rom@" + ROM_FILE.encode()}


def _fill_header(
    setup: bytearray, header: SetupHeader, base: int, heap_end: int, cmdline_size: int
) -> None:
    struct.pack_into("<H", setup, 0x1FA, NORMAL_MODE)
    setup[0x210] = LOADER_UNDEFINED
    if header.version >= HEAP_SINCE:
        setup[0x211] |= CAN_USE_HEAP
        struct.pack_into("<H", setup, 0x224, heap_end - SECTOR)
    if header.version >= CMDLINE_POINTER_SINCE:
        struct.pack_into("<I", setup, 0x228, base + heap_end)
    else:
        struct.pack_into("<HH", setup, 0x20, CMDLINE_MAGIC, heap_end)
        struct.pack_into("<H", setup, 0x212, heap_end + cmdline_size)


def _rom(parts: Sequence[_Part], base: int, heap_end: int) -> bytes:
    """Nothing to do at first; to boot, the commands for fw_cfg one after the other, and a jump."""
    commands = b"".join(
        DMA_COMMAND.pack(part.key << 16 | DMA_SELECT | DMA_READ, part.size, part.address)
        for part in parts
    )
    code = _code(len(parts), base, heap_end)
    commands_at = -(-(CODE_AT + len(code)) // 16) * 16
    code = code.replace(b"HERE", commands_at.to_bytes(4, "little"))
    rom = bytearray(SECTOR)
    rom[0:4] = b"\x55\xaa\x01\xcb"  # of one sector; RETF
    rom[0x1A:0x1C] = PNP_AT.to_bytes(2, "little")
    rom[PNP_AT:NAMES_AT] = _pnp_header()
    rom[NAMES_AT : NAMES_AT + len(NAMES)] = NAMES
    rom[CODE_AT : CODE_AT + len(code)] = code
    rom[commands_at : commands_at + len(commands)] = commands
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)


def _pnp_header() -> bytes:
    product = NAMES_AT + NAMES.index(b"\0") + 1
    header = bytearray(
        struct.pack(
            "<4sBBHBBIHH3sBHHHHH",
            b"$PnP",
            1,
            PNP_BYTES // 16,
            *(0, 0, 0, 0),
            NAMES_AT,
            product,
            bytes(3),
            PNP_FLAGS,
            *(0, 0, CODE_AT, 0, 0),
        )
    )
    header[9] = -sum(header) & 0xFF
    return bytes(header)


def _code(count: int, base: int, heap_end: int) -> bytes:
    segment = base >> 4
    return b"".join(
        [
            bytes.fromhex("fc 8cc8 8ed8"),  # cld ; mov ax, cs ; mov ds, ax
            bytes.fromhex("66 0fb7c0"),  # movzx eax, ax
            bytes.fromhex("66 c1e004"),  # shl eax, 4
            b"\x66\x05HERE",  # add eax, where the commands are in the ROM
            b"\xb9" + struct.pack("<H", count),  # mov cx, count
            bytes.fromhex("66 89c3 66 0fcb"),  # next: mov ebx, eax ; bswap ebx
            bytes.fromhex("66 93"),  # xchg eax, ebx
            # mov dx, the port of the address's lower half, which starts the command
            b"\xba" + struct.pack("<H", DMA_PORT + 4),
            bytes.fromhex("66 ef 66 93"),  # out dx, eax ; xchg eax, ebx
            bytes.fromhex("66 83c010 e2eb"),  # add eax, 16 ; loop next
            b"\xb8" + struct.pack("<H", segment),  # mov ax, segment
            bytes.fromhex("fa 8ed8 8ec0 8ee0 8ee8 8ed0"),  # cli ; mov ds, es, fs, gs, ss from ax
            b"\xbc" + struct.pack("<H", heap_end),  # mov sp, heap_end
            # jmp far, behind the boot sector of old
            b"\xea" + struct.pack("<HH", 0, segment + (SECTOR >> 4)),
        ]
    )
