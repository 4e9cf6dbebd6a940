"""A vCPU's registers as gdb numbers them, and the description of them that it reads.

The features that gdb knows are in its manual, "i386 Features"; which registers stand beside them
is as in QEMU's i386-64bit.xml. Where x87 and vector registers lie in an XSAVE image: Intel SDM 1,
10.5.1 and 13.4.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tetrarch.machine.engine_vm import EngineVcpu

__all__ = ["REGISTERS", "Register", "VcpuRegisters", "target_xml"]

_KERNEL_GS_BASE = 0xC000_0102
_XSTATE_BV = 512
_X87, _SSE, _AVX = 1, 2, 4
_CR0_PE = 1
_RFLAGS_VM = 1 << 17

# Where a register is: by its name among those of the engine, in an MSR, in the XSAVE image, or,
# for the x87's tags, in a shape of its own there.
_Place = Literal["register", "selector", "msr", "image", "tags"]


@dataclass(frozen=True)
class Register:
    name: str
    bits: int
    type: str
    place: _Place
    source: str = ""
    """Its name in the engine."""
    offset: int = 0
    length: int = 0
    """In the image; where it is shorter than gdb's, the rest is 0."""
    component: int = 0

    @property
    def size(self) -> int:
        return self.bits // 8


def _plain(name: str, bits: int, kind: str, source: str = "") -> Register:
    return Register(name, bits, kind, "register", source or name)


def _image(name: str, bits: int, kind: str, offset: int, length: int, component: int) -> Register:
    return Register(name, bits, kind, "image", "", offset, length, component)


