"""The initial CPU states that kernels are entered in, with the GDT and tables behind them."""

import struct
from typing import Final

from tetrarch.boot.layout import GDT_BASE, PAGE_SIZE, PAGE_TABLES_BASE, GuestMemory

__all__ = ["long_mode_state", "protected_mode_state", "reset_state"]

#: Linux's Documentation/arch/x86/boot.rst names both selectors.
BOOT_CS: Final = 0x10
BOOT_DS: Final = 0x18

# Descriptors, Intel SDM volume 3, 3.4.5: base 0, limit 4 GiB, present, ring 0, accessed.
GDT_CODE64: Final = 0x00AF_9B00_0000_FFFF
GDT_CODE32: Final = 0x00CF_9B00_0000_FFFF
GDT_DATA: Final = 0x00CF_9300_0000_FFFF

# The same as access rights in the form of a VMCS, SDM volume 3, 24.4.1.
ATTR_CODE64: Final = 0xA09B
ATTR_CODE32: Final = 0xC09B
ATTR_DATA: Final = 0xC093
ATTR_TSS_BUSY: Final = 0x008B
ATTR_UNUSABLE: Final = 0x1_0000
ATTR_CODE16: Final = 0x009B
ATTR_DATA16: Final = 0x0093
ATTR_LDT: Final = 0x0082

CR0_PE: Final = 1 << 0
CR0_ET: Final = 1 << 4
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
RFLAGS_FIXED: Final = 1 << 1
#: Type, family and model: a P6, as hypervisors leave it.
RESET_RDX: Final = 0x600

PTE_PRESENT: Final = 1 << 0
PTE_WRITE: Final = 1 << 1
PTE_LARGE: Final = 1 << 7
ENTRIES: Final = 512
IDENTITY_GIB: Final = 4


def _write_page_tables(vm: GuestMemory) -> None:
    # 4 GiB cover everything a loader places: kernel, zero page, command line and initrd all lie
    # below. The kernel's own unpacking code maps more when it wants more.
    pml4, pdpt = PAGE_TABLES_BASE, PAGE_TABLES_BASE + PAGE_SIZE
    directories = [pdpt + PAGE_SIZE * (1 + i) for i in range(IDENTITY_GIB)]
    flags = PTE_PRESENT | PTE_WRITE
    tables = [[pdpt | flags], [address | flags for address in directories]]
    for gib in range(IDENTITY_GIB):
        tables.append([gib << 30 | i << 21 | flags | PTE_LARGE for i in range(ENTRIES)])
    for index, entries in enumerate(tables):
        entries += [0] * (ENTRIES - len(entries))
        vm.write_memory(pml4 + index * PAGE_SIZE, struct.pack(f"<{ENTRIES}Q", *entries))


def _write_gdt(vm: GuestMemory, code: int) -> int:
    gdt = struct.pack("<4Q", 0, 0, code, GDT_DATA)
    vm.write_memory(GDT_BASE, gdt)
    return len(gdt) - 1


def _segments(code_attr: int, gdt_limit: int) -> dict[str, int]:
    segments = {"cs": (BOOT_CS, 0xFFFF_FFFF, code_attr)}
    for name in ("ds", "es", "fs", "gs", "ss"):
        segments[name] = (BOOT_DS, 0xFFFF_FFFF, ATTR_DATA)
    segments["tr"] = (0, 0x67, ATTR_TSS_BUSY)
    segments["ldt"] = (0, 0, ATTR_UNUSABLE)
    regs = {
        "gdtr_base": GDT_BASE,
        "gdtr_limit": gdt_limit,
        # No IDT: an exception before the kernel has one is a triple fault.
        "idtr_base": 0,
        "idtr_limit": 0,
    }
    for name, (selector, limit, attr) in segments.items():
        regs[f"{name}_selector"] = selector
        regs[f"{name}_base"] = 0
        regs[f"{name}_limit"] = limit
        regs[f"{name}_attr"] = attr
    return regs


def _general(rip: int) -> dict[str, int]:
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp")
    regs = dict.fromkeys(names + tuple(f"r{n}" for n in range(8, 16)), 0)
    return regs | {"rip": rip, "rflags": RFLAGS_FIXED, "cr2": 0, "cr8": 0}


def long_mode_state(vm: GuestMemory, entry: int) -> dict[str, int]:
    """64-bit mode with an identity map, as Linux's 64-bit boot protocol asks."""
    _write_page_tables(vm)
    limit = _write_gdt(vm, GDT_CODE64)
    return (
        _general(entry)
        | _segments(ATTR_CODE64, limit)
        | {
            "cr0": CR0_PE | CR0_ET | CR0_PG,
            "cr3": PAGE_TABLES_BASE,
            "cr4": CR4_PAE,
            "efer": EFER_LME | EFER_LMA,
        }
    )


def protected_mode_state(vm: GuestMemory, entry: int) -> dict[str, int]:
    """32-bit protected mode without paging, as the PVH boot protocol asks."""
    limit = _write_gdt(vm, GDT_CODE32)
    return (
        _general(entry)
        | _segments(ATTR_CODE32, limit)
        | {"cr0": CR0_PE | CR0_ET, "cr3": 0, "cr4": 0, "efer": 0}
    )


def reset_state() -> dict[str, int]:
    """A processor after RESET, before its first instruction (SDM volume 3, table 10-1)."""
    regs = _general(0xFFF0) | {"rdx": RESET_RDX}
    segments = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), (0, 0, ATTR_DATA16))
    segments |= {
        "cs": (0xF000, 0xFFFF_0000, ATTR_CODE16),
        "tr": (0, 0, ATTR_TSS_BUSY),
        "ldt": (0, 0, ATTR_LDT),
    }
    for name, (selector, base, attr) in segments.items():
        regs[f"{name}_selector"] = selector
        regs[f"{name}_base"] = base
        regs[f"{name}_limit"] = 0xFFFF
        regs[f"{name}_attr"] = attr
    for name in ("gdtr", "idtr"):
        regs[f"{name}_base"] = 0
        regs[f"{name}_limit"] = 0xFFFF
    return regs | {"cr0": CR0_CD | CR0_NW | CR0_ET, "cr3": 0, "cr4": 0, "efer": 0}
