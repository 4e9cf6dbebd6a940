"""Reading what modules say of themselves, on ELF files made here."""

import contextlib
import gzip
import lzma
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch.images.modules import (
    ModuleFormatError,
    ModuleTree,
    modinfo,
    modules_alias,
    modules_dep,
)


def module(**fields: str) -> bytes:
    """An ELF file with nothing but .modinfo and the section names."""
    info = b"".join(f"{key}={value}\0".encode() for key, value in fields.items())
    names = b"\0.modinfo\0.shstrtab\0"
    info_at, names_at = 64, 64 + len(info)
    table_at = names_at + len(names)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, table_at)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)

    def section(name: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    return (
        bytes(header)
        + info
        + names
        + bytes(64)
        + section(1, info_at, len(info))
        + section(10, names_at, len(names))
    )


@pytest.fixture
def tree(tmp_path: Path) -> ModuleTree:
    kernel = tmp_path / "kernel" / "drivers"
    kernel.mkdir(parents=True)
    (kernel / "top.ko").write_bytes(module(depends="mid-dle", alias="pci:v1AF4*"))
    (kernel / "mid_dle.ko.xz").write_bytes(lzma.compress(module(depends="base")))
    (kernel / "base.ko.gz").write_bytes(gzip.compress(module(depends="", softdep="pre: extra")))
    (kernel / "extra.ko").write_bytes(module())
    (kernel / "other.ko").write_bytes(module())
    return ModuleTree(tmp_path)


def test_closure_takes_what_is_needed_and_no_more(tree: ModuleTree) -> None:
    names = {found.name for found in tree.closure(["top", "not-there"])}
    assert names == {"top", "mid_dle", "base", "extra"}


def test_compressed_modules_come_out_plain(tree: ModuleTree) -> None:
    (found,) = (m for m in tree.closure(["mid_dle"]) if m.name == "mid_dle")
    assert found.path == "kernel/drivers/mid_dle.ko"
    assert found.data.startswith(b"\x7fELF")


def test_modules_dep_names_the_nearest_first(tree: ModuleTree) -> None:
    text = modules_dep(tree.closure(["top"]))
    line = next(line for line in text.splitlines() if "top.ko:" in line)
    assert line.split()[1:] == ["kernel/drivers/mid_dle.ko", "kernel/drivers/base.ko"]


def test_modules_alias_maps_hardware_to_module(tree: ModuleTree) -> None:
    assert modules_alias(tree.closure(["top"])) == "alias pci:v1AF4* top\n"


@pytest.mark.parametrize("data", [b"", b"hello", b"\x7fELF\x01\x01" + bytes(60)])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(ModuleFormatError):
        modinfo(data)


@given(st.integers(min_value=6, max_value=len(module(a="b")) - 1), st.integers(0, 255))
def test_damaged_module_is_read_or_refused(at: int, value: int) -> None:
    data = bytearray(module(a="b"))
    data[at] = value
    for damaged in (bytes(data), bytes(data[: at + 1])):
        with contextlib.suppress(ModuleFormatError):
            modinfo(damaged)
