"""A check: what the machine is before, one instruction, and what the manuals say of it.

    Check("user code reads a supervisor page", "mov eax, [PAGE]",
          pf(P | U), mode=LONG, ring=3, page=Page(P | W))

``code`` runs in ``mode`` and ``ring``. The instruction that the check is about is the last one,
or the one behind ">": a fault is to be found there, a trap behind it. What runs on meets an OUT
that ends the run (``done``).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from tests.bare import kernel
from tests.bare.assembler import Assembled, Source, assemble
from tests.bare.kernel import Mode, Page

from tetrarch._native import EngineError, Vm
from tetrarch.machine.kvm import probe_kvm

DE, DB, NMI, BP, OF, BR, UD, NM, DF, TS_, NP, SS, GP, PF, MF, AC_ = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17,
)  # fmt: skip
# Exceptions with an error code (Intel SDM 3A, table 6-1).
WITH_ERROR = frozenset({DF, TS_, NP, SS, GP, PF, AC_})
TRAPS = frozenset({DB, BP, OF})
# Each run takes milliseconds; a KVM that interprets may not know how to go on.
LIMIT_S, INTERPRETED_LIMIT_S = 60, 1

# CPUID bits: leaf, subleaf, register (EAX to EDX), bit.
FEATURES = {
    "vme": (1, 0, 3, 1),
    "pge": (1, 0, 3, 13),
    "cx16": (1, 0, 2, 13),
    "sse4_2": (1, 0, 2, 20),
    "movbe": (1, 0, 2, 22),
    "popcnt": (1, 0, 2, 23),
    "aes": (1, 0, 2, 25),
    "rdrand": (1, 0, 2, 30),
    "bmi1": (7, 0, 1, 3),
    "bmi2": (7, 0, 1, 8),
    "rdseed": (7, 0, 1, 18),
    "adx": (7, 0, 1, 19),
    "sha": (7, 0, 1, 29),
    "lzcnt": (0x8000_0001, 0, 2, 5),
    "pse36": (1, 0, 3, 17),
    "pcid": (1, 0, 2, 17),
    "x2apic": (1, 0, 2, 21),
    "deadline": (1, 0, 2, 24),
    "xsave": (1, 0, 2, 26),
    "avx": (1, 0, 2, 28),
    "fsgsbase": (7, 0, 1, 0),
    "smep": (7, 0, 1, 7),
    "invpcid": (7, 0, 1, 10),
    "smap": (7, 0, 1, 20),
    "umip": (7, 0, 2, 2),
    "pku": (7, 0, 2, 3),
    "la57": (7, 0, 2, 16),
    "xsaveopt": (0xD, 1, 0, 0),
    "xsavec": (0xD, 1, 0, 1),
    "xgetbv1": (0xD, 1, 0, 2),
    "xsaves": (0xD, 1, 0, 3),
    "syscall": (0x8000_0001, 0, 3, 11),
    "nx": (0x8000_0001, 0, 3, 20),
    "gib_pages": (0x8000_0001, 0, 3, 26),
    "misalignsse": (0x8000_0001, 0, 2, 7),
    "ffxsr": (0x8000_0001, 0, 3, 25),
    "rdtscp": (0x8000_0001, 0, 3, 27),
}


@dataclass(frozen=True)
class Done:
    """The code ran to its end, with these registers, flags and memory."""

    state: Mapping[str, int] = field(default_factory=dict)
    at: int | None = None
    """Where else an OUT to the port ended the run: the address of that, or ANYWHERE."""


ANYWHERE = -1
"""In one of a check's own handlers."""


@dataclass(frozen=True)
class Fault:
    """A vector's handler was entered. ``state`` is as for Done, but flags are those saved; those
    of the handler are "now_if" and so on."""

    vector: int
    error: int | None
    at: str | int
    """The saved RIP: "marked", "behind", an address, or "any" of an interrupt that comes when it
    will."""
    state: Mapping[str, int]


@dataclass(frozen=True)
class End:
    """The vCPU stopped for good: "shutdown" or "halted"."""

    how: str
    state: Mapping[str, int] = field(default_factory=dict)


Outcome = Done | Fault | End


@dataclass(frozen=True)
class AnyOf:
    """The manuals leave it open."""

    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class ByVendor:
    """The manuals differ."""

    intel: Outcome | AnyOf
    amd: Outcome | AnyOf


Expected = Outcome | AnyOf | ByVendor


def done(at: int | None = None, **state: int) -> Done:
    return Done(state, at)


