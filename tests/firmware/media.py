"""Disks and discs that boot, made by hand: a sector that says a word and switches off."""

from __future__ import annotations

import struct
from pathlib import Path

SECTOR, BLOCK = 512, 2048


#: mov dx, 0x3f8 ; mov al, of each character ; out dx, al ; then sti ; again: hlt ; jmp again
HALTED = b"\xba\xf8\x03" + b"".join(b"\xb0%c\xee" % one for one in b"halted") + b"\xfb\xf4\xeb\xfd"


def boot_sector(message: bytes, *, halts: bool = False) -> bytes:
    """Shows ``message`` by the BIOS, then soft-off: SLP_TYP 5 and SLP_EN to PM1 control. In
    between are some ticks of the clock: SeaBIOS sends a line's last characters then.

    With ``halts`` it says "halted" on the serial line instead, and waits for ever.
    """
    code = bytes.fromhex(
        "31c0 8ed8"  # xor ax, ax ; mov ds, ax
        "be0000"  # mov si, the message
        "ac 84c0 7409"  # next: lodsb ; test al, al ; jz off
        "b40e bb0700 cd10"  # mov ah, 14 ; mov bx, 7 ; int 0x10
        "ebf2"  # jmp next
        "fb b90400 f4 e2fd"  # off: sti ; mov cx, 4 ; wait: hlt ; loop wait
    )
    # mov dx, 0x604 ; mov ax, 0x3400 ; out dx, ax ; hlt
    code += HALTED if halts else bytes.fromhex("ba0406 b80034 ef f4")
    code = code[:5] + (0x7C00 + len(code)).to_bytes(2, "little") + code[7:]
    return (code + message + b"\0").ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def boot_disk(path: Path, message: bytes, *, halts: bool = False) -> Path:
    path.write_bytes(boot_sector(message, halts=halts).ljust(1 << 20, b"\0"))
    return path


def boot_disc(path: Path, message: bytes) -> Path:
    """An ISO 9660 image that boots by El Torito without emulation (version 1.0, section 2)."""
    catalog_at, code_at = 19, 20
    volume = b"\1CD001\1\0" + b" " * 32 + b"TETRARCH".ljust(32)
    record = b"\0CD001\1" + b"EL TORITO SPECIFICATION".ljust(64, b"\0")
    record += struct.pack("<I", catalog_at)
    validation = bytearray(struct.pack("<BBH24sHBB", 1, 0, 0, b"Tetrarch", 0, 0x55, 0xAA))
    total = sum(struct.unpack("<16H", validation))
    struct.pack_into("<H", validation, 28, -total & 0xFFFF)
    entry = struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, code_at)
    image = bytearray(BLOCK * 32)
    for at, content in (
        (16, volume),
        (17, record),
        (18, b"\xffCD001\1"),
        (catalog_at, bytes(validation) + entry),
        (code_at, boot_sector(message)),
    ):
        image[BLOCK * at : BLOCK * at + len(content)] = content
    path.write_bytes(image)
    return path
