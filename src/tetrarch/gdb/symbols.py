"""A symbol file for gdb of a Linux kernel that has none: names, and how its stack is unwound.

The names are those of /proc/kallsyms or of a System.map. With them the file needs no code: its
sections say only where code is, and gdb reads that in the guest.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tetrarch.boot.vmlinux import extract_vmlinux
from tetrarch.errors import ImageError
from tetrarch.gdb.orc import debug_frame

__all__ = ["Symbol", "kernel_frames", "read_symbols", "symbol_file"]

# nm(1)'s letters, in kallsyms with the module behind the name.
_LINE = re.compile(r"([0-9a-f]{16}) ([A-Za-z?]) (\S+)(?:\s+\[(\S+)\])?", re.ASCII)
# Below it is no address of the kernel's: offsets into each CPU's own data.
_KERNEL = 0xFFFF_8000_0000_0000
_LAST_GAP = 4096

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_ET_EXEC, _EM_X86_64 = 2, 62
_SHT_PROGBITS, _SHT_SYMTAB, _SHT_STRTAB, _SHT_NOBITS = 1, 2, 3, 8
_SHF_ALLOC, _SHF_EXECINSTR = 2, 4
_SHN_ABS = 0xFFF1
_STB_GLOBAL = 1 << 4
_STT_OBJECT, _STT_FUNC = 1, 2


class Symbol(NamedTuple):
    address: int
    kind: str
    """nm(1)'s letter."""
    name: str
    module: str = ""


def read_symbols(text: str, source: Path) -> list[Symbol]:
    """In the order of addresses. Raises ImageError for a file that is no such list."""
    symbols = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ImageError(
                f"{source}: line {number} is no symbol", mend="give /proc/kallsyms or a System.map"
            )
        symbols.append(Symbol(int(match[1], 16), match[2], match[3], match[4] or ""))
    if not any(symbol.address >= _KERNEL for symbol in symbols):
        raise ImageError(
            f"{source} has no address of a kernel",
            mend="read /proc/kallsyms as root; a Debian package has no System.map, but its -dbg",
        )
    return sorted(symbols)


def kernel_frames(bzimage: bytes, symbols: Iterable[Symbol], source: Path) -> bytes:
    """.debug_frame of a kernel file, for where the symbols say that it runs.

    Raises ImageError where it has no such tables.
    """
    try:
        vmlinux = extract_vmlinux(bzimage)
        sections = _sections(vmlinux)
        ip, orc, text = (sections[name] for name in (".orc_unwind_ip", ".orc_unwind", ".text"))
    except (ValueError, KeyError, struct.error) as error:
        raise ImageError(
            f"{source} is no Linux kernel with tables for unwinding",
            mend="give the guest's vmlinuz, or leave it out",
        ) from error
    start = next((symbol.address for symbol in symbols if symbol.name == "_text"), text.address)
    return debug_frame(ip.data, orc.data, ip.address, start - text.address)


class _Section(NamedTuple):
    address: int
    data: bytes


def _sections(elf: bytes) -> dict[str, _Section]:
    """Of a 64-bit ELF file, by name."""
    if not elf.startswith(b"\x7fELF\x02\x01"):
        raise ValueError("no ELF file")
    header = _EHDR.unpack_from(elf)
    table, count, names_at = header[6], header[12], header[13]
    headers = [_SHDR.unpack_from(elf, table + _SHDR.size * index) for index in range(count)]
    if names_at >= count:
        raise ValueError("no names of sections")
    names = elf[headers[names_at][4] :][: headers[names_at][5]]
    return {
        names[name:].split(b"\0", 1)[0].decode("ascii", "replace"): _Section(
            address, b"" if kind == _SHT_NOBITS else elf[offset : offset + size]
        )
        for name, kind, _, address, offset, size, *_ in headers
    }


def symbol_file(symbols: Sequence[Symbol], frames: bytes = b"") -> bytes:
    """An ELF file of ``symbols``, which are in the order of addresses, and a .debug_frame."""
    placed = [symbol for symbol in symbols if symbol.address >= _KERNEL]
    ranges = {
        ".text": _range(symbol for symbol in placed if not symbol.module),
        ".text.modules": _range(symbol for symbol in placed if symbol.module),
    }
    writer = _Writer()
    numbers = {}
    for name, (start, end) in ranges.items():
        if end > start:
            flags = _SHF_ALLOC | _SHF_EXECINSTR
            numbers[name] = writer.add(name, _SHT_NOBITS, flags, start, end - start)
    strings = bytearray(b"\0")
    local, others = bytearray(_SYM.size), bytearray()
    ends = [symbol.address for symbol in symbols[1:]] + [symbols[-1].address + _LAST_GAP]
    for symbol, end in zip(symbols, ends, strict=True):
        section = _SHN_ABS
        if symbol.address >= _KERNEL:
            section = numbers[".text.modules" if symbol.module else ".text"]
        code = symbol.kind in "tTwW"
        bind = 0 if symbol.kind.islower() else _STB_GLOBAL
        entry = _SYM.pack(
            len(strings),
            bind | (_STT_FUNC if code else _STT_OBJECT),
            0,
            section,
            symbol.address,
            min(end - symbol.address, 0xFFFF_FFFF) if code else 0,
        )
        (others if bind else local).extend(entry)
        strings += symbol.name.encode() + b"\0"
    if frames:
        writer.add(".debug_frame", _SHT_PROGBITS, data=frames)
    table = writer.add(".symtab", _SHT_SYMTAB, data=bytes(local + others), entry=_SYM.size)
    names = writer.add(".strtab", _SHT_STRTAB, data=bytes(strings))
    writer.link(table, names, len(local) // _SYM.size)
    return writer.file()


def _range(symbols: Iterable[Symbol]) -> tuple[int, int]:
    addresses = [symbol.address for symbol in symbols]
    return (addresses[0], addresses[-1] + _LAST_GAP) if addresses else (0, 0)


class _Writer:
    """An ELF file of sections alone (gABI 4.1, chapter 4)."""

    def __init__(self) -> None:
        self._names = bytearray(b"\0")
        self._headers: list[list[int]] = [[0] * 10]
        self._data = bytearray(_EHDR.size)

    def add(
        self,
        name: str,
        kind: int,
        flags: int = 0,
        address: int = 0,
        size: int = 0,
        *,
        data: bytes = b"",
        entry: int = 0,
    ) -> int:
        """Returns the number of the section."""
        self._data += bytes(-len(self._data) % 8)
        header = [len(self._names), kind, flags, address, len(self._data), size or len(data)]
        self._headers.append([*header, 0, 0, 8, entry])
        self._names += name.encode() + b"\0"
        self._data += data
        return len(self._headers) - 1

    def link(self, section: int, other: int, info: int) -> None:
        self._headers[section][6:8] = other, info

    def file(self) -> bytes:
        # Its own name is the last: the bytes are taken when it is there.
        names = self.add(".shstrtab", _SHT_STRTAB, data=bytes(self._names) + b".shstrtab\0")
        table = len(self._data) + -len(self._data) % 8
        kind = (b"\x7fELF\x02\x01\x01", _ET_EXEC, _EM_X86_64, 1)
        sections = (_SHDR.size, len(self._headers), names)
        header = _EHDR.pack(*kind, 0, 0, table, 0, _EHDR.size, 0, 0, *sections)
        body = bytes(self._data[_EHDR.size :]).ljust(table - _EHDR.size, b"\0")
        return header + body + b"".join(_SHDR.pack(*fields) for fields in self._headers)
