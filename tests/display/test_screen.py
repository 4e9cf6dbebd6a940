"""The screen: a VGA's registers and memory as text, as points, and as a PNG file."""

from __future__ import annotations

import base64
import os
import struct
import zlib
from pathlib import Path

import pytest
from tests.firmware.media import boot_disk

from tetrarch import Machine, MachineStateError
from tetrarch.control import Client, ControlError
from tetrarch.devices.ramfb import FrameBuffer, Ramfb
from tetrarch.devices.vga import PORT_BASE, Vga
from tetrarch.display import Screen
from tetrarch.display.linear import linear_screen
from tetrarch.display.vga import vga_screen
from tetrarch.machine.config import ScreenKind
from tetrarch.testing import pvh_kernel

LIMIT_S = 120
TEXT = 0xB_8000

needs_font = pytest.mark.skipif(
    not os.path.exists("/usr/share/seabios/vgabios-isavga.bin"),
    reason="no VGA BIOS: apt-get install seabios",
)


class Memory:
    def __init__(self) -> None:
        self.bytes = bytearray(0x2_0000)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.bytes[address - 0xA_0000 :][:length])

    def show(self, text: bytes, colours: int, line: int = 0) -> None:
        at = TEXT - 0xA_0000 + 160 * line
        self.bytes[at : at + 2 * len(text)] = b"".join(bytes([one, colours]) for one in text)


def put(vga: Vga, port: int, *values: int) -> None:
    for value in values:
        vga.write(port - PORT_BASE, 1, value)


@needs_font
def test_text_is_told_and_drawn_in_its_colours() -> None:
    memory = Memory()
    memory.show(b"I", 0x1F)  # white on blue
    memory.show(b"second line", 0x07, line=1)
    screen = vga_screen(Vga().registers(), memory.read)
    assert (screen.width, screen.height) == (640, 400)
    assert screen.text == "I\nsecond line"
    points = screen.array()
    assert points.shape == (400, 640, 3)
    cell = {
        tuple(points[row, column, part] for part in range(3))
        for row in range(16)
        for column in range(8)
    }
    assert cell == {(255, 255, 255), (0, 0, 170)}


@needs_font
def test_start_address_scrolls_and_wraps() -> None:
    memory, vga = Memory(), Vga()
    memory.show(b"first", 7)
    memory.show(b"fifth", 7, line=4)
    put(vga, 0x3D4, 0x0D)
    put(vga, 0x3D5, 4 * 80 & 0xFF)
    put(vga, 0x3D4, 0x0C)
    put(vga, 0x3D5, 4 * 80 >> 8)
    assert vga_screen(vga.registers(), memory.read).text == "fifth"


def test_mode_of_256_colours_goes_through_the_palette() -> None:
    memory, vga = Memory(), Vga()
    put(vga, 0x3CE, 6)
    put(vga, 0x3CF, 5)
    put(vga, 0x3CE, 5)
    put(vga, 0x3CF, 0x40)
    put(vga, 0x3C8, 9)
    put(vga, 0x3C9, 0x3F, 0x20, 0)
    memory.bytes[320 * 7 + 5] = 9
    points = vga_screen(vga.registers(), memory.read).array()
    assert points.shape == (200, 320, 3)
    assert [points[7, 5, part] for part in range(3)] == [255, 130, 0]


def test_mode_of_planes_is_refused() -> None:
    vga = Vga()
    put(vga, 0x3CE, 6)
    put(vga, 0x3CF, 5)
    with pytest.raises(MachineStateError, match="planes"):
        vga_screen(vga.registers(), Memory().read)


class Ram:
    """4 KiB from 0x1000 on."""

    def __init__(self) -> None:
        self.bytes = bytearray(range(256)) * 16

    def read(self, address: int, length: int) -> bytes:
        if not 0x1000 <= address <= 0x2000 - length:
            raise LookupError
        return bytes(self.bytes[address - 0x1000 :][:length])


XR24 = 0x3432_5258


def test_linear_frame_buffer_has_blue_first_and_may_have_longer_lines() -> None:
    screen = linear_screen(FrameBuffer(0x1000, XR24, 2, 3, 16), Ram().read, LookupError)
    points = screen.array()
    assert points.shape == (3, 2, 3)
    assert [points[1, 1, part] for part in range(3)] == [22, 21, 20]
    whole = linear_screen(FrameBuffer(0x1000, XR24, 32, 32, 0), Ram().read, LookupError)
    assert whole.array()[31, 31, 0] == 254


