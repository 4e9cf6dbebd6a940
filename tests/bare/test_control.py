"""Control registers, MSRs and the fast system calls
(Intel SDM 3A, 2.5, 2.2.1, 5.8.7, 5.8.8, 10.8.5; 4; AMD APM 2, 3.1, 6.1 and appendix A)."""

from __future__ import annotations

from typing import Any

from tests.bare.check import (
    Check,
    Engine,
    Expected,
    any_of,
    by_vendor,
    done,
    each,
    gp,
    run,
    ud,
)
from tests.bare.kernel import (
    CD,
    CODE,
    DATA,
    EM,
    ET,
    KERNEL_CODE,
    KERNEL_DATA,
    LMA,
    LME,
    MP,
    NE,
    NW,
    NXE,
    PAE,
    PE,
    PG,
    SCE,
    STACK,
    TABLES,
    TS,
    UMIP,
    USER_STACK,
    USER_TEXT,
    WP,
    Mode,
)

NOT_CANONICAL = 0x8000_0000_0000


def change(register: str, on: int = 0, off: int = 0, bits: int = 64) -> str:
    a, c = ("rax", "rcx") if bits == 64 else ("eax", "ecx")
    return (
        f"mov {a}, {register}; mov {c}, {on:#x}; or {a}, {c}; mov {c}, {off:#x}; not {c}; "
        f"and {a}, {c}; mov {register}, {a}"
    )


def cr(
    name: str,
    register: str,
    expect: Expected,
    on: int = 0,
    off: int = 0,
    mode: Mode = Mode.LONG,
    **more: Any,
) -> Check:
    """A change of a control register's bits (SDM 2B, "MOV - Move to/from Control Registers")."""
    return Check(
        f"{mode.value}: {register.upper()} {name}",
        change(register, on, off, mode.bits if mode.bits != 16 else 32),
        expect,
        mode,
        **more,
    )


