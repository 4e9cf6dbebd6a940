"""Multiboot kernels: what they find in memory, which headers are refused, and one that runs."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.debs import debian_package

from tetrarch import Machine, StopReason
from tetrarch.boot import load_kernel
from tetrarch.errors import BootError
from tetrarch.images import CachedGuest

MIB = 1 << 20
LOAD, LIMIT_S = 0x10_0000, 60
MAGIC, ADDRESSES = 0x1BAD_B002, 1 << 16


def header(flags: int, *addresses: int, checksum: int | None = None) -> bytes:
    if checksum is None:
        checksum = -(MAGIC + flags) & 0xFFFF_FFFF
    return struct.pack(f"<{3 + len(addresses)}I", MAGIC, flags, checksum, *addresses)


def flat(code: bytes = b"\xf4", **change: int) -> bytes:
    """A flat kernel with 16 bytes before its header, and its code behind."""
    at = {
        "header": LOAD + 16,
        "load": LOAD,
        "load_end": 0,
        "bss_end": 0,
        "entry": LOAD + 48,
        "flags": ADDRESSES | 3,
    } | change
    flags = at.pop("flags")
    return bytes(16) + header(flags, *at.values()) + code


def elf32(code: bytes, flags: int = 3, entry: int = LOAD + 12) -> bytes:
    """A 32-bit ELF file, linked 3 GiB above where it is loaded."""
    virtual = 0xC000_0000
    body = header(flags) + code
    ehdr = struct.pack(
        "<16sHHIIIIIHHHHHH",
        b"\x7fELF\1\1\1",
        *(2, 3, 1, virtual + entry, 52, 0, 0, 52, 32, 1, 0, 0, 0),
    )
    size = len(body)
    phdr = struct.pack("<8I", 1, 84, virtual + LOAD, LOAD, size, size + 0x100, 7, 4096)
    return ehdr + phdr + body


@pytest.mark.parametrize("kernel", [flat(), elf32(b"\xf4")], ids=["flat", "elf"])
def test_kernel_finds_its_information(make_vm: Any, write: Any, kernel: bytes) -> None:
    vm = make_vm(16 * MIB)
    path, one, two = write("kernel", kernel), write("one", b"first"), write("two", b"second!")
    regs = load_kernel(vm, path, f"{one} with words,{two}", "a=1 b", 0)
    assert regs["rax"] == 0x2BAD_B002
    assert (regs["cr0"] & 0x8000_0001, regs["cs_attr"]) == (1, 0xC09B)
    assert vm.memory[regs["rip"]] == 0xF4
    info = regs["rbx"]
    flags, lower, upper = struct.unpack_from("<III", vm.memory, info)
    assert flags & 0x4D == 0x4D
    assert (lower, upper) == (639, 15 * 1024)
    # What Xen goes by is what a BIOS says of that.
    assert struct.unpack_from("<H", vm.memory, 0x40E) == (0x9FC0,)
    assert struct.unpack_from("<H", vm.memory, 0x413) == (639,)
    assert vm.text(vm.u32(info + 16)) == f"{path} a=1 b".encode()
    assert vm.u32(info + 20) == 2
    modules = [
        struct.unpack_from("<III", vm.memory, vm.u32(info + 24) + 16 * index) for index in (0, 1)
    ]
    assert [bytes(vm.memory[start:end]) for start, end, _ in modules] == [b"first", b"second!"]
    assert [vm.text(words) for _, _, words in modules] == [
        f"{one} with words".encode(),
        str(two).encode(),
    ]
    assert all(start % 4096 == 0 for start, _, _ in modules)
    at, end = vm.u32(info + 48), vm.u32(info + 48) + vm.u32(info + 44)
    entries = []
    while at < end:
        entries.append(struct.unpack_from("<QQI", vm.memory, at + 4))
        at += 4 + vm.u32(at)
    assert (LOAD, 15 * MIB, 1) in entries


@pytest.mark.parametrize(
    ("kernel", "cause"),
    [
        (flat(header=LOAD + 64), "impossible addresses: it lies at 0x100040 itself"),
        (flat(load=LOAD + 20), "impossible addresses: it lies at"),
        (flat(bss_end=0xC000_0001), "it ends at 0xc0000001; a PC has RAM up to 0xc0000000"),
        (flat(load_end=LOAD + 0x1000), "of which the file has 49 bytes"),
        (flat(load_end=LOAD - 1), "of which the file has"),
        (flat(bss_end=LOAD + 8), "its bss ends at 0x100008"),
        (flat(entry=LOAD + 0x1000), "its entry 0x101000 is outside"),
        (flat(header=16, load=0, entry=48), "free RAM begins at 1 MiB"),
        (flat(bss_end=0xB000_0000), "needs more than the 16 MiB"),
        (flat(flags=ADDRESSES | 4), "what is not there"),
        (bytes(16) + header(3), "is no ELF file"),
        (elf32(b"\xf4", entry=LOAD - 16), "outside of what is loaded"),
    ],
)
def test_header_that_lies_is_refused(make_vm: Any, write: Any, kernel: bytes, cause: str) -> None:
    with pytest.raises(BootError, match=cause) as error:
        load_kernel(make_vm(16 * MIB), write("kernel", kernel), None, "", 0)
    assert "\n" not in str(error.value)


def test_header_with_a_wrong_checksum_is_none(make_vm: Any, write: Any) -> None:
    with pytest.raises(BootError, match="is no kernel"):
        load_kernel(make_vm(16 * MIB), write("kernel", header(3, checksum=7)), None, "", 0)


def test_module_that_is_not_there_is_named(make_vm: Any, write: Any, tmp_path: Path) -> None:
    with pytest.raises(BootError, match=r"module .*/none: no such file"):
        load_kernel(make_vm(16 * MIB), write("kernel", flat()), tmp_path / "none,x", "", 0)


def test_kernel_runs_and_says_its_command_line(write: Any, tmp_path: Path) -> None:
    # mov esi, [ebx+16] ; mov dx, 0x3f8 ; next: lodsb ; out dx, al ; test al, al ; jnz next
    # mov dx, 0x604 ; mov ax, 0x3400 ; out dx, ax ; hlt
    code = bytes.fromhex("8b7310 66baf803 ac ee 84c0 75fa 66ba0406 66b80034 66ef f4")
    for kernel in (flat(code), elf32(code)):
        with Machine(
            engine="bt", kernel=write("kernel", kernel), append="hello there", memory="16M"
        ) as vm:
            vm.start()
            vm.console.expect("kernel hello there", LIMIT_S)
            assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF


@pytest.mark.long
def test_xen_starts_linux(tmp_path: Path, debian_guest: CachedGuest) -> None:
    packed = next((debian_package("xen-hypervisor-4.17-amd64") / "boot").glob("xen-*.gz"))
    xen = tmp_path / "xen"
    xen.write_bytes(gzip.decompress(packed.read_bytes()))
    with Machine(
        engine="bt",
        memory="768M",
        kernel=xen,
        initrd=f"{debian_guest.kernel} console=hvc0 earlyprintk=xen,{debian_guest.initrd}",
        append="com1=115200,8n1 console=com1",
    ) as vm:
        vm.start()
        vm.console.expect("Run /init as init process", LIMIT_S)
