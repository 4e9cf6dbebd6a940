"""Symbol files of Linux kernels, as gdb and readelf see them."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from tests.gdb.debuggee import require_gdb

from tetrarch.cli.symbols import make_symbols
from tetrarch.errors import ImageError
from tetrarch.gdb.orc import debug_frame
from tetrarch.gdb.symbols import read_symbols, symbol_file

KALLSYMS = """\
0000000000001000 A cpu_debug_store
ffffffff81000000 T _text
ffffffff81000100 t helper
ffffffff81000200 D value
ffffffffc0000000 t init_module\t[loop]
"""
SOURCE = Path("kallsyms")
TABLE = 0xFFFF_FFFF_8200_0000
CODE = 0xFFFF_FFFF_8100_0000
# Bases of ORC entries (asm/orc_types.h).
UNDEFINED, PREV_SP, BP, SP, BP_INDIRECT, SP_INDIRECT = 0, 1, 4, 5, 8, 9


def tables(entries: list[tuple[int, int, int, int, int, int]]) -> tuple[bytes, bytes]:
    """Of (address, sp_reg, sp_offset, bp_reg, bp_offset, type)."""
    ip, orc = b"", b""
    for number, (address, sp_reg, sp_offset, bp_reg, bp_offset, kind) in enumerate(entries):
        ip += struct.pack("<i", address - (TABLE + 4 * number))
        orc += struct.pack("<hhH", sp_offset, bp_offset, sp_reg | bp_reg << 4 | kind << 8)
    return ip, orc


def rows(frames: bytes, directory: Path) -> list[str]:
    """What readelf makes of a .debug_frame: address, CFA and rules."""
    file = directory / "frames"
    file.write_bytes(symbol_file(read_symbols(KALLSYMS, SOURCE), frames))
    said = subprocess.run(
        ["readelf", "--debug-dump=frames-interp", file], capture_output=True, text=True, check=True
    )
    assert not said.stderr, said.stderr
    return [" ".join(line.split()) for line in said.stdout.splitlines() if line[:4] == "ffff"]


# The type of calls is 0 at first, and 2 since Linux 6.4.
@pytest.mark.parametrize("call", [0, 2])
def test_orc_entries_become_rules(tmp_path: Path, call: int) -> None:
    ip, orc = tables(
        [
            (CODE + 0x10, SP, 16, UNDEFINED, 0, call),
            (CODE, SP, 8, UNDEFINED, 0, call),
            (CODE + 0x20, SP, 24, PREV_SP, -16, call),
            (CODE + 0x230, BP, 16, PREV_SP, -16, call),
            (CODE + 0x240, SP, 0, UNDEFINED, 0, call + 1),
            (CODE + 0x250, SP, 8, UNDEFINED, 0, call + 2),
            # A filler gives way to what has the same address.
            (CODE + 0x250, UNDEFINED, 0, UNDEFINED, 0, call),
            (CODE + 0x260, UNDEFINED, 0, UNDEFINED, 0, call),
            (CODE + 0x270, SP, 8, UNDEFINED, 0, call),
        ]
    )
    found = rows(debug_frame(ip, orc, TABLE, 0x100_0000), tmp_path)
    slid = CODE + 0x100_0000
    assert found[:4] == [
        f"{slid:x} rsp+8 s c-8",
        f"{slid + 0x10:x} rsp+16 s c-8",
        f"{slid + 0x20:x} rsp+24 c-16 c-8",
        f"{slid + 0x230:x} rbp+16 c-16 c-8",
    ]
    regs = found[4].split()
    assert regs[:2] == [f"{slid + 0x240:x}", "rsp+0"]
    # pt_regs: its end is RIP at 128 and RSP at 152.
    assert {"c+128", "c+152", "c+32"} <= set(regs)
    assert found[5] == f"{slid + 0x250:x} rsp+8 s c+24 c+0"
    assert found[6] == f"{slid + 0x260:x} rsp+8 u"
    assert len(found) == 7


def test_bases_in_memory_are_expressions(tmp_path: Path) -> None:
    ip, orc = tables(
        [
            (CODE, SP_INDIRECT, 8, UNDEFINED, 0, 0),
            (CODE + 4, BP_INDIRECT, -8, BP, -16, 0),
            (CODE + 8, SP, 8, UNDEFINED, 0, 0),
        ]
    )
    assert rows(debug_frame(ip, orc, TABLE, 0), tmp_path) == [
        f"{CODE:x} exp s c-8",
        f"{CODE + 4:x} exp exp c-8",
    ]


def test_gdb_finds_names(tmp_path: Path) -> None:
    (tmp_path / "kallsyms").write_text(KALLSYMS)
    make_symbols(tmp_path / "kallsyms", tmp_path / "kernel.sym", None)
    words = [require_gdb(), "--batch", "-nx"]
    for command in ("info address helper", "info symbol 0xffffffffc0000004", "print &value"):
        words += ["-ex", command]
    said = subprocess.run(
        [*words, str(tmp_path / "kernel.sym")], capture_output=True, text=True, check=True
    )
    assert 'Symbol "helper" is at 0xffffffff81000100' in said.stdout
    assert "init_module + 4 in section .text.modules" in said.stdout
    assert "0xffffffff81000200 <value>" in said.stdout


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no address of a kernel"),
        ("0000000000000000 T _text\n", "no address of a kernel"),
        ("ffffffff81000000 T _text\nnonsense\n", "line 2 is no symbol"),
    ],
)
def test_bad_lists_are_refused(text: str, cause: str) -> None:
    with pytest.raises(ImageError, match=cause):
        read_symbols(text, SOURCE)


@pytest.mark.parametrize("kernel", [b"", b"\x7fELF", bytes(0x1000), b"MZ" * 0x800])
def test_bad_kernels_are_refused(tmp_path: Path, kernel: bytes) -> None:
    (tmp_path / "kallsyms").write_text(KALLSYMS)
    (tmp_path / "vmlinuz").write_bytes(kernel)
    with pytest.raises(ImageError, match=re.escape("tables for unwinding")):
        make_symbols(tmp_path / "kallsyms", tmp_path / "sym", tmp_path / "vmlinuz")
    assert not (tmp_path / "sym").exists()
