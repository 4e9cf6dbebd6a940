"""SeaBIOS starts from a floppy disk, and what it starts reads and writes it by INT 13h."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tetrarch import Machine, StopReason
from tetrarch.devices.fdc82077 import FORMATS

LIMIT_S = 120

pytestmark = pytest.mark.skipif(
    not os.path.exists("/usr/share/seabios/bios-256k.bin"),
    reason="no SeaBIOS: apt-get install seabios",
)

_OFF = bytes.fromhex("ba0406 b80034 ef f4")  # mov dx, 0x604 ; mov ax, 0x3400 ; out dx, ax ; hlt
_SAY = bytes.fromhex(
    "be0080 baf803 ac 84c0 7403 ee ebf8"
)  # what lies at 0x8000, to the serial port


def boot_floppy(path: Path, size: int, words: bytes) -> Path:
    """Its sector says what its last sector has, having written that to its side 1, sector 2."""
    form = FORMATS[size]
    # xor ax, ax ; mov ds, ax ; mov es, ax
    code = bytes.fromhex("31c0 8ed8 8ec0")
    # mov ax, 0x0201 ; mov cx, last ; mov dh, 1 ; mov bx, 0x8000 ; int 0x13
    last = bytes([form.sectors, form.tracks - 1])
    parts = [b"\xb8\x01\x02\xb9" + last + bytes.fromhex("b601 bb0080 cd13")]
    # mov ax, 0x0301 ; mov cx, 2 ; int 0x13
    parts.append(bytes.fromhex("b80103 b90200 cd13"))
    end = _SAY + _OFF
    for number, part in enumerate(parts):
        # jc off
        left = sum(len(other) + 2 for other in parts[number + 1 :])
        code += part + bytes([0x72, left + len(_SAY)])
    disk = bytearray(size)
    disk[:512] = (code + end).ljust(510, b"\0") + b"\x55\xaa"
    disk[-512:] = words.ljust(512, b"\0")
    path.write_bytes(disk)
    return path


@pytest.mark.parametrize("size", [1440 << 10, *(size for size in FORMATS if size != 1440 << 10)])
def test_floppy_boots(tmp_path: Path, size: int) -> None:
    floppy = boot_floppy(tmp_path / "floppy.img", size, b"booted from a floppy\r\n")
    with Machine(engine="bt", firmware="seabios", memory="64M", floppy=floppy) as vm:
        vm.start()
        vm.console.expect("booted from a floppy", LIMIT_S)
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
    sectors = FORMATS[size].sectors
    second = floppy.read_bytes()[(sectors + 1) * 512 :][:512]
    assert second == b"booted from a floppy\r\n".ljust(512, b"\0")


def test_closed_tab_refuses_what_is_written(tmp_path: Path) -> None:
    floppy = boot_floppy(tmp_path / "floppy.img", 1440 << 10, b"never said\r\n")
    before = floppy.read_bytes()
    options = f"{floppy},readonly"
    with Machine(engine="bt", firmware="seabios", memory="64M", floppy=options) as vm:
        vm.start()
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
        assert "never said" not in vm.console.text
    assert floppy.read_bytes() == before