def fault(
    vector: int, error: int | None = None, *, at: str | int | None = None, **state: int
) -> Fault:
    if vector in WITH_ERROR and error is None:
        error = 0
    if at is None:
        at = "behind" if vector in TRAPS else "marked"
    return Fault(vector, error, at, state)


Place = str | int | None


def gp(error: int = 0, *, at: Place = None, **state: int) -> Fault:
    return fault(GP, error, at=at, **state)


def ss(error: int = 0, *, at: Place = None, **state: int) -> Fault:
    return fault(SS, error, at=at, **state)


def np(error: int = 0, *, at: Place = None, **state: int) -> Fault:
    return fault(NP, error, at=at, **state)


def ts(error: int = 0, *, at: Place = None, **state: int) -> Fault:
    return fault(TS_, error, at=at, **state)


def ud(*, at: Place = None, **state: int) -> Fault:
    return fault(UD, at=at, **state)


def db(dr6: int, *, at: Place = None, **state: int) -> Fault:
    return fault(DB, at=at, dr6=dr6, **state)


def pf(error: int, cr2: int = kernel.PAGE, *, at: Place = None, **state: int) -> Fault:
    return fault(PF, error, at=at, cr2=cr2, **state)


SHUTDOWN, HALTED = End("shutdown"), End("halted")


def any_of(*outcomes: Outcome) -> AnyOf:
    return AnyOf(outcomes)


def by_vendor(*, intel: Outcome | AnyOf, amd: Outcome | AnyOf) -> ByVendor:
    return ByVendor(intel, amd)


@dataclass(frozen=True)
class Check:
    """See the head of this file. What is not given is as in kernel.py."""

    name: str
    code: str
    expect: Expected
    mode: Mode = Mode.LONG
    ring: int = 0
    regs: Mapping[str, int] = field(default_factory=dict)
    """As of Vcpu.regs."""
    change: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Bits of control registers to set and to clear."""
    msrs: Mapping[int, int] = field(default_factory=dict)
    flags: int = 0
    """Set in RFLAGS."""
    page: Page | None = None
    gdt: Mapping[int, int | tuple[int, int]] = field(default_factory=dict)
    """Descriptors by selector: eight bytes each, or twice eight."""
    ldt: Mapping[int, int] = field(default_factory=dict)
    """By offset."""
    idt: Mapping[int, int] = field(default_factory=dict)
    tss: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    """Fields: offset to struct's format and value."""
    memory: Mapping[int, bytes | str] = field(default_factory=dict)
    """Bytes, or code of the mode's width."""
    handlers: Mapping[int, str] = field(default_factory=dict)
    """Code that handles a vector, in the width of handlers."""
    read: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Names of memory for the expected state: address and bytes."""
    without: tuple[str, ...] = ()
    """Features that the guest's CPU is not to have, though the engine has them."""
    needs: tuple[str, ...] = ()
    """Features of CPUID; "!name": those it must not have."""
    only: str | None = None
    """A vendor, "intel" or "amd", whose manual alone speaks of it."""

    def __str__(self) -> str:
        return self.name


Table = Iterable[Check]
_checks: list[Check] = []
"""All of the suite."""


def each(*tables: Table) -> Callable[[Any], Any]:
    """Parametrizes a test by checks, each under its name."""
    checks = [check for table in tables for check in table]
    names = [check.name for check in checks]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    _checks.extend(checks)
    return pytest.mark.parametrize("check", checks, ids=names)


_CONSTANTS = {
    name: value
    for name, value in vars(kernel).items()
    if name.isupper() and len(name) > 2 and isinstance(value, int)
}
_assembled: dict[Source, Assembled] = {}


def code_of(bits: int, source: str) -> Assembled:
    """Assembles all checks that there are at the first call."""
    if (bits, source) not in _assembled:
        wanted = [code for check in _checks for code in _sources(check)]
        _assembled.update(assemble([*wanted, (bits, source)], _CONSTANTS))
    return _assembled[bits, source]


def _sources(check: Check) -> Iterable[Source]:
    bits = check.mode.bits
    yield bits, check.code
    for source in check.memory.values():
        if isinstance(source, str):
            yield bits, source
    for source in check.handlers.values():
        yield check.mode.handler_bits, source