CR_CHECKS = [
    cr("bit 32", "cr0", gp(), 1 << 32),
    cr(
        "reserved bits below 32 are ignored",
        "cr0",
        done(cr0=PE | ET | NE | WP | PG),
        1 << 6 | 1 << 15 | 1 << 17 | 1 << 28,
    ),
    cr("NW without CD", "cr0", gp(), NW),
    cr("CD without NW", "cr0", done(), CD),
    cr("CD and NW", "cr0", done(), CD | NW),
    cr("PG without PE", "cr0", gp(), off=PE),
    cr("PG without PE from real mode", "cr0", gp(), PG, mode=Mode.REAL),
    cr("ET stays", "cr0", done(cr0=PE | ET | NE | WP | PG), off=ET),
    cr("PG off in 64-bit code", "cr0", gp(), off=PG),
    cr(
        "PG off in compatibility mode ends long mode",
        "cr0",
        done(efer=NXE | LME | SCE),
        off=PG,
        mode=Mode.COMPAT32,
    ),
    cr("PG on with LME and without PAE", "cr0", gp(), PG, mode=Mode.PROT32, regs={"efer": LME}),
    cr(
        "PG on with LME and PAE",
        "cr0",
        done(efer=LME | LMA),
        PG,
        mode=Mode.PROT32,
        regs={"efer": LME, "cr3": TABLES},
        change={"cr4": (PAE, 0)},
    ),
    cr(
        "PG on with LME and CS.L",
        "cr0",
        gp(),
        PG,
        mode=Mode.PROT32,
        regs={"efer": LME, "cr3": TABLES, "cs_attr": 0xE09B},
        change={"cr4": (PAE, 0)},
    ),
    Check(
        "prot32: CR0 PG on with LME and a 16-bit TSS",
        change("cr0", PG, bits=32),
        by_vendor(intel=gp(), amd=any_of(gp(), done())),
        Mode.PROT32,
        regs={"efer": LME, "cr3": TABLES, "tr_attr": 0x83},
        change={"cr4": (PAE, 0)},
    ),
    cr("PAE off in long mode", "cr4", gp(), off=PAE),
    cr("PAE off without paging", "cr4", done(), off=PAE, mode=Mode.PROT32),
    cr("bit 63", "cr4", gp(), 1 << 63),
    cr("bit 32", "cr4", gp(), 1 << 32),
    cr("bit 15", "cr4", gp(), 1 << 15),
    cr("bit 19", "cr4", any_of(gp(), done()), 1 << 19),
    cr("bit 31", "cr4", gp(), 1 << 31, mode=Mode.PROT32),
    cr("LA57 in long mode", "cr4", gp(), 1 << 12),
    cr("SMEP", "cr4", done(), 1 << 20, needs=("smep",)),
    cr("UMIP", "cr4", done(), 1 << 11, needs=("umip",)),
    cr("FSGSBASE", "cr4", done(), 1 << 16, needs=("fsgsbase",)),
    cr("OSXSAVE", "cr4", done(), 1 << 18, needs=("xsave",)),
    cr("PKE without PKU", "cr4", gp(), 1 << 22, needs=("!pku",)),
    Check("CR8 above 15", "mov eax, 16; mov cr8, rax", gp()),
    Check("CR8 of 15", "mov eax, 15; mov cr8, rax; mov rcx, cr8", done(rcx=15)),
    Check("CR8 with upper bits", "mov rax, 1 << 32; mov cr8, rax", gp()),
    Check(
        "CR2 holds 64 bits",
        "mov rax, 0x123456789ABCDEF0; mov cr2, rax; mov rcx, cr2",
        done(rcx=0x1234_5678_9ABC_DEF0),
    ),
    Check("CR3 has no bits above the address", "mov rax, cr3; bts rax, 52; mov cr3, rax", gp()),
    Check(
        "CR3 with PWT and PCD",
        "mov rax, cr3; or rax, 0x18; mov cr3, rax; mov rcx, cr3",
        done(rcx=TABLES | 0x18),
    ),
    Check("CR5 does not exist", ".byte 0x0F, 0x20, 0xE8", ud()),
    Check("CR7 does not exist", ".byte 0x0F, 0x22, 0xF8", ud()),
    Check("CR9 does not exist", ".byte 0x44, 0x0F, 0x20, 0xC8", ud()),
    Check(
        "MOV of a control register ignores ModRM.mod",
        ".byte 0x0F, 0x20, 0x00",
        done(rax=PE | ET | NE | WP | PG),
    ),
    Check("LMSW sets PE", "mov ax, 1; lmsw ax; mov ecx, cr0", done(rcx=PE | ET | NE), Mode.REAL),
    Check(
        "LMSW does not clear PE",
        "mov ax, 0; lmsw ax; mov ecx, cr0",
        done(rcx=PE | ET | NE),
        Mode.PROT32,
    ),
    Check(
        "LMSW sets TS, EM and MP",
        "mov ax, 0xF; lmsw ax; mov ecx, cr0",
        done(rcx=PE | ET | NE | TS | EM | MP),
        Mode.PROT32,
    ),
    Check(
        "LMSW clears TS, EM and MP",
        "mov ax, 1; lmsw ax; mov ecx, cr0",
        done(rcx=PE | ET | NE),
        Mode.PROT32,
        change={"cr0": (TS | EM | MP, 0)},
    ),
    Check("SMSW of a register", "smsw eax", done(rax=PE | ET | NE), Mode.PROT32),
    Check("SMSW of user code", "smsw ax", done(rax=PE | ET | NE), Mode.PROT32, 3),
    *(
        Check(
            f"UMIP: {name} of user code",
            code,
            gp(),
            ring=3,
            change={"cr4": (UMIP, 0)},
            needs=("umip",),
        )
        for name, code in (
            ("SGDT", "sgdt [DATA]"),
            ("SIDT", "sidt [DATA]"),
            ("SLDT", "sldt ax"),
            ("STR", "str ax"),
            ("SMSW", "smsw ax"),
        )
    ),
    Check(
        "UMIP: SGDT of the kernel",
        "sgdt [DATA]",
        done(),
        change={"cr4": (UMIP, 0)},
        needs=("umip",),
    ),
    Check("SGDT of user code without UMIP", "sgdt [DATA]", done(), ring=3),
    Check(
        "LGDT of a base that is not canonical",
        "lgdt [DATA]",
        gp(),
        memory={DATA: b"\xff\0" + NOT_CANONICAL.to_bytes(8, "little")},
    ),
    Check(
        "LIDT of a base that is not canonical",
        "lidt [DATA]",
        gp(),
        memory={DATA: b"\xff\0" + NOT_CANONICAL.to_bytes(8, "little")},
    ),
    Check(
        "LGDT of 16 bits has a base of 24",
        "lgdt [DATA]",
        done(gdtr_base=0x345678, gdtr_limit=0x17F),
        Mode.REAL,
        memory={DATA: b"\x7f\x01\x78\x56\x34\x12"},
    ),
    Check(
        "LGDT of 32 bits",
        "lgdt [DATA]",
        done(gdtr_base=0x12345678, gdtr_limit=0x17F),
        Mode.PROT32,
        memory={DATA: b"\x7f\x01\x78\x56\x34\x12"},
    ),
    Check("LGDT of a register", ".byte 0x0F, 0x01, 0xD7", any_of(ud()), Mode.PROT32),
    Check(
        "from real to protected mode: CS is real until a jump",
        "mov eax, cr0; or al, 1; mov cr0, eax; mov cx, cs",
        done(rcx=0, cs_attr=0x9B),
        Mode.REAL,
    ),
    Check("RDTSC of user code with TSD", "rdtsc", gp(), ring=3, change={"cr4": (4, 0)}),
    Check("RDTSC of user code", "rdtsc; mov eax, 0; mov edx, 0", done(rax=0), ring=3),
    Check("RDTSC of the kernel with TSD", "rdtsc", done(), change={"cr4": (4, 0)}),
    Check("RDTSCP with TSD", "rdtscp", gp(), ring=3, change={"cr4": (4, 0)}, needs=("rdtscp",)),
    Check(
        "RDTSCP gives TSC_AUX",
        "rdtscp",
        done(rcx=0x1234),
        needs=("rdtscp",),
        msrs={0xC000_0103: 0x1234},
    ),
    Check("RDFSBASE without FSGSBASE", "rdfsbase rax", ud()),
    Check(
        "RDFSBASE",
        "rdfsbase rax",
        done(rax=0x1234),
        change={"cr4": (1 << 16, 0)},
        regs={"fs_base": 0x1234},
        ring=3,
        needs=("fsgsbase",),
    ),
    Check(
        "WRGSBASE",
        "mov eax, 0x1234; wrgsbase rax",
        done(gs_base=0x1234),
        change={"cr4": (1 << 16, 0)},
        needs=("fsgsbase",),
    ),
    Check(
        "WRGSBASE that is not canonical",
        "mov rax, 1 << 47; wrgsbase rax",
        gp(),
        change={"cr4": (1 << 16, 0)},
        needs=("fsgsbase",),
    ),
    Check(
        "RDFSBASE in compatibility mode",
        ".byte 0xF3, 0x0F, 0xAE, 0xC0",
        ud(),
        Mode.COMPAT32,
        change={"cr4": (1 << 16, 0)},
    ),
    Check("SWAPGS", "swapgs", done(gs_base=0x5678), msrs={0xC000_0102: 0x5678}),
    Check("SWAPGS in compatibility mode", ".byte 0x0F, 0x01, 0xF8", ud(), Mode.COMPAT32),
]


