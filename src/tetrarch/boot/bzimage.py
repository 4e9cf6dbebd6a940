"""Linux's boot protocol for bzImage (Documentation/arch/x86/boot.rst).

The kernel is entered at its 64-bit entry, or at its 32-bit one where it has no other.
"""

import os
import struct
from dataclasses import dataclass
from typing import Final

from tetrarch.boot.cmdline import write_cmdline
from tetrarch.boot.cpustate import long_mode_state, protected_mode_state
from tetrarch.boot.e820 import memory_map, pack_e820
from tetrarch.boot.initrd_memory import load_initrd, too_little_memory
from tetrarch.boot.layout import (
    HIGH_MEMORY,
    LOW_RAM_MAX,
    PAGE_SIZE,
    ZERO_PAGE_BASE,
    GuestMemory,
    align_up,
    low_ram_top,
)
from tetrarch.boot.source import Source, copy_to_guest

__all__ = ["SetupHeader", "is_bzimage", "load_bzimage", "parse_setup_header"]

SECTOR: Final = 512
HEADER_START: Final = 0x1F1
#: boot_params keeps the header up to here; what follows is edd_mbr_sig_buffer.
HEADER_MAX: Final = 0x290
BOOT_FLAG: Final = 0xAA55
MAGIC: Final = b"HdrS"
VERSION_MIN: Final = 0x0200
#: 2.02 brought cmd_line_ptr (Linux 2.4.0-test3): what is older needs its own code of 16 bits.
DIRECT_VERSION_MIN: Final = 0x0202
#: Of each field: the version that brought it, its offset and size, and what holds before.
FIELDS: Final = {
    "syssize": (0x0200, 0x1F4, 4, 0),
    "loadflags": (0x0200, 0x211, 1, 0),
    "initrd_addr_max": (0x0203, 0x22C, 4, 0x37FF_FFFF),
    "kernel_alignment": (0x0205, 0x230, 4, 0),
    "relocatable_kernel": (0x0205, 0x234, 1, 0),
    # 2.12 says whether there is a 64-bit entry (Linux 3.8).
    "xloadflags": (0x020C, 0x236, 2, 0),
    "cmdline_size": (0x0206, 0x238, 4, 255),
    "payload_offset": (0x0208, 0x248, 4, 0),
    "payload_length": (0x0208, 0x24C, 4, 0),
    "pref_address": (0x020A, 0x258, 8, HIGH_MEMORY),
    "init_size": (0x020A, 0x260, 4, 0),
}
LOADED_HIGH: Final = 1 << 0
XLF_KERNEL_64: Final = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G: Final = 1 << 1
ENTRY_64: Final = 0x200
LOADER_UNDEFINED: Final = 0xFF

# boot_params, Documentation/arch/x86/zero-page.rst
BP_VIDEO_MODE: Final = 0x006
BP_VIDEO_LINES: Final = 0x00E
BP_ACPI_RSDP: Final = 0x070
BP_E820_COUNT: Final = 0x1E8
BP_TYPE_OF_LOADER: Final = 0x210
BP_CODE32_START: Final = 0x214
BP_RAMDISK_IMAGE: Final = 0x218
BP_RAMDISK_SIZE: Final = 0x21C
BP_CMD_LINE_PTR: Final = 0x228
BP_E820_TABLE: Final = 0x2D0
E820_MAX: Final = 128
#: A VGA after power-on: BIOS mode 3, and the points that a line is high.
TEXT_MODE: Final = 3
TEXT_COLUMNS, TEXT_LINES, TEXT_POINTS = 80, 25, 16
IS_VGA: Final = 1


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """The fields of the setup header that loading needs, checked."""

    raw: bytes
    version: int
    setup_size: int
    payload_size: int
    init_size: int
    pref_address: int
    alignment: int
    loaded_high: bool
    relocatable: bool
    initrd_addr_max: int
    cmdline_size: int
    xloadflags: int

    @property
    def is_64bit(self) -> bool:
        """It has a 64-bit entry; else the 32-bit one is used, which each kernel has."""
        return bool(self.xloadflags & XLF_KERNEL_64)

    @property
    def above_4g(self) -> bool:
        return bool(self.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G)

    @property
    def initrd_end(self) -> int:
        """The first address an initrd may not use."""
        # A kernel that may itself lie above 4 GiB finds its initrd anywhere below, whatever
        # initrd_addr_max says; ours stays below 4 GiB, where ramdisk_image alone can name it.
        return 1 << 32 if self.above_4g else self.initrd_addr_max + 1

    @property
    def load_address(self) -> int:
        # A relocatable 64-bit kernel that is loaded below pref_address moves itself up to it,
        # so a lower place would save no memory.
        if self.relocatable:
            return align_up(max(self.pref_address, HIGH_MEMORY), self.alignment)
        return self.pref_address

    @property
    def memory_end(self) -> int:
        """The end of what the kernel uses before it reads its memory map."""
        return self.load_address + max(self.init_size, self.payload_size)


def is_bzimage(start: bytes) -> bool:
    return start[0x202:0x206] == MAGIC and start[0x1FE:0x200] == b"\x55\xaa"