class EndPort:
    """Ends the run at a write."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._vm.request_stop()


class Engine:
    """One of "kvm", "interpreter", "translator"."""

    def __init__(self, name: str) -> None:
        self.name = name

    def machine(self, without: tuple[str, ...] = ()) -> Vm:
        kind = "kvm" if self.name == "kvm" else "bt"
        words: dict[str, int] = {}
        for feature in without:
            leaf, subleaf, register, bit = FEATURES[feature]
            sub = f".{subleaf}" if subleaf else ""
            word = f"{leaf:X}{sub}.{['EAX', 'EBX', 'ECX', 'EDX'][register]}"
            words[word] = words.get(word, 0xFFFF_FFFF) & ~(1 << bit)
        translate = self.name == "translator"
        vm = Vm(kind, kernel.RAM, translate=translate, features=words or None)
        vm.attach_ports(kernel.END_PORT, 1, EndPort(vm))
        return vm

    def run(self, vm: Vm) -> str:
        """How the vCPU stopped; "not ended" by the time limit."""
        limit = INTERPRETED_LIMIT_S if self.interpreting_kvm else LIMIT_S
        watchdog = threading.Timer(limit, vm.request_stop)
        watchdog.daemon = True
        watchdog.start()
        try:
            end = vm.vcpu(0).run()
            return end if watchdog.is_alive() else "not ended"
        finally:
            watchdog.cancel()

    @property
    def interpreting_kvm(self) -> bool:
        """A /dev/kvm with no hardware behind it, which has fewer checks than a CPU."""
        return self.name == "kvm" and not probe_kvm().hardware

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """What the guest sees."""
        return _cpuid(self.name, leaf, subleaf)

    def has(self, feature: str) -> bool:
        leaf, subleaf, register, bit = FEATURES[feature]
        if self.cpuid(leaf & 0x8000_0000)[0] < leaf:
            return False
        return bool(self.cpuid(leaf, subleaf)[register] >> bit & 1)

    @property
    def vendor(self) -> str:
        _, b, c, d = self.cpuid(0)
        name = struct.pack("<3I", b, d, c)
        return "intel" if name == b"GenuineIntel" else "amd"


@cache
def _cpuid(name: str, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    engine = Engine(name)
    vm = engine.machine()
    check = Check("cpuid", "cpuid", done(), regs={"rax": leaf, "rcx": subleaf})
    prepare(vm, check)
    assert engine.run(vm) == "stopped"
    registers = vm.vcpu(0).regs()
    a, b, c, d = (registers[register] for register in ("rax", "rbx", "rcx", "rdx"))
    return a, b, c, d


def prepare(vm: Vm, check: Check) -> Assembled:
    """Loads memory and registers; gives the check's code."""
    mode = check.mode
    program = code_of(mode.bits, check.code)
    write = vm.write_memory
    write(kernel.CODE, program.code + kernel.END + b"\xf4")
    write(kernel.USER_TEXT, kernel.END)
    write(kernel.HANDLERS, kernel.handlers())
    gates = dict(check.idt)
    at = kernel.OWN_HANDLERS
    own: dict[int, int] = {}
    for vector, source in check.handlers.items():
        code = code_of(mode.handler_bits, source).code + kernel.END
        write(at, code)
        gates.setdefault(vector, kernel.gate(0xE, at, dpl=3))
        own[vector] = at
        at += len(code)
    if mode is Mode.REAL:
        write(0, kernel.idt(mode, {}))
        for vector, at in own.items():
            write(4 * vector, struct.pack("<HH", at, 0))
    else:
        write(kernel.IDT, kernel.idt(mode, gates))
        write(kernel.TSS, kernel.tss(mode))
        write(kernel.GDT, kernel.gdt(mode))
        tables = kernel.page_tables(mode, check.page, user=check.ring == 3)
        for table, data in tables.items():
            write(table, data)
    for selector, descriptor in check.gdt.items():
        low, high = descriptor if isinstance(descriptor, tuple) else (descriptor, None)
        data = struct.pack("<Q", low) if high is None else struct.pack("<QQ", low, high)
        write(kernel.GDT + (selector & ~7), data)
    for offset, descriptor in check.ldt.items():
        write(kernel.LDT + offset, struct.pack("<Q", descriptor))
    for offset, (form, value) in check.tss.items():
        write(kernel.TSS + offset, struct.pack("<" + form, value))
    for address, content in check.memory.items():
        write(address, content if isinstance(content, bytes) else code_of(mode.bits, content).code)
    vcpu = vm.vcpu(0)
    for index, value in check.msrs.items():
        assert vcpu.set_msr(index, value), f"MSR {index:#x} takes no {value:#x}"
    registers = _registers(mode, check.ring, check.flags) | dict(check.regs)
    for name, (on, off) in check.change.items():
        registers[name] = registers[name] & ~off | on
    vcpu.set_regs(registers)
    return program