def wrmsr(index: int, value: int) -> str:
    return (
        f"mov ecx, {index:#x}; mov eax, {value & 0xFFFFFFFF:#x}; mov edx, {value >> 32:#x}; wrmsr"
    )


def takes(name: str, index: int, value: int, back: int | None = None, **more: Any) -> Check:
    """A value that is read back, as it is or as ``back``."""
    back = value if back is None else back
    code = f"{wrmsr(index, value)}; mov eax, 5; mov edx, 5; rdmsr"
    return Check(
        f"{name} takes {value:#x}", code, done(rax=back & 0xFFFF_FFFF, rdx=back >> 32), **more
    )


def refuses(name: str, index: int, value: int, **more: Any) -> Check:
    return Check(f"{name} refuses {value:#x}", wrmsr(index, value), gp(), **more)


def either(name: str, index: int, value: int, **more: Any) -> Check:
    return Check(f"{name} may refuse {value:#x}", wrmsr(index, value), any_of(gp(), done()), **more)


def reads(name: str, index: int, expect: Expected, **more: Any) -> Check:
    return Check(f"{name} is read", f"mov ecx, {index:#x}; rdmsr", expect, **more)


# Those that hold an address must be canonical (SDM 2D, "WRMSR").
ADDRESSES = {
    "LSTAR": 0xC000_0082,
    "CSTAR": 0xC000_0083,
    "FS.base": 0xC000_0100,
    "GS.base": 0xC000_0101,
    "KERNEL_GS_BASE": 0xC000_0102,
    "SYSENTER_ESP": 0x175,
    "SYSENTER_EIP": 0x176,
}
MSR_CHECKS = [
    *(
        check
        for name, index in ADDRESSES.items()
        for check in (
            takes(name, index, 0x1234_5678),
            takes(name, index, 0xFFFF_8000_0000_1000),
            refuses(name, index, NOT_CANONICAL),
        )
    ),
    takes("STAR", 0xC000_0081, 0x0023_0010_1234_5678),
    takes("SFMASK", 0xC000_0084, 0x47700),
    takes("SYSENTER_CS", 0x174, 0x10),
    takes("TSC_AUX", 0xC000_0103, 0x1234_5678, needs=("rdtscp",)),
    # Reserved (SDM 4); AMD's CPUs ignore what is above (APM 2, appendix A.1).
    Check(
        "TSC_AUX's upper half",
        wrmsr(0xC000_0103, 1 << 32),
        by_vendor(intel=gp(), amd=any_of(gp(), done())),
        needs=("rdtscp",),
    ),
    takes("PAT", 0x277, 0x0007_0406_0007_0406),
    *(takes("PAT", 0x277, kind * 0x0101_0101_0101_0101) for kind in (0, 1, 4, 5, 6, 7)),
    *(refuses("PAT", 0x277, kind) for kind in (2, 3, 8, 0x10, 2 << 56)),
    takes("MTRR_DEF_TYPE", 0x2FF, 0xC06),
    refuses("MTRR_DEF_TYPE", 0x2FF, 2),
    refuses("MTRR_DEF_TYPE", 0x2FF, 1 << 9),
    refuses("MTRR_DEF_TYPE", 0x2FF, 1 << 12),
    takes("MTRR_FIX64K", 0x250, 0x0606_0606_0606_0606),
    refuses("MTRR_FIX64K", 0x250, 7),
    takes("MTRR_FIX4K of F8000", 0x26F, 0x0505_0505_0505_0505),
    takes("MTRR_PHYSBASE0", 0x200, 0x1000_0006),
    refuses("MTRR_PHYSBASE0", 0x200, 2),
    refuses("MTRR_PHYSBASE0", 0x200, 1 << 62),
    takes("MTRR_PHYSMASK0", 0x201, 0xF000_0800),
    refuses("MTRR_PHYSMASK0", 0x201, 1 << 62),
    refuses("MTRR_CAP", 0xFE, 0x508),
    takes("EFER without changes", 0xC000_0080, LME | LMA | NXE | SCE),
    takes("EFER without SCE", 0xC000_0080, LME | LMA | NXE),
    refuses("EFER", 0xC000_0080, LMA | NXE | SCE),
    refuses("EFER", 0xC000_0080, 1 << 1 | LME | LMA),
    refuses("EFER", 0xC000_0080, 1 << 32 | LME | LMA),
    # LMA is read-only: AMD's CPUs refuse another value (APM 2, 3.1.7), Intel's ignore it.
    either("EFER", 0xC000_0080, LME | NXE | SCE),
    takes("APIC_BASE", 0x1B, 0xFEE0_0900),
    refuses("APIC_BASE", 0x1B, 0xFEE0_0901),
    refuses("APIC_BASE", 0x1B, 0xFEE0_0980),
    refuses("APIC_BASE", 0x1B, 0xFEE0_0500, needs=("x2apic",)),
    refuses("APIC_BASE", 0x1B, 1 << 62 | 0xFEE0_0900),
    takes("APIC_BASE", 0x1B, 0xFEE0_0D00, needs=("x2apic",)),
    Check(
        "the TSC goes on from what is written",
        f"{wrmsr(0x10, 0x1000_0000_0000)}; rdtsc; mov eax, 0; shr edx, 8",
        done(rax=0, rdx=0x10),
    ),
    *(
        Check(f"{name} of MSR {index:#x}, which no CPU has", code.format(index), gp())
        for index in (0xBAD, 0x4000_1234, 0xC000_0FFF, 0xC001_FFFF, 0xFFFF_FFFF, 0x2FE)
        for name, code in (("RDMSR", "mov ecx, {:#x}; rdmsr"), ("WRMSR", "mov ecx, {:#x}; wrmsr"))
    ),
    reads("MCG_CAP", 0x179, done()),
    refuses("MCG_CAP", 0x179, 0),
    takes("MCG_STATUS", 0x17A, 0),
    Check(
        "RDMSR zeroes the upper halves",
        "mov rax, -1; mov rdx, -1; mov ecx, 0x277; rdmsr",
        done(rax=0x0007_0406, rdx=0x0007_0406),
        msrs={0x277: 0x0007_0406_0007_0406},
    ),
    Check(
        "RDMSR ignores the upper half of RCX",
        "mov rcx, 0x500000277; rdmsr",
        done(rax=0x0007_0406),
        msrs={0x277: 0x0007_0406_0007_0406},
    ),
    reads("FS.base in 32-bit code: its upper half", 0xC000_0100, done(rdx=0), mode=Mode.COMPAT32),
    reads("MTRR_PHYSBASE7", 0x20E, done()),
]

