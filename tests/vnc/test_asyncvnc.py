"""A stock viewer, asyncvnc, at a machine that shows and hears."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncvnc
import pytest

from tetrarch import Machine
from tetrarch.display.font import VGA_BIOS

LIMIT_S = 120

pytestmark = [
    pytest.mark.skipif(not VGA_BIOS.exists(), reason="no VGA BIOS: apt-get install seabios"),
    # It takes DES from where cryptography had it.
    pytest.mark.filterwarnings("ignore:.*TripleDES"),
]

#: A boot sector: next: xor ah, ah ; int 0x16 ; mov ah, 14 ; mov bx, 7 ; int 0x10 ; mov dx, 0x3f8 ;
#: out dx, al ; jmp next. It shows what is typed, and says it on the serial line, after "ready".
ECHO = (
    b"\xba\xf8\x03"
    + b"".join(b"\xb0%c\xee" % one for one in b"ready")
    + bytes.fromhex("30e4 cd16 b40e bb0700 cd10 baf803 ee ebef")
)


def test_what_is_typed_into_firmware_is_seen(tmp_path: Path) -> None:
    disk, file = tmp_path / "disk.img", tmp_path / "password"
    disk.write_bytes((ECHO.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    file.write_bytes(b"secret")
    with Machine(
        engine="bt",
        firmware="seabios",
        memory="64M",
        disk=f"{disk},format=raw",
        display=f"vnc=0,password-file={file}",
    ) as vm:
        vm.start()
        assert vm.display is not None
        host, _, port = vm.display.address.partition(":")

        async def use() -> tuple[bytes, bytes]:
            async with asyncvnc.connect(host, int(port), password="secret") as client:
                client.keyboard.write("Typed: 1+1=(2)")
                # On a thread: what is typed goes out meanwhile.
                await asyncio.to_thread(vm.console.expect, "(2)", LIMIT_S)
                vga = vm.pc.vga
                assert vga is not None
                vga.write(0x24, 1, 0x0A)  # a picture has no cursor
                vga.write(0x25, 1, 0x20)
                await asyncio.sleep(0.1)
                seen = await client.screenshot()
                return seen[:, :, :3].tobytes(), vm.screen().pixels

        vm.console.expect("ready", LIMIT_S)
        seen, shown = asyncio.run(use())
        assert vm.screen().text.endswith("Typed: 1+1=(2)")
        assert seen == shown
