"""The option ROM that starts a kernel under SeaBIOS: where parts go, and a kernel in real mode."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from pathlib import Path

import pytest

from tetrarch import Machine, StopReason
from tetrarch.devices.fw_cfg import Key
from tetrarch.errors import BootError
from tetrarch.firmware.items import FileItem
from tetrarch.firmware.linux_rom import linux_rom
from tetrarch.images import CachedGuest

MIB = 1 << 20
LIMIT_S = 120
ROM = "genroms/tetrarch-linux.bin"

needs_seabios = pytest.mark.skipif(
    not os.path.exists("/usr/share/seabios/bios-256k.bin"),
    reason="no SeaBIOS: apt-get install seabios",
)


class Ram:
    ram = [(0, 64 * MIB)]  # noqa: RUF012 - of one kind

    def read_memory(self, address: int, length: int) -> bytes:
        raise AssertionError

    def write_memory(self, address: int, data: bytes) -> None:
        raise AssertionError("firmware copies, not we")


def kernel(
    version: int, *, loadflags: int = 1, code: bytes = b"\xf4", payload: bytes = b""
) -> bytes:
    """A setup of four sectors with code at its entry of 16 bits, and what is behind it."""
    payload = payload.ljust(4096, b"\x90")
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    struct.pack_into("<I", setup, 0x1F4, len(payload) // 16)
    setup[0x1FE:0x200] = b"\x55\xaa"
    # jmp behind the header, which is as long as the newest
    setup[0x200:0x202] = b"\xeb\x6a"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    setup[0x211] = loadflags
    struct.pack_into("<II", setup, 0x22C, 0x37FF_FFFF, 2 * MIB)
    setup[0x234] = 0
    struct.pack_into("<HI", setup, 0x236, 0, 255)
    struct.pack_into("<QI", setup, 0x258, MIB, 2 * MIB)
    setup[0x26C : 0x26C + len(code)] = code
    return bytes(setup) + payload


def commands(rom: bytes) -> dict[int, tuple[int, int]]:
    """Address and size of each item that the ROM asks for."""
    assert rom[:3] == b"\x55\xaa\x01"
    assert len(rom) == 512
    assert sum(rom) % 256 == 0
    pnp = int.from_bytes(rom[0x1A:0x1C], "little")
    assert rom[pnp : pnp + 4] == b"$PnP"
    assert sum(rom[pnp : pnp + 16 * rom[pnp + 5]]) % 256 == 0
    found = {}
    for at in range(0, len(rom), 16):
        control, size, address = struct.unpack_from(">IIQ", rom, at)
        if control & 0xFFFF == 0x000A:  # select and read
            found[control >> 16] = (address, size)
    return found


@pytest.mark.parametrize(
    ("version", "loadflags", "setup_at", "kernel_at", "cmdline_at"),
    [
        (0x20F, 1, 0x1_0000, 0x10_0000, 0x1_E000),
        (0x202, 1, 0x1_0000, 0x10_0000, 0x1_E000),
        (0x202, 0, 0x9_0000, 0x1_0000, 0x9_9800),
        (0x201, 1, 0x9_0000, 0x10_0000, 0x9_9800),
        (0x200, 0, 0x9_0000, 0x1_0000, 0x9_9800),
    ],
)
def test_parts_go_where_the_protocol_has_them(
    tmp_path: Path, version: int, loadflags: int, setup_at: int, kernel_at: int, cmdline_at: int
) -> None:
    path, initrd = tmp_path / "kernel", tmp_path / "initrd"
    path.write_bytes(kernel(version, loadflags=loadflags))
    initrd.write_bytes(b"archive" * 1000)
    opened = ExitStack()
    items, files = linux_rom(Ram(), path, initrd, "a=1", opened)
    assert files["bootorder"] == b"/rom@" + ROM.encode()
    asked = commands(files[ROM])
    assert asked[Key.SETUP_DATA] == (setup_at, 5 * 512)
    assert asked[Key.KERNEL_DATA] == (kernel_at, 4096)
    assert asked[Key.CMDLINE_DATA] == (cmdline_at, 4)
    assert items[Key.CMDLINE_DATA] == b"a=1\0"
    address, size = asked[Key.INITRD_DATA]
    assert address % 4096 == 0
    # Below what SeaBIOS keeps at the end of RAM.
    assert 3 * MIB <= address < address + size <= 63 * MIB
    setup = items[Key.SETUP_DATA]
    assert isinstance(setup, bytes)
    assert struct.unpack_from("<II", setup, 0x218) == (address, size)
    assert setup[0x210] == 0xFF
    if version >= 0x201:
        assert setup[0x211] & 0x80
        assert struct.unpack_from("<H", setup, 0x224) == ((cmdline_at & 0xFFFF) - 0x200,)
    if version >= 0x202:
        assert struct.unpack_from("<I", setup, 0x228) == (cmdline_at,)
    else:
        assert struct.unpack_from("<HH", setup, 0x20) == (0xA33F, 0x9800)
    part = items[Key.KERNEL_DATA]
    assert isinstance(part, FileItem)
    with opened:
        assert part.read(0, 4) == b"\x90" * 4


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (kernel(0x1FF), "boot protocol 1.255, which is too old"),
        (kernel(0x202, loadflags=0, payload=bytes(0x8_1000)), "does not fit below 1 MiB"),
        (kernel(0x20F)[:0x300], "is cut short"),
    ],
)
def test_kernel_that_cannot_start_is_refused(tmp_path: Path, data: bytes, cause: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(data)
    with ExitStack() as files, pytest.raises(BootError, match=cause):
        linux_rom(Ram(), path, None, "", files)


def test_command_line_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(kernel(0x201))
    too_long = "is 300 bytes long, this kernel takes 255"
    with ExitStack() as files, pytest.raises(BootError, match=too_long):
        linux_rom(Ram(), path, None, "x" * 300, files)


@pytest.mark.long
@needs_seabios
def test_linux_starts_by_its_entry_of_16_bits(debian_guest: CachedGuest) -> None:
    with Machine(
        engine="bt",
        memory="512M",
        firmware="seabios",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
    ) as vm:
        vm.start()
        assert "SeaBIOS (version" in vm.console.expect("root@tetrarch:~# ", LIMIT_S)
        vm.console.send("cat /proc/cmdline; poweroff\n")
        vm.console.expect("console=ttyS0 quiet", LIMIT_S)
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF


@needs_seabios
@pytest.mark.parametrize("version", [0x20F, 0x201])
def test_kernel_starts_in_real_mode_and_uses_the_bios(tmp_path: Path, version: int) -> None:
    # DS is the setup's segment: mov si, the command line ; next: lodsb ; test al, al ; jz done
    # mov dx, 0x3f8 ; out dx, al ; jmp next
    # done: int 0x12 (conventional memory in KiB) ; mov al, ah ; add al, '0' ; mov dx, 0x3f8
    # out dx, al ; mov dx, 0x604 ; mov ax, 0x3400 ; out dx, ax ; hlt
    at = 0xE000 if version >= 0x202 else 0x9800
    code = b"\xfc\xbe" + struct.pack("<H", at)
    code += bytes.fromhex("ac 84c0 7406 baf803 ee ebf5")
    code += bytes.fromhex("cd12 88e0 0430 baf803 ee ba0406 b80034 ef f4")
    path = tmp_path / "kernel"
    path.write_bytes(kernel(version, code=code))
    with Machine(
        engine="bt", memory="64M", firmware="seabios", kernel=path, append="real mode: "
    ) as vm:
        vm.start()
        vm.console.expect("real mode: 2", LIMIT_S)  # 512 KiB and more
        assert vm.wait(LIMIT_S).reason is StopReason.POWERED_OFF