def parse_setup_header(source: Source) -> SetupHeader:
    start = source.read(0, min(source.size, HEADER_MAX))
    if not is_bzimage(start):
        raise source.error("has no Linux setup header", mend="name a bzImage (vmlinuz)")
    version = int.from_bytes(start[0x206:0x208].ljust(2, b"\xff"), "little")
    if version < VERSION_MIN:
        raise source.error(
            f"speaks boot protocol {version >> 8}.{version & 0xFF:02}, which is too old",
            mend="use Linux 2.0 or newer",
        )
    jump_end = 0x202 + start[0x201]
    header_end = max(
        offset + size for since, offset, size, _ in FIELDS.values() if version >= since
    )
    if len(start) < header_end:
        raise source.error("is cut short within its setup header", mend="get the file again")
    if jump_end < header_end:
        raise source.error(
            "has a setup header that is too short for its version",
            mend="get the file again, it is damaged",
        )

    def field(name: str) -> int:
        since, offset, size, default = FIELDS[name]
        if version < since:
            return default
        return int.from_bytes(start[offset : offset + size], "little")

    syssize = field("syssize") * 16
    initrd_addr_max, alignment = field("initrd_addr_max"), field("kernel_alignment")
    relocatable = field("relocatable_kernel") != 0
    pref_address, xloadflags = field("pref_address"), field("xloadflags")
    setup_size = ((start[0x1F1] or 4) + 1) * SECTOR
    payload_size = source.size - setup_size
    # syssize counts the whole protected-mode part, in paragraphs.
    needed = max(syssize - 15, field("payload_offset") + field("payload_length"), ENTRY_64 + 1)
    if payload_size < needed:
        raise source.error(
            f"is cut short: {setup_size + needed} bytes are needed, it has {source.size}",
            mend="get the file again",
        )
    if relocatable and (alignment == 0 or alignment & (alignment - 1)):
        raise source.error(
            f"asks for an alignment of {alignment:#x}", mend="get the file again, it is damaged"
        )
    header = SetupHeader(
        raw=start[HEADER_START : min(jump_end, HEADER_MAX)],
        version=version,
        setup_size=setup_size,
        payload_size=payload_size,
        # Kernels older than the field unpack themselves to a few times their size.
        init_size=field("init_size") or 4 * payload_size,
        pref_address=pref_address,
        alignment=alignment,
        loaded_high=bool(field("loadflags") & LOADED_HIGH),
        relocatable=relocatable,
        initrd_addr_max=initrd_addr_max,
        cmdline_size=field("cmdline_size"),
        xloadflags=xloadflags,
    )
    if header.load_address < HIGH_MEMORY or header.memory_end > LOW_RAM_MAX:
        raise source.error(
            f"asks to lie at {header.load_address:#x}-{header.memory_end:#x}, where a PC has no "
            "place for it",
            mend="get the file again, it is damaged",
        )
    return header


def load_bzimage(
    vm: GuestMemory,
    source: Source,
    initrd: str | os.PathLike[str] | None,
    cmdline: str,
    acpi_rsdp: int,
    *,
    vga: bool = False,
    first_initrd: Source | None = None,
) -> dict[str, int]:
    """``first_initrd`` comes before those that are named. Raises BootError."""
    header = parse_setup_header(source)
    if header.version < DIRECT_VERSION_MIN or not header.loaded_high:
        version = f"{header.version >> 8}.{header.version & 0xFF:02}"
        kind = f"of boot protocol {version}" if header.loaded_high else "that lies below 1 MiB"
        raise source.error(
            f"is a kernel {kind}, which starts by a BIOS alone", mend="add --firmware seabios"
        )
    top = low_ram_top(vm)
    if header.memory_end > top:
        raise too_little_memory(vm, source, header.memory_end, initrd, first_initrd)
    cmdline_address = write_cmdline(vm, cmdline, header.cmdline_size)
    initrd_address, initrd_size = load_initrd(
        vm, initrd, header.memory_end, min(top, header.initrd_end), first_initrd
    )
    load_address = header.load_address
    copy_to_guest(vm, load_address, source, header.setup_size, header.payload_size)

    # Zero but for what is written here: the protocol asks for it, and `sentinel` tells a
    # loader that copied too much.
    params = bytearray(PAGE_SIZE)
    params[HEADER_START : HEADER_START + len(header.raw)] = header.raw
    if vga:
        struct.pack_into("<BB", params, BP_VIDEO_MODE, TEXT_MODE, TEXT_COLUMNS)
        struct.pack_into("<BBH", params, BP_VIDEO_LINES, TEXT_LINES, IS_VGA, TEXT_POINTS)
    params[BP_TYPE_OF_LOADER] = LOADER_UNDEFINED
    struct.pack_into("<I", params, BP_CODE32_START, load_address)
    struct.pack_into("<I", params, BP_RAMDISK_IMAGE, initrd_address)
    struct.pack_into("<I", params, BP_RAMDISK_SIZE, initrd_size)
    struct.pack_into("<I", params, BP_CMD_LINE_PTR, cmdline_address)
    struct.pack_into("<Q", params, BP_ACPI_RSDP, acpi_rsdp)
    entries = memory_map(vm.ram)[:E820_MAX]
    params[BP_E820_COUNT] = len(entries)
    table = pack_e820(entries)
    params[BP_E820_TABLE : BP_E820_TABLE + len(table)] = table
    vm.write_memory(ZERO_PAGE_BASE, bytes(params))

    # Either entry wants the address of boot_params in ESI, and all else zero.
    if header.is_64bit:
        regs = long_mode_state(vm, load_address + ENTRY_64)
    else:
        regs = protected_mode_state(vm, load_address)
    regs["rsi"] = ZERO_PAGE_BASE
    return regs
