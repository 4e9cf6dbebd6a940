"""Kernels and machines to boot, made by hand: small, whole and easy to damage."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tetrarch.boot.source import Source

MIB = 1 << 20


class FakeVm:
    """RAM from 0 up, in a bytearray; writes outside of it fail as on a machine."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)

    @property
    def ram(self) -> list[tuple[int, int]]:
        return [(0, len(self.memory))]

    def read_memory(self, address: int, length: int) -> bytes:
        assert 0 <= address <= len(self.memory) - length, hex(address)
        return bytes(self.memory[address : address + length])

    def write_memory(self, address: int, data: bytes) -> None:
        assert 0 <= address <= len(self.memory) - len(data), hex(address)
        self.memory[address : address + len(data)] = data

    def u32(self, address: int) -> int:
        return int.from_bytes(self.memory[address : address + 4], "little")

    def u64(self, address: int) -> int:
        return int.from_bytes(self.memory[address : address + 8], "little")

    def text(self, address: int) -> bytes:
        return bytes(self.memory[address : self.memory.index(0, address)])


def source_of(image: bytes) -> Source:
    """A kernel's file with these bytes."""
    return Source(lambda at, length: image[at : at + length], len(image), "kernel", "k")


def build_bzimage(
    *,
    version: int = 0x20F,
    loadflags: int = 1,
    xloadflags: int = 3,
    relocatable: int = 1,
    alignment: int = 2 * MIB,
    pref_address: int = 16 * MIB,
    init_size: int = 4 * MIB,
    initrd_addr_max: int = 0x7FFF_FFFF,
    cmdline_size: int = 2047,
    payload: bytes = b"\x90" * 4096,
) -> bytes:
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, len(payload) // 16)
    setup[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = loadflags
    struct.pack_into("<II", setup, 0x22C, initrd_addr_max, alignment)
    setup[0x234] = relocatable
    struct.pack_into("<HI", setup, 0x236, xloadflags, cmdline_size)
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    return bytes(setup) + payload


def build_vmlinux(
    *,
    entry: int | None = 0x10_0010,
    code: bytes = b"\xfa\xf4" * 32,
    memory_size: int = 0x3000,
    physical: int = 0x10_0000,
    elf_class: int = 2,
    machine: int = 62,
    loads: int = 1,
) -> bytes:
    """An ELF with ``loads`` times the same PT_LOAD, and a PVH note behind another note."""
    notes = struct.pack("<III4sI", 4, 4, 6, b"Lin\0", 0)
    if entry is not None:
        notes += struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)
    headers = 64 + (loads + 1) * 56
    ident = b"\x7fELF" + bytes([elf_class, 1, 1])
    ehdr = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, machine, 1, physical, 64, 0, 0, 64, 56, loads + 1, 0, 0, 0
    )
    load = struct.pack(
        "<IIQQQQQQ", 1, 5, headers, physical, physical, len(code), memory_size, 0x1000
    )
    at = headers + len(code)
    note = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(notes), len(notes), 4)
    return ehdr + load * loads + note + code + notes


@pytest.fixture(scope="session")
def make_vm() -> Callable[[int], FakeVm]:
    return FakeVm


@pytest.fixture(scope="session")
def make_bzimage() -> Callable[..., bytes]:
    return build_bzimage


@pytest.fixture(scope="session")
def make_vmlinux() -> Callable[..., bytes]:
    return build_vmlinux


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """Writes a file and gives its path."""

    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write
