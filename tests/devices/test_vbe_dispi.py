"""The registers by which a VGA BIOS sets modes, and SeaBIOS's that sets one by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tetrarch import Machine, MachineStateError
from tetrarch._native import Vm
from tetrarch.devices.vbe_dispi import VbeDispi
from tetrarch.display.font import SVGA_BIOS, pc_font
from tetrarch.pci.memory import BarMemory

LIMIT_S = 60
ID, XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, VIRT_HEIGHT, X_OFFSET, Y_OFFSET, MEMORY = range(11)
VRAM_BYTES = 1 << 20


class Bios:
    def __init__(self) -> None:
        self.vram = BarMemory(Vm("bt", 1 << 20), VRAM_BYTES)
        self.device = VbeDispi(self.vram)

    def read(self, index: int) -> int:
        self.device.write(0, 2, index)
        assert self.device.read(0, 2) == index
        return self.device.read(1, 2)

    def write(self, index: int, value: int) -> None:
        self.device.write(0, 2, index)
        self.device.write(1, 2, value)

    def mode(self, width: int, height: int, bits: int = 32, flags: int = 0x41) -> None:
        for index, value in ((ENABLE, 0), (XRES, width), (YRES, height), (BPP, bits)):
            self.write(index, value)
        self.write(ENABLE, flags)


@pytest.fixture
def bios() -> Iterator[Bios]:
    made = Bios()
    yield made
    made.vram.close()


def test_bios_asks_what_there_is(bios: Bios) -> None:
    for version in (0xB0C0, 0xB0C5):
        bios.write(ID, version)
        assert bios.read(ID) == version
    bios.write(ID, 0xB0C6)
    assert bios.read(ID) == 0xB0C5
    assert bios.read(MEMORY) == VRAM_BYTES >> 16
    bios.write(ENABLE, 2)
    assert [bios.read(index) for index in (XRES, YRES, BPP)] == [2560, 1600, 32]
    bios.write(ENABLE, 0)
    bios.write(XRES, 2561)
    assert bios.read(XRES) == 0
    for index in (11, 0xFFFF):
        bios.write(index, 1)
        assert bios.read(index) == 0


def test_picture_is_what_is_in_the_memory(bios: Bios) -> None:
    assert bios.device.look() is None
    bios.vram.write(0, b"\xff" * VRAM_BYTES)
    bios.mode(16, 8)
    shown = bios.device.look()
    assert shown is not None
    frame, parts = shown
    assert (frame.width, frame.height, parts) == (16, 8, None)
    assert not any(frame.points)
    bios.vram.write(4 * 20, b"second line")
    bios.write(VIRT_WIDTH, 20)
    bios.write(Y_OFFSET, 1)
    still = bios.device.still()
    assert still is not None
    assert still.points.startswith(b"second line")
    bios.mode(16, 8, flags=0xC1)  # and keep what is there
    still = bios.device.still()
    assert still is not None
    assert b"second line" in still.points


@pytest.mark.parametrize("mode", [(16, 8, 16), (0, 8, 32), (2560, 1600, 32)])
def test_mode_that_cannot_be_shown_is_told(bios: Bios, mode: tuple[int, int, int]) -> None:
    bios.mode(*mode)
    with pytest.raises(MachineStateError, match=r"is not shown|not in its memory"):
        bios.device.still()


def test_part_beyond_the_memory_is_told(bios: Bios) -> None:
    bios.mode(16, 8)
    bios.write(Y_OFFSET, 0xFFFF)
    with pytest.raises(MachineStateError, match="not in its memory"):
        bios.device.still()


def test_state_goes_on_in_another(bios: Bios) -> None:
    bios.mode(16, 8)
    other = VbeDispi(bios.vram)
    other.load(bios.device.save())
    assert other.still() is not None
    other.reset()
    assert other.still() is None


@pytest.mark.skipif(not SVGA_BIOS.exists(), reason="no VGA BIOS: apt-get install seabios")
def test_bios_writes_in_a_mode_of_points(tmp_path: Path) -> None:
    # mov ax, 0x4f02 ; mov bx, 0x4142 ; int 0x10: 640 by 480 points of 32 bits
    # mov al, 'A' ; mov ah, 14 ; mov bx, 15 ; int 0x10 ; mov dx, 0x3f8 ; mov al, '!' ; out dx, al
    # again: sti ; hlt ; jmp again
    code = bytes.fromhex("b8024f bb4241 cd10 b041 b40e bb0f00 cd10 baf803 b021 ee fb f4 ebfc")
    disk = tmp_path / "disk.img"
    disk.write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0"))
    with Machine(
        engine="bt", firmware="seabios", screen="svga", memory="64M", disk=f"{disk},format=raw"
    ) as vm:
        vm.start()
        vm.console.expect("!", LIMIT_S)
        shown = vm.screen()
    assert (shown.width, shown.height) == (640, 480)
    points = shown.array()
    glyph = bytes(
        sum((points[row, column, 0] > 0) << (7 - column) for column in range(8))
        for row in range(16)
    )
    assert glyph == pc_font()[16 * ord("A") :][:16]
