"""The PVH boot protocol and the ELF reader under it."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.boot.conftest import source_of

from tetrarch.boot.loader import load_kernel
from tetrarch.boot.pvh import load_pvh
from tetrarch.errors import BootError

MIB = 1 << 20


def boot(vm: Any, image: bytes, cmdline: str = "quiet") -> dict[str, int]:
    return load_pvh(vm, source_of(image), None, cmdline, 0)


def test_kernel_is_entered_in_protected_mode_with_start_info(
    make_vm: Any, make_vmlinux: Any, write: Any
) -> None:
    vm = make_vm(16 * MIB)
    initrd = write("initrd", b"cpio" * 2000)
    code = bytes(range(64))

    regs = load_kernel(vm, write("vmlinux", make_vmlinux(code=code)), initrd, "a=b", 0xE_0000)

    assert regs["rip"] == 0x10_0010
    assert regs["cr0"] & 0x8000_0001 == 1
    assert regs["cs_attr"] == 0xC09B
    assert vm.memory[0x10_0000:0x10_0040] == code
    magic, version, _, modules, modlist, cmdline, rsdp, memmap, entries, _ = struct.unpack_from(
        "<IIIIQQQQII", vm.memory, regs["rbx"]
    )
    assert (magic, version, modules, rsdp) == (0x336E_C578, 1, 1, 0xE_0000)
    assert vm.text(cmdline) == b"a=b"
    address, size = vm.u64(modlist), vm.u64(modlist + 8)
    assert vm.memory[address : address + size] == b"cpio" * 2000
    table = [struct.unpack_from("<QQII", vm.memory, memmap + 24 * i) for i in range(entries)]
    assert table == [
        (0, 0x9_FC00, 1, 0),
        (0x9_FC00, 0x6_0400, 2, 0),
        (0x10_0000, 15 * MIB, 1, 0),
        (0xE000_0000, 0x10_0000, 2, 0),  # PCI configuration space
    ]


def test_bss_is_cleared(make_vm: Any, make_vmlinux: Any) -> None:
    vm = make_vm(16 * MIB)
    vm.memory[0x10_0000:0x10_4000] = b"\xee" * 0x4000

    boot(vm, make_vmlinux())

    assert not any(vm.memory[0x10_0040:0x10_3000])
    assert vm.memory[0x10_3000] == 0xEE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": None}, "without a PVH entry"),
        ({"entry": 0x20_0000}, "outside"),
        ({"physical": 0x1000, "entry": 0x1010}, "a PC has RAM"),
        ({"physical": 0xFFFF_FFFF_FFFF_F000, "entry": 0xFFFF_F010}, "outside"),
        ({"memory_size": 100 * MIB}, "give it 108M"),
        ({"memory_size": 16}, "larger in the file"),
        ({"elf_class": 1}, "no usable ELF program headers"),
        ({"elf_class": 3}, "not a little-endian ELF file"),
        ({"machine": 183}, "another processor"),
    ],
)
def test_kernel_that_cannot_start_is_refused_with_its_cause(
    make_vm: Any, make_vmlinux: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BootError, match=message) as error:
        boot(make_vm(16 * MIB), make_vmlinux(**change))
    assert "\n" not in str(error.value)


def test_segments_that_overlap_are_refused(make_vm: Any, make_vmlinux: Any) -> None:
    with pytest.raises(BootError, match="overlap"):
        boot(make_vm(16 * MIB), make_vmlinux(loads=2))


def test_every_truncation_is_refused(make_vm: Any, make_vmlinux: Any) -> None:
    image = make_vmlinux()
    vm = make_vm(4 * MIB)
    for keep in range(4, len(image)):
        with pytest.raises(BootError):
            boot(vm, image[:keep])


@given(st.binary(max_size=64), st.integers(0, 300))
def test_damaged_kernels_boot_or_are_refused(
    make_vm: Any, make_vmlinux: Any, damage: bytes, at: int
) -> None:
    image = make_vmlinux()
    damaged = (image[:at] + damage + image[at + len(damage) :])[: len(image)]
    try:
        entry = boot(make_vm(4 * MIB), damaged)["rip"]
    except BootError as error:
        entry, message = None, str(error)
    else:
        message = ""
    assert "\n" not in message
    assert entry is None or MIB <= entry < 4 * MIB


def test_notes_aligned_to_4_in_a_segment_that_says_8_are_found(
    make_vm: Any, make_vmlinux: Any
) -> None:
    image = bytearray(make_vmlinux())
    image[64 + 56 + 48] = 8  # p_align of the second header
    assert boot(make_vm(16 * MIB), bytes(image))["rip"] == 0x10_0010


def test_damaged_note_hides_no_other(make_vm: Any, make_vmlinux: Any) -> None:
    image = make_vmlinux()
    at = image.index(b"Lin\0") - 12
    damaged = image[:at] + b"\xff" * 8 + image[at + 8 :]
    assert boot(make_vm(16 * MIB), damaged)["rip"] == 0x10_0010