_CORE = (
    *(_plain(name, 64, "int64") for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi")),
    *(_plain(name, 64, "data_ptr") for name in ("rbp", "rsp")),
    *(_plain(f"r{number}", 64, "int64") for number in range(8, 16)),
    _plain("rip", 64, "code_ptr"),
    _plain("eflags", 32, "i386_eflags", "rflags"),
    *(
        Register(name, 32, "int32", "selector", name)
        for name in ("cs", "ss", "ds", "es", "fs", "gs")
    ),
    *(_image(f"st{number}", 80, "i387_ext", 32 + 16 * number, 10, _X87) for number in range(8)),
    _image("fctrl", 32, "int", 0, 2, _X87),
    _image("fstat", 32, "int", 2, 2, _X87),
    Register("ftag", 32, "int", "tags", component=_X87),
    _image("fiseg", 32, "int", 12, 2, _X87),
    _image("fioff", 32, "int", 8, 4, _X87),
    _image("foseg", 32, "int", 20, 2, _X87),
    _image("fooff", 32, "int", 16, 4, _X87),
    _image("fop", 32, "int", 6, 2, _X87),
)
_SSE_REGISTERS = (
    *(_image(f"xmm{n}", 128, "vec128", 160 + 16 * n, 16, _SSE) for n in range(16)),
    _image("mxcsr", 32, "i386_mxcsr", 24, 4, _SSE),
)
_AVX_REGISTERS = tuple(
    _image(f"ymm{n}h", 128, "uint128", 576 + 16 * n, 16, _AVX) for n in range(16)
)
_SEGMENT_BASES = (_plain("fs_base", 64, "int"), _plain("gs_base", 64, "int"))
_SYSTEM = (
    Register("k_gs_base", 64, "int", "msr"),
    _plain("cr0", 64, "x64_cr0"),
    _plain("cr2", 64, "int"),
    _plain("cr3", 64, "int"),
    _plain("cr4", 64, "x64_cr4"),
    _plain("cr8", 64, "int"),
    _plain("efer", 64, "x64_efer"),
)

_FEATURES: list[tuple[str, Sequence[Register]]] = [
    ("org.gnu.gdb.i386.core", _CORE),
    ("org.gnu.gdb.i386.sse", _SSE_REGISTERS),
    ("org.gnu.gdb.i386.segments", _SEGMENT_BASES),
    ("org.tetrarch.i386.system", _SYSTEM),
]


def _host_has_avx() -> bool:
    # What no host has no guest has; others see it as zeros until they switch it on.
    try:
        return " avx " in Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False


if _host_has_avx():
    _FEATURES.insert(2, ("org.gnu.gdb.i386.avx", _AVX_REGISTERS))

REGISTERS: tuple[Register, ...] = tuple(
    register for _, registers in _FEATURES for register in registers
)
"""By gdb's number."""

# Bits by name: Intel SDM 1, 3.4.3 and 10.2.3; 3A, 2.2.1 and 2.5.
_FLAGS = {
    "i386_eflags": (4, "CF=0 PF=2 AF=4 ZF=6 SF=7 TF=8 IF=9 DF=10 OF=11 NT=14 RF=16 VM=17 AC=18 "
                       "VIF=19 VIP=20 ID=21"),
    "i386_mxcsr": (4, "IE=0 DE=1 ZE=2 OE=3 UE=4 PE=5 DAZ=6 IM=7 DM=8 ZM=9 OM=10 UM=11 PM=12 FZ=15"),
    "x64_cr0": (8, "PE=0 MP=1 EM=2 TS=3 ET=4 NE=5 WP=16 AM=18 NW=29 CD=30 PG=31"),
    "x64_cr4": (8, "VME=0 PVI=1 TSD=2 DE=3 PSE=4 PAE=5 MCE=6 PGE=7 PCE=8 OSFXSR=9 OSXMMEXCPT=10 "
                   "UMIP=11 LA57=12 VMXE=13 SMXE=14 FSGSBASE=16 PCIDE=17 OSXSAVE=18 SMEP=20 "
                   "SMAP=21 PKE=22"),
    "x64_efer": (8, "SCE=0 LME=8 LMA=10 NXE=11"),
}  # fmt: skip
_VECTORS = (
    ("v4_float", "ieee_single", 4),
    ("v2_double", "ieee_double", 2),
    ("v16_int8", "int8", 16),
    ("v8_int16", "int16", 8),
    ("v4_int32", "int32", 4),
    ("v2_int64", "int64", 2),
)


def target_xml() -> str:
    """The target description (gdb's manual, Appendix G)."""
    lines = [
        '<?xml version="1.0"?>',
        '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
        "<target>",
        "<architecture>i386:x86-64</architecture>",
    ]
    number = 0
    for feature, registers in _FEATURES:
        lines.append(f'<feature name="{feature}">')
        lines += _types({register.type for register in registers})
        for register in registers:
            group = _group(feature, register)
            lines.append(
                f'<reg name="{register.name}" bitsize="{register.bits}" type="{register.type}"'
                f' regnum="{number}"{group}/>'
            )
            number += 1
        lines.append("</feature>")
    return "\n".join([*lines, "</target>", ""])


def _group(feature: str, register: Register) -> str:
    if feature.endswith("system"):
        return ' group="system"'
    return ' group="float"' if register.component == _X87 else ""


def _types(wanted: set[str]) -> list[str]:
    lines = []
    for name, (size, bits) in _FLAGS.items():
        if name in wanted:
            lines.append(f'<flags id="{name}" size="{size}">')
            for bit in bits.split():
                label, _, place = bit.partition("=")
                lines.append(f'<field name="{label}" start="{place}" end="{place}"/>')
            lines.append("</flags>")
    if "vec128" in wanted:
        lines += [f'<vector id="{n}" type="{of}" count="{count}"/>' for n, of, count in _VECTORS]
        fields = [f'<field name="{name}" type="{name}"/>' for name, _, _ in _VECTORS]
        fields.append('<field name="uint128" type="uint128"/>')
        lines += ['<union id="vec128">', *fields, "</union>"]
    return lines


class VcpuRegisters:
    """The registers of a vCPU that stands. What is written is the vCPU's after ``store``."""

    def __init__(self, vcpu: EngineVcpu) -> None:
        self._vcpu = vcpu
        self._values: dict[str, int] = vcpu.regs()
        self._changed: dict[str, int] = {}
        self._image: bytearray | None = None
        self._image_changed = False

    def read(self, register: Register) -> bytes:
        """As gdb has them: lowest byte first."""
        match register.place:
            case "register":
                value = self._values.get(register.source, 0)
                return (value & (1 << register.bits) - 1).to_bytes(register.size, "little")
            case "selector":
                value = self._values.get(f"{register.source}_selector", 0)
                return value.to_bytes(register.size, "little")
            case "msr":
                return (self._vcpu.msr(_KERNEL_GS_BASE) or 0).to_bytes(register.size, "little")
            case "tags":
                return self._tags().to_bytes(register.size, "little")
            case "image":
                end = register.offset + register.length
                return bytes(self._fpu()[register.offset : end]).ljust(register.size, b"\0")

    def write(self, register: Register, data: bytes) -> None:
        value = int.from_bytes(data, "little")
        match register.place:
            case "register":
                old = self._values.get(register.source, 0)
                self._set(register.source, value | old >> register.bits << register.bits)
            case "selector":
                self._set_selector(register.source, value & 0xFFFF)
            case "msr":
                if data != self.read(register):
                    self._vcpu.set_msr(_KERNEL_GS_BASE, value)
            case "tags":
                self._set_image(4, bytes((_abridged(value & 0xFFFF),)), register.component)
            case "image":
                self._set_image(register.offset, data[: register.length], register.component)

    def store(self) -> None:
        """Raises EngineError where the CPU takes no such values."""
        if self._changed:
            self._vcpu.set_regs(self._changed)
        if self._image is not None and self._image_changed:
            self._vcpu.set_xsave(bytes(self._image))

    def _set(self, name: str, value: int) -> None:
        if self._values.get(name) != value:
            self._values[name] = self._changed[name] = value

    def _set_selector(self, segment: str, selector: int) -> None:
        """Without descriptors the base follows; with them the hidden part stays as it is."""
        if self._values.get(f"{segment}_selector") == selector:
            return
        self._set(f"{segment}_selector", selector)
        real = not self._values["cr0"] & _CR0_PE or self._values["rflags"] & _RFLAGS_VM
        if real:
            self._set(f"{segment}_base", selector << 4)

    def _fpu(self) -> bytearray:
        if self._image is None:
            self._image = bytearray(self._vcpu.xsave())
            self._image += bytes(max(0, 832 - len(self._image)))
        return self._image

    def _set_image(self, offset: int, data: bytes, component: int) -> None:
        image = self._fpu()
        if image[offset : offset + len(data)] == data:
            return
        image[offset : offset + len(data)] = data
        image[_XSTATE_BV] |= component
        self._image_changed = True

    def _tags(self) -> int:
        """The tag word in full, of which the image has whether each is in use."""
        image = self._fpu()
        status, used = struct.unpack_from("<HB", image, 2)
        top = status >> 11 & 7
        tags = 0
        for physical in range(8):
            at = 32 + 16 * ((physical - top) & 7)
            tag = _tag(bytes(image[at : at + 10])) if used >> physical & 1 else 3
            tags |= tag << 2 * physical
        return tags


def _tag(value: bytes) -> int:
    """0: a number, 1: zero, 2: neither (Intel SDM 1, 8.1.7)."""
    fraction, exponent = struct.unpack("<QH", value)
    exponent &= 0x7FFF
    if exponent == 0 and fraction == 0:
        return 1
    return 0 if 0 < exponent < 0x7FFF and fraction >> 63 else 2


def _abridged(tags: int) -> int:
    return sum(1 << number for number in range(8) if tags >> 2 * number & 3 != 3)