def _registers(mode: Mode, ring: int, flags: int) -> dict[str, int]:
    k = kernel
    cr0, cr4, efer, cr3 = k.ET | k.NE, k.OSFXSR | k.OSXMMEXCPT, 0, 0
    if mode is not Mode.REAL:
        cr0 |= k.PE
    if mode.long or mode in (Mode.PAE, Mode.PAGED32):
        cr0, cr3 = cr0 | k.PG | k.WP, k.TABLES
        cr4 |= k.PSE | k.PGE | (0 if mode is Mode.PAGED32 else k.PAE)
        efer |= 0 if mode is Mode.PAGED32 else k.NXE
    if mode.long:
        efer |= k.LME | k.LMA | k.SCE
    registers = {
        "rip": k.CODE, "rsp": k.STACK, "rflags": 2 | flags,
        "cr0": cr0, "cr3": cr3, "cr4": cr4, "efer": efer,
    }  # fmt: skip
    registers |= dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"), 0)
    code, stack, table_limits = _segments(mode, ring), _stack(mode, ring), 0xFFFF
    for name in ("cs", "ss", "ds", "es", "fs", "gs"):
        selector, attributes, limit = code if name == "cs" else stack
        registers |= {
            f"{name}_selector": selector,
            f"{name}_base": 0,
            f"{name}_limit": limit,
            f"{name}_attr": attributes,
        }
    if mode is Mode.REAL:
        return registers | {"idtr_base": 0, "idtr_limit": 0x3FF}
    if mode is Mode.VM86:
        registers["rflags"] |= k.VM
    table_limits = 0xFFF if mode.long else 0x7FF
    return registers | {
        "gdtr_base": k.GDT, "gdtr_limit": k.GDT_LIMIT,
        "idtr_base": k.IDT, "idtr_limit": table_limits,
        "tr_selector": k.TSS_SELECTOR, "tr_base": k.TSS, "tr_limit": k.TSS_LIMIT, "tr_attr": 0x8B,
        "ldt_selector": k.LDT_SELECTOR, "ldt_base": k.LDT, "ldt_limit": k.LDT_LIMIT,
        "ldt_attr": 0x82,
    }  # fmt: skip


def _segments(mode: Mode, ring: int) -> tuple[int, int, int]:
    """CS: selector, attributes as in a VMCS, limit."""
    k = kernel
    if mode is Mode.REAL:
        return 0, 0x9B, 0xFFFF
    if mode is Mode.VM86:
        return 0, 0xF3, 0xFFFF
    rights = 0x9B | ring << 5
    if mode is Mode.LONG:
        return (k.KERNEL_CODE, k.CODE1, k.CODE2, k.USER_CODE)[ring], rights | 0xA000, 0xFFFF_FFFF
    if mode.bits == 16:
        return k.USER_CODE16 if ring else k.KERNEL_CODE16, rights, 0xFFFF
    if mode is Mode.COMPAT32:
        return k.USER_CODE32 if ring else k.KERNEL_CODE32, rights | 0xC000, 0xFFFF_FFFF
    return (k.KERNEL_CODE, k.CODE1, k.CODE2, k.USER_CODE)[ring], rights | 0xC000, 0xFFFF_FFFF


def _stack(mode: Mode, ring: int) -> tuple[int, int, int]:
    """SS and the data segments."""
    k = kernel
    if mode in (Mode.REAL, Mode.VM86):
        return 0, 0x93 if mode is Mode.REAL else 0xF3, 0xFFFF
    selector = (k.KERNEL_DATA, k.DATA1, k.DATA2, k.USER_DATA)[ring]
    return selector, 0xC093 | ring << 5, 0xFFFF_FFFF