@pytest.mark.parametrize(
    ("place", "cause"),
    [
        (FrameBuffer(0x1000, 0x3631_4752, 2, 2, 8), "of format 0x36314752, which is not shown"),
        (FrameBuffer(0x1000, XR24, 2, 2, 4), "2 by 2"),
        (FrameBuffer(0x1000, XR24, 1 << 31, 2, 0), "which is not shown"),
        (FrameBuffer(0x1000, XR24, 16384, 16384, 0), "which is not shown"),
        (FrameBuffer(0x1FFC, XR24, 2, 1, 8), "at 0x1ffc is not in its memory"),
        (FrameBuffer((1 << 64) - 4, XR24, 2, 1, 8), "is not in its memory"),
    ],
)
def test_frame_buffer_that_cannot_be_is_refused(place: FrameBuffer, cause: str) -> None:
    with pytest.raises(MachineStateError, match=cause):
        linear_screen(place, Ram().read, LookupError)


def test_firmware_sets_a_frame_buffer_up() -> None:
    assert Ramfb().frame_buffer is None
    device = Ramfb()
    device.write(0, struct.pack(">QIIIII", 0x1000, XR24, 0, 32, 16, 128))
    assert device.frame_buffer == FrameBuffer(0x1000, XR24, 32, 16, 128)
    other = Ramfb()
    other.load(device.save())
    assert other.frame_buffer == device.frame_buffer
    other.reset()
    assert other.save() == Ramfb().save()


def test_registers_of_a_line_are_protected() -> None:
    vga = Vga()
    put(vga, 0x3D4, 1)
    put(vga, 0x3D5, 7)
    assert vga.read(0x3D5 - PORT_BASE, 1) == 79
    put(vga, 0x3D4, 0x11)
    put(vga, 0x3D5, 0)
    put(vga, 0x3D4, 1)
    put(vga, 0x3D5, 7)
    assert vga.read(0x3D5 - PORT_BASE, 1) == 7


def test_picture_is_a_png_file() -> None:
    pixels = bytes(range(18))
    data = Screen(3, 2, pixels).png()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack_from(">I4sIIBBBBB", data, 8) == (13, b"IHDR", 3, 2, 8, 2, 0, 0, 0)
    (length,) = struct.unpack_from(">I", data, 33)
    assert zlib.decompress(data[41 : 41 + length]) == b"\0" + pixels[:9] + b"\0" + pixels[9:]
    assert Screen.of_png(data, "its text") == Screen(3, 2, pixels, "its text")


@needs_font
def test_screendump_writes_the_picture_to_a_file(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xfb\xf4\xeb\xfd"))  # sti; hlt; jmp
    with Machine(engine="bt", kernel=kernel, memory="16M", vga=True) as vm:
        vm.serve_control(tmp_path / "qmp")
        vm.start()
        with Client(tmp_path / "qmp") as client:
            shown = client.execute("x-screen")
            client.execute("screendump", {"filename": str(tmp_path / "a.ppm")})
            client.execute("screendump", {"filename": str(tmp_path / "a.png"), "format": "png"})
            for wrong, words in (
                ({"filename": str(tmp_path / "no" / "a")}, "No such file or directory"),
                ({"filename": "\0"}, "null byte"),
                ({"filename": "a", "format": "bmp"}, "format"),
                ({"filename": "a", "device": "other"}, "'other' not found"),
                ({"filename": "a", "head": 1}, "together with 'device'"),
            ):
                with pytest.raises(ControlError, match=words):
                    client.execute("screendump", wrong)
    head = b"P6\n%d %d\n255\n" % (shown["width"], shown["height"])
    data = (tmp_path / "a.ppm").read_bytes()
    assert data.startswith(head)
    assert len(data) == len(head) + 3 * shown["width"] * shown["height"]
    assert (tmp_path / "a.png").read_bytes() == base64.b64decode(shown["png"])


def test_machine_without_a_screen_says_so(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(b"\xf4"))
    with (
        Machine(engine="bt", kernel=kernel, memory="16M") as vm,
        pytest.raises(MachineStateError, match="no screen; make it with vga=True"),
    ):
        vm.screen()


@needs_font
@pytest.mark.parametrize("screen", ["vga", "svga"])
def test_firmware_shows_its_text_on_the_screen(tmp_path: Path, screen: ScreenKind) -> None:
    disk = boot_disk(tmp_path / "disk.img", b"seen on the screen", halts=True)
    with Machine(
        engine="bt", firmware="seabios", screen=screen, memory="64M", disk=f"{disk},format=raw"
    ) as vm:
        vm.start()
        vm.console.expect("halted", LIMIT_S)
        text = vm.screen().text
    assert "SeaBIOS (version" in text
    assert "seen on the screen" in text
