"""Linux's 64-bit boot protocol for bzImage (Documentation/arch/x86/boot.rst)."""

import os
import struct
from dataclasses import dataclass
from typing import Final

from tetrarch.boot.cmdline import write_cmdline
from tetrarch.boot.cpustate import long_mode_state
from tetrarch.boot.e820 import memory_map, pack_e820
from tetrarch.boot.layout import (
    HIGH_MEMORY,
    LOW_RAM_MAX,
    PAGE_SIZE,
    ZERO_PAGE_BASE,
    GuestMemory,
    align_up,
    low_ram_top,
    mib_up,
    total_ram,
)
from tetrarch.boot.source import Source, copy_to_guest, load_initrd

__all__ = ["SetupHeader", "is_bzimage", "load_bzimage", "parse_setup_header"]

SECTOR: Final = 512
HEADER_START: Final = 0x1F1
#: 0x1F1 to the end of init_size, the last field that is read here.
HEADER_NEEDED: Final = 0x264
#: boot_params keeps the header up to here; what follows is edd_mbr_sig_buffer.
HEADER_MAX: Final = 0x290
BOOT_FLAG: Final = 0xAA55
MAGIC: Final = b"HdrS"
#: 2.12 brought xloadflags, which says whether there is a 64-bit entry (Linux 3.8).
VERSION_64BIT: Final = 0x020C
LOADED_HIGH: Final = 1 << 0
XLF_KERNEL_64: Final = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G: Final = 1 << 1
ENTRY_64: Final = 0x200
LOADER_UNDEFINED: Final = 0xFF

# boot_params, Documentation/arch/x86/zero-page.rst
BP_ACPI_RSDP: Final = 0x070
BP_E820_COUNT: Final = 0x1E8
BP_TYPE_OF_LOADER: Final = 0x210
BP_CODE32_START: Final = 0x214
BP_RAMDISK_IMAGE: Final = 0x218
BP_RAMDISK_SIZE: Final = 0x21C
BP_CMD_LINE_PTR: Final = 0x228
BP_E820_TABLE: Final = 0x2D0
E820_MAX: Final = 128


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
    relocatable: bool
    initrd_addr_max: int
    cmdline_size: int
    xloadflags: int

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
    if len(start) < HEADER_NEEDED:
        raise source.error("is cut short within its setup header", mend="get the file again")
    (version,) = struct.unpack_from("<H", start, 0x206)
    jump_end = 0x202 + start[0x201]
    if version < VERSION_64BIT:
        raise source.error(
            f"speaks boot protocol {version >> 8}.{version & 0xFF:02}, which has no 64-bit entry",
            mend="use an x86-64 kernel, Linux 3.8 or newer",
        )
    if jump_end < HEADER_NEEDED:
        raise source.error(
            "has a setup header that is too short for its version",
            mend="get the file again, it is damaged",
        )

    syssize = struct.unpack_from("<I", start, 0x1F4)[0] * 16
    loadflags = start[0x211]
    initrd_addr_max, alignment = struct.unpack_from("<II", start, 0x22C)
    relocatable = start[0x234] != 0
    (xloadflags, cmdline_size) = struct.unpack_from("<HI", start, 0x236)
    payload_offset, payload_length = struct.unpack_from("<II", start, 0x248)
    pref_address, init_size = struct.unpack_from("<QI", start, 0x258)

    if not xloadflags & XLF_KERNEL_64:
        raise source.error("is a 32-bit kernel", mend="use an x86-64 one")
    if not loadflags & LOADED_HIGH:
        raise source.error("is a zImage that loads below 1 MiB", mend="use a bzImage")
    setup_size = ((start[0x1F1] or 4) + 1) * SECTOR
    payload_size = source.size - setup_size
    # syssize counts the whole protected-mode part, in paragraphs.
    needed = max(syssize - 15, payload_offset + payload_length, ENTRY_64 + 1)
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
        init_size=init_size,
        pref_address=pref_address,
        alignment=alignment,
        relocatable=relocatable,
        initrd_addr_max=initrd_addr_max,
        cmdline_size=cmdline_size,
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
) -> dict[str, int]:
    header = parse_setup_header(source)
    top = low_ram_top(vm)
    if header.memory_end > top:
        raise source.error(
            f"needs {mib_up(header.memory_end)} MiB to start, the machine has "
            f"{mib_up(total_ram(vm))} MiB",
            mend=f"give it at least --memory {mib_up(header.memory_end)}M",
        )
    cmdline_address = write_cmdline(vm, cmdline, header.cmdline_size)
    initrd_address, initrd_size = load_initrd(
        vm, initrd, header.memory_end, min(top, header.initrd_end)
    )
    load_address = header.load_address
    copy_to_guest(vm, load_address, source, header.setup_size, header.payload_size)

    # Zero but for what is written here: the protocol asks for it, and `sentinel` tells a
    # loader that copied too much.
    params = bytearray(PAGE_SIZE)
    params[HEADER_START : HEADER_START + len(header.raw)] = header.raw
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

    regs = long_mode_state(vm, load_address + ENTRY_64)
    regs["rsi"] = ZERO_PAGE_BASE
    return regs