@dataclass(frozen=True)
class Seen:
    """What became of a check on an engine."""

    how: str
    vector: int | None
    error: int | None
    rip: int
    """Where it ended, or what the handler's frame holds."""
    flags: int
    registers: Mapping[str, int]
    memory: Mapping[str, int]

    def value(self, name: str) -> int:
        if name in self.memory:
            return self.memory[name]
        if name.startswith("now_"):
            return self.registers["rflags"] >> kernel.FLAGS[name[4:]] & 1
        if name == "iopl":
            return self.flags >> 12 & 3
        if name in kernel.FLAGS:
            return self.flags >> kernel.FLAGS[name] & 1
        if name == "dr6":
            # Causes alone; the rest is fixed.
            return self.registers["rbp"] & 0xE00F
        return self.registers[name]

    def differences(self, outcome: Outcome, program: Assembled) -> list[str]:
        """In words; none where it is as expected."""
        places = {"marked": program.marked, "behind": program.behind}
        lines = []
        if isinstance(outcome, End):
            if self.how != outcome.how:
                return [f"ended by {self._ending()}, not by {outcome.how}"]
        elif isinstance(outcome, Done):
            if self.vector is not None or self.how != "stopped":
                return [f"ended by {self._ending()}, not at the end of the code"]
            end = kernel.CODE + len(program.code) if outcome.at is None else outcome.at
            if self.rip != end + len(kernel.END) and end != ANYWHERE:
                return [f"ended at {self.rip:#x}, not at {end:#x}"]
        else:
            if self.vector != outcome.vector:
                return [f"ended by {self._ending()}, not by exception {outcome.vector}"]
            at = outcome.at
            rip = at if isinstance(at, int) else kernel.CODE + places.get(at, 0)
            if self.error != outcome.error:
                lines.append(f"error code {self.error!r}, not {outcome.error!r}")
            if self.rip != rip and at != "any":
                lines.append(f"saved RIP {self.rip:#x}, not {rip:#x}")
        for name, value in outcome.state.items():
            if self.value(name) != value:
                lines.append(f"{name} {self.value(name):#x}, not {value:#x}")
        return lines

    def _ending(self) -> str:
        if self.vector is None:
            return f"{self.how} at {self.rip:#x}"
        error = "" if self.error is None else f" with {self.error:#x}"
        return f"exception {self.vector}{error} at {self.rip:#x}"


def look(vm: Vm, check: Check, how: str) -> Seen:
    registers = vm.vcpu(0).regs()
    rip, flags = registers["rip"], registers["rflags"]
    memory = {
        name: int.from_bytes(vm.read_memory(address, length), "little")
        for name, (address, length) in check.read.items()
    }
    inside = kernel.HANDLERS <= rip < kernel.HANDLERS + 256 * 8
    if not check.mode.long:
        # What the upper halves hold outside of long mode is undefined (Intel SDM 1, 3.4.1.1).
        registers = {name: value & 0xFFFF_FFFF for name, value in registers.items()}
    if how != "stopped" or not inside:
        return Seen(how, None, None, rip, flags, registers, memory)
    vector = (rip - kernel.HANDLERS) // 8
    slot = check.mode.slot
    linear = registers["ss_base"] + registers["rsp"]
    stack = vm.vcpu(0).translate(linear)
    assert stack is not None, f"a handler's stack at {linear:#x}"
    # Real mode has no error codes (Intel SDM 3A, 21.1.4).
    has_error = vector in WITH_ERROR and check.mode is not Mode.REAL
    values = [int.from_bytes(vm.read_memory(stack + n * slot, slot), "little") for n in range(4)]
    error = values.pop(0) if has_error else 0 if vector in WITH_ERROR else None
    return Seen(how, vector, error, values[0], values[2], registers, memory)


def run(engine: Engine, check: Check) -> None:
    """Runs a check and compares; skips what the CPU is not for, and says why."""
    for need in check.needs:
        name = need.removeprefix("!")
        if engine.has(name) == need.startswith("!"):
            have = "has" if need.startswith("!") else "has no"
            pytest.skip(f"{engine.name}: the guest's CPU {have} {name}")
    if check.only and engine.vendor != check.only:
        pytest.skip(f"{engine.name}: the guest's CPU is {engine.vendor}'s, not {check.only}'s")
    if check.without and engine.interpreting_kvm:
        pytest.skip("a KVM without hardware may show its guests the host's own CPUID")
    vm = engine.machine(check.without)
    try:
        program = prepare(vm, check)
    except EngineError as error:
        if engine.name != "kvm":
            raise
        pytest.skip(f"KVM takes no such state: {error}")
    try:
        seen = look(vm, check, engine.run(vm))
    except EngineError as error:
        _without_hardware(engine, str(error))
        raise
    expected: Sequence[Outcome]
    expect = check.expect
    if isinstance(expect, ByVendor):
        expect = expect.intel if engine.vendor == "intel" else expect.amd
    expected = expect.outcomes if isinstance(expect, AnyOf) else (expect,)
    differences = [seen.differences(outcome, program) for outcome in expected]
    if any(not lines for lines in differences):
        return
    told = " | ".join("; ".join(lines) for lines in differences)
    _without_hardware(engine, told)
    pytest.fail(f"{check.code}: {told}\n{vm.vcpu(0).dump()}", pytrace=False)


def _without_hardware(engine: Engine, told: str) -> None:
    """What is no CPU proves nothing."""
    if engine.interpreting_kvm:
        # Without a traceback, whose making takes longer than the check.
        reason = f"no hardware behind this /dev/kvm: {told[:100]}"
        raise pytest.xfail.Exception(reason, pytrace=False)