STAR, LSTAR, CSTAR, SFMASK = (0xC000_0081 + n for n in range(4))
# SYSCALL: kernel's segments; SYSRET: user's, 32-bit code, data, 64-bit code.
STARS = {
    STAR: 0x0028 << 48 | KERNEL_CODE << 32 | USER_TEXT,
    LSTAR: USER_TEXT,
    CSTAR: USER_TEXT,
    SFMASK: 0x200,
}
NO_SCE = {"efer": (0, SCE)}
SYSENTERS = {0x174: KERNEL_CODE, 0x175: USER_STACK, 0x176: USER_TEXT}
SYSCALL_CHECKS = [
    Check(
        "SYSCALL",
        "syscall",
        done(
            USER_TEXT,
            rcx=CODE + 2,
            r11=0x202,
            cs_selector=KERNEL_CODE,
            ss_selector=KERNEL_DATA,
            cs_attr=0xA09B,
            ss_attr=0xC093,
            rsp=STACK,
            **{"if": 0},
        ),
        ring=3,
        flags=0x200,
        msrs=STARS,
    ),
    Check(
        "SYSCALL keeps what SFMASK does not name",
        "syscall",
        done(USER_TEXT, df=1, zf=1, r11=0x442),
        ring=3,
        flags=0x440,
        msrs=STARS,
    ),
    Check("SYSCALL without SCE", "syscall", ud(), ring=3, msrs=STARS, change=NO_SCE),
    Check("SYSCALL of the kernel", "syscall", done(USER_TEXT, cs_selector=KERNEL_CODE), msrs=STARS),
    Check(
        "SYSCALL in compatibility mode",
        "syscall",
        by_vendor(intel=ud(), amd=done(USER_TEXT, rcx=CODE + 2, cs_attr=0xA09B)),
        Mode.COMPAT32,
        3,
        msrs=STARS,
    ),
    Check(
        "SYSCALL in protected mode",
        ".byte 0x0F, 5",
        by_vendor(intel=ud(), amd=done(USER_TEXT, rcx=CODE + 2, cs_attr=0xC09B, **{"if": 0})),
        Mode.PROT32,
        3,
        msrs=STARS,
        flags=0x200,
        change={"efer": (SCE, 0)},
    ),
    Check("SYSCALL in real mode", ".byte 0x0F, 5", ud(), Mode.REAL),
    Check(
        "SYSRET to 64-bit code",
        "mov ecx, USER_TEXT; mov r11d, 0x202; sysretq",
        done(USER_TEXT, cs_selector=0x3B, ss_selector=0x33, cs_attr=0xA0FB, **{"if": 1}),
        msrs=STARS,
    ),
    Check(
        "SYSRET to 32-bit code",
        "mov ecx, USER_TEXT; mov r11d, 0x202; .byte 0x0F, 7",
        done(USER_TEXT, cs_selector=0x2B, ss_selector=0x33, cs_attr=0xC0FB),
        msrs=STARS,
    ),
    Check(
        "SYSRET clears RF and VM",
        "mov ecx, USER_TEXT; mov r11d, 0x30202; sysretq",
        done(USER_TEXT, rf=0, vm=0),
        msrs=STARS,
    ),
    Check(
        "SYSRET to an address that is not canonical",
        "mov rcx, 1 << 47; mov r11d, 2; sysretq",
        by_vendor(intel=gp(cs_selector=KERNEL_CODE), amd=gp(at=1 << 47)),
        msrs=STARS,
    ),
    Check("SYSRET without SCE", "sysretq", ud(), msrs=STARS, change=NO_SCE),
    Check("SYSRET of ring 3", "sysretq", gp(), ring=3, msrs=STARS),
    Check(
        "SYSRET does not move RSP",
        "mov ecx, USER_TEXT; mov r11d, 2; sysretq",
        done(USER_TEXT, rsp=STACK),
        msrs=STARS,
    ),
    Check(
        "SYSENTER",
        "sysenter",
        by_vendor(
            intel=done(
                USER_TEXT,
                rsp=USER_STACK,
                cs_selector=KERNEL_CODE,
                ss_selector=KERNEL_DATA,
                cs_attr=0xA09B,
                **{"if": 0},
            ),
            amd=ud(),
        ),
        ring=3,
        msrs=SYSENTERS,
        flags=0x200,
    ),
    Check(
        "SYSENTER in protected mode",
        "sysenter",
        done(
            USER_TEXT,
            rsp=USER_STACK,
            cs_selector=KERNEL_CODE,
            ss_selector=KERNEL_DATA,
            cs_attr=0xC09B,
            **{"if": 0},
        ),
        Mode.PROT32,
        3,
        msrs=SYSENTERS,
        flags=0x200,
    ),
    Check("SYSENTER in protected mode without a CS", "sysenter", gp(), Mode.PROT32, 3),
    Check("SYSENTER with a CS of RPL 3", "sysenter", gp(), Mode.PROT32, 3, msrs={0x174: 3}),
    Check("SYSENTER in real mode", "sysenter", gp(), Mode.REAL),
    Check(
        "SYSEXIT in protected mode",
        "mov edx, USER_TEXT; mov ecx, USER_STACK; sysexit",
        done(USER_TEXT, rsp=USER_STACK, cs_selector=0x1B, ss_selector=0x23, cs_attr=0xC0FB),
        Mode.PROT32,
        msrs=SYSENTERS,
    ),
    Check("SYSEXIT of ring 3", "sysexit", gp(), Mode.PROT32, 3, msrs=SYSENTERS),
    Check("SYSEXIT without a CS", "sysexit", gp(), Mode.PROT32),
    Check(
        "SYSEXIT to 64-bit code",
        "mov edx, USER_TEXT; mov ecx, USER_STACK; sysexitq",
        by_vendor(
            intel=done(USER_TEXT, cs_selector=0x2B, ss_selector=0x33, cs_attr=0xA0FB), amd=ud()
        ),
        msrs=SYSENTERS,
    ),
    Check(
        "SYSEXIT to an address that is not canonical",
        "mov rdx, 1 << 47; mov ecx, USER_STACK; sysexitq",
        by_vendor(intel=gp(), amd=ud()),
        msrs=SYSENTERS,
    ),
]


@each(CR_CHECKS)
def test_control_registers(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(MSR_CHECKS)
def test_msrs(engine: Engine, check: Check) -> None:
    run(engine, check)


@each(SYSCALL_CHECKS)
def test_system_calls(engine: Engine, check: Check) -> None:
    run(engine, check)
