"""Where boot data lies in low guest memory, and the limits of the PC's RAM."""

from typing import Final, Protocol

from tetrarch._native import LOW_RAM_END
from tetrarch.errors import BootError

__all__ = [
    "ACPI_BASE",
    "ACPI_END",
    "CMDLINE_BASE",
    "CMDLINE_SPACE",
    "EBDA_BASE",
    "GDT_BASE",
    "GENERATION_ID",
    "HIGH_MEMORY",
    "LOW_RAM_MAX",
    "MULTIBOOT_BASE",
    "MULTIBOOT_END",
    "PAGE_SIZE",
    "PAGE_TABLES_BASE",
    "SMBIOS_BASE",
    "SMBIOS_END",
    "START_INFO_BASE",
    "ZERO_PAGE_BASE",
    "GuestMemory",
    "align_down",
    "align_up",
    "low_ram_top",
    "mib_up",
    "total_ram",
]

PAGE_SIZE: Final = 0x1000

GDT_BASE: Final = 0x500
START_INFO_BASE: Final = 0x6000
ZERO_PAGE_BASE: Final = 0x7000
#: One PML4, one PDPT and four page directories: 0x9000 to 0xEFFF.
PAGE_TABLES_BASE: Final = 0x9000
CMDLINE_BASE: Final = 0x2_0000
CMDLINE_SPACE: Final = 0x1_0000
#: What a Multiboot loader tells its kernel.
MULTIBOOT_BASE: Final = 0x1_0000
MULTIBOOT_END: Final = 0x2_0000
#: Conventional memory ends 1 KiB below 640 KiB, where a BIOS keeps its EBDA.
EBDA_BASE: Final = 0x9_FC00
ACPI_BASE: Final = 0xE_0000
ACPI_END: Final = 0xF_E000
SMBIOS_BASE: Final = 0xF_E000
SMBIOS_END: Final = 0xF_F000
#: The generation ID has a page of its own, reserved as the tables are (boot/generation.py).
GENERATION_ID: Final = 0xF_F000
HIGH_MEMORY: Final = 0x10_0000

#: RAM above this size continues at 4 GiB; below lies the hole for MMIO.
LOW_RAM_MAX: Final = LOW_RAM_END


class GuestMemory(Protocol):
    """What loading a kernel needs of a machine."""

    @property
    def ram(self) -> list[tuple[int, int]]: ...
    def read_memory(self, address: int, length: int) -> bytes: ...
    def write_memory(self, address: int, data: bytes) -> None: ...


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def align_down(value: int, alignment: int) -> int:
    return value // alignment * alignment


def mib_up(value: int) -> int:
    """Bytes as whole MiB, rounded up."""
    return -(-value // (1 << 20))


def total_ram(vm: GuestMemory) -> int:
    return sum(length for _, length in vm.ram)


def low_ram_top(vm: GuestMemory) -> int:
    """The end of the RAM range that starts at address 0."""
    for base, length in vm.ram:
        if base == 0:
            return length
    raise BootError(
        "the machine has no RAM at address 0", mend="put some there: a PC kernel starts in it"
    )
