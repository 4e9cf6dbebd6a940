"""Multiboot2 kernels: what they find in memory, which headers are refused, and one that runs."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from tests.boot.test_multiboot import LIMIT_S, LOAD, MIB

from tetrarch import Machine, StopReason
from tetrarch.boot import load_kernel
from tetrarch.errors import BootError

MAGIC, BOOT_MAGIC = 0xE852_50D6, 0x36D7_6289
RSDP = 0xE_0000
CODE_AT = LOAD + 0x100


def tag(kind: int, *words: int, flags: int = 0) -> bytes:
    data = struct.pack(f"<HHI{len(words)}I", kind, flags, 8 + 4 * len(words), *words)
    return data + bytes(-len(data) % 8)


def header(*tags: bytes, checksum: int = 0, end: bytes | None = None) -> bytes:
    body = b"".join(tags) + (tag(0) if end is None else end)
    length = 16 + len(body)
    right = -(MAGIC + length) & 0xFFFF_FFFF
    return struct.pack("<4I", MAGIC, 0, length, right + checksum) + body


def flat(
    *tags: bytes, code: bytes = b"\xf4", load: int = LOAD, load_end: int = 0, **more: int
) -> bytes:
    """A flat kernel with 16 bytes before its header, and its code at CODE_AT."""
    entry = more.pop("entry", CODE_AT)
    address = tag(2, more.pop("header", LOAD + 16), load, load_end, more.pop("bss_end", 0))
    assert not more
    whole = bytes(16) + header(address, tag(3, entry), *tags)
    return whole.ljust(CODE_AT - LOAD, b"\0") + code


def elf64(code: bytes, *tags: bytes) -> bytes:
    body = header(*tags)
    entry = LOAD + len(body)
    body += code
    ehdr = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    phdr = struct.pack("<IIQQQQQQ", 1, 7, 120, LOAD, LOAD, len(body), len(body) + 0x100, 4096)
    return ehdr + phdr + body


def information(vm: Any, at: int) -> dict[int, list[bytes]]:
    total = vm.u32(at)
    found: dict[int, list[bytes]] = {}
    here = at + 8
    while True:
        assert here % 8 == 0
        kind, size = vm.u32(here), vm.u32(here + 4)
        assert here + size <= at + total
        found.setdefault(kind, []).append(bytes(vm.memory[here + 8 : here + size]))
        if kind == 0:
            return found
        here += -(-size // 8) * 8


@pytest.mark.parametrize("kernel", [flat(), elf64(b"\xf4")], ids=["flat", "elf"])
def test_kernel_finds_its_information(make_vm: Any, write: Any, kernel: bytes) -> None:
    vm = make_vm(16 * MIB)
    vm.memory[RSDP : RSDP + 8] = b"RSD PTR "
    path, one, two = write("kernel", kernel), write("one", b"first"), write("two", b"second!")
    regs = load_kernel(vm, path, f"{one} with words,{two}", "a=1 b", RSDP)
    assert regs["rax"] == BOOT_MAGIC
    assert (regs["cr0"] & 0x8000_0001, regs["cs_attr"]) == (1, 0xC09B)
    assert vm.memory[regs["rip"]] == 0xF4
    found = information(vm, regs["rbx"])
    assert found[1] == [f"{path} a=1 b".encode() + b"\0"]
    assert found[2] == [b"Tetrarch\0"]
    modules = [(*struct.unpack_from("<II", module), module[8:]) for module in found[3]]
    assert [bytes(vm.memory[start:end]) for start, end, _ in modules] == [b"first", b"second!"]
    assert [words for _, _, words in modules] == [
        f"{one} with words".encode() + b"\0",
        str(two).encode() + b"\0",
    ]
    assert all(start % 4096 == 0 for start, _, _ in modules)
    assert found[4] == [struct.pack("<II", 639, 15 * 1024)]
    ((size, version, *_),) = [struct.unpack_from("<II", entry) for entry in found[6]]
    assert (size, version) == (24, 0)
    entries = list(struct.iter_unpack("<QQII", found[6][0][8:]))
    assert (LOAD, 15 * MIB, 1, 0) in entries
    assert found[14][0][:8] == found[15][0][:8] == b"RSD PTR "
    assert (len(found[14][0]), len(found[15][0])) == (20, 36)
    assert 8 not in found


def test_screen_and_place_are_told_where_they_are_asked_for(make_vm: Any, write: Any) -> None:
    relocatable = tag(10, LOAD, 64 * MIB, 4096, 1)
    kernel = write("kernel", flat(tag(5, 80, 25, 0), tag(4, 3), relocatable))
    vm = make_vm(16 * MIB)
    with pytest.raises(BootError, match="for a screen; add --vga"):
        load_kernel(vm, kernel, None, "", 0)
    found = information(vm, load_kernel(vm, kernel, None, "", 0, vga=True)["rbx"])
    (screen,) = found[8]
    assert struct.unpack_from("<QIIIBB", screen) == (0xB_8000, 160, 80, 25, 16, 2)
    assert found[21] == [struct.pack("<I", LOAD)]
    assert 14 not in found


def test_what_is_optional_may_be_missing(make_vm: Any, write: Any) -> None:
    wishes = (tag(7, flags=1), tag(1, 9, 17, flags=1), tag(5, 0, 0, 0, flags=1), tag(1, 1, 4, 6))
    kernel = write("kernel", flat(*wishes))
    assert load_kernel(make_vm(16 * MIB), kernel, None, "", 0)["rip"] == CODE_AT


def test_flat_kernel_may_begin_where_its_file_does(make_vm: Any, write: Any) -> None:
    vm = make_vm(16 * MIB)
    load_kernel(vm, write("kernel", flat(load=0xFFFF_FFFF)), None, "", 0)
    assert vm.u32(LOAD + 16) == MAGIC
    assert vm.memory[CODE_AT] == 0xF4


@pytest.mark.parametrize(
    ("kernel", "cause"),
    [
        (flat(header=LOAD + 0x4000), "impossible addresses: it lies at 0x104000 itself"),
        (flat(load=LOAD + 20), "impossible addresses: it lies at"),
        (flat(load_end=LOAD + 0x1000), "of which the file has 257 bytes"),
        (flat(bss_end=LOAD + 8), "its bss ends at 0x100008"),
        (flat(entry=LOAD + 0x1000), "its entry 0x101000 is outside"),
        (flat(header=16, load=0, entry=48), "free RAM begins at 1 MiB"),
        (flat(bss_end=0xB000_0000), "needs more than the 16 MiB"),
        (flat(tag(7)), "what is not there .a tag of type 7."),
        (flat(tag(1, 9)), "information that is not there .type 9."),
        (flat(tag(4)), "a tag of type 4 that is too short"),
        (header(tag(2, LOAD, LOAD, 0, 0)) + b"\xf4" * 64, "none to enter it at"),
        (header(), "is no ELF file"),
        (header(end=struct.pack("<HHI", 3, 0, 4)), "do not end within it"),
        (header(end=struct.pack("<HHI", 3, 0, 400)), "do not end within it"),
        (header(end=b""), "do not end within it"),
    ],
)
def test_header_that_lies_is_refused(make_vm: Any, write: Any, kernel: bytes, cause: str) -> None:
    with pytest.raises(BootError, match=cause) as error:
        load_kernel(make_vm(16 * MIB), write("kernel", kernel), None, "", 0)
    assert "\n" not in str(error.value)


def test_header_with_a_wrong_checksum_is_none(make_vm: Any, write: Any) -> None:
    with pytest.raises(BootError, match="is no kernel"):
        load_kernel(make_vm(16 * MIB), write("kernel", header(checksum=1)), None, "", 0)


def test_kernel_runs_and_says_its_command_line(write: Any) -> None:
    # cmp eax, BOOT_MAGIC ; jne off ; the first tag is the command line: lea esi, [ebx+16]
    # mov dx, 0x3f8 ; next: lodsb ; out dx, al ; test al, al ; jnz next
    # off: mov dx, 0x604 ; mov ax, 0x3400 ; out dx, ax ; hlt
    code = bytes.fromhex(
        "3d 8962d736 750d 8d7310 66baf803 ac ee 84c0 75fa 66ba0406 66b80034 66ef f4"
    )
    for kernel in (flat(code=code), elf64(code)):
        with Machine(
            engine="bt", kernel=write("kernel", kernel), append="hello there", memory="16M"
        ) as vm:
            vm.start()
            vm.console.expect("kernel hello there", LIMIT_S)
            assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
