"""Linux's console on VMware's screen, and its pointer by the backdoor, as a viewer has them."""

from __future__ import annotations

import asyncio
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import asyncvnc
import pytest
from tests.debs import debian_package
from tests.initrds import shell_tree
from tests.programs import compiled
from tests.virtio.driver import wait_until
from tests.vnc.viewer import ZRLE, Viewer

from tetrarch import Machine
from tetrarch.devices.input_user import ABS_MAX
from tetrarch.display.font import VGA_BIOS, pc_font
from tetrarch.images.modules import ModuleTree, modules_dep

PROMPT = "~ # "
LIMIT_S = 120

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not VGA_BIOS.exists(), reason="no VGA BIOS: apt-get install seabios"),
    # asyncvnc takes DES from where cryptography had it.
    pytest.mark.filterwarnings("ignore:.*TripleDES"),
]

#: A shell on the serial line, and one on the screen.
SCRIPT = """
mount -t devtmpfs dev /dev
for module in vmwgfx psmouse evdev; do modprobe $module; done
cd; export PS1='~ # '
setsid sh -c 'exec sh </dev/tty1 >/dev/tty1 2>&1' &
exec setsid cttyhack sh
"""


def read_text(pixels: bytes, width: int, height: int) -> str:
    """What stands there in the PC's font, which Linux has too but for the 0: "?" is what no letter
    of it fits."""
    font = pc_font()
    known = {font[16 * code : 16 * code + 16]: chr(code) for code in range(0x20, 0x7F)}
    lit = [any(pixels[at : at + 3]) for at in range(0, len(pixels), 3)]
    lines = []
    for top in range(0, height - 15, 16):
        line = ""
        for left in range(0, width - 7, 8):
            glyph = bytes(
                sum(lit[row * width + left + bit] << (7 - bit) for bit in range(8))
                for row in range(top, top + 16)
            )
            line += known.get(glyph, "?")
        lines.append(line.rstrip())
    return "\n".join(lines)


def ask(vm: Machine, command: str) -> str:
    vm.console.send(command + "\n")
    return vm.console.expect(PROMPT, LIMIT_S)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Debian's kernel for all machines, whose driver is a module."""
    root = debian_package("linux-image-amd64")
    (modules,) = (root / "lib/modules").iterdir()
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    needed = ModuleTree(modules).closure(["vmwgfx", "psmouse", "evdev"])
    tree = shell_tree(SCRIPT)
    for module in needed:
        tree.file(f"lib/modules/{modules.name}/{module.path}", module.data)
    tree.file(f"lib/modules/{modules.name}/modules.dep", modules_dep(needed).encode())
    folder = tmp_path_factory.mktemp("screen")
    program = compiled(Path(__file__).with_name("kms_picture.c"), folder)
    tree.file("bin/kms_picture", program.read_bytes(), 0o755)
    initrd = folder / "initrd"
    initrd.write_bytes(tree.cpio())
    return kernel, initrd


@pytest.fixture
def vm(guest: tuple[Path, Path]) -> Iterator[Machine]:
    kernel, initrd = guest
    with Machine(
        engine="bt",
        platform="vmware",
        kernel=kernel,
        initrd=initrd,
        memory="512M",
        append="console=tty0 console=ttyS0 quiet",
        display="vnc=0",
    ) as machine:
        machine.start()
        machine.console.expect(PROMPT, LIMIT_S)
        yield machine


def shows(viewer: Viewer, text: str) -> bool:
    return text in read_text(viewer.pixels, viewer.width, viewer.height)


def test_console_is_on_the_screen_and_takes_what_is_typed(vm: Machine, tmp_path: Path) -> None:
    assert vm.config.screen == "svga"
    log = ask(vm, "dmesg | grep vmwgfx; cat /proc/fb")
    assert "Running on SVGA version 2." in log
    assert "0 vmwgfxdrmfb" in log
    assert vm.display is not None
    with Viewer(vm.display.address, encodings=(ZRLE, -223)) as viewer:
        viewer.until(lambda: viewer.width == 1280)
        viewer.until(lambda: shows(viewer, "built-in shell"))
        viewer.type(*map(ord, "echo 6*7=$((6*7))"), 0xFF0D)
        viewer.until(lambda: shows(viewer, "\n6*7=42"))
        # The cursor blinks.
        ask(vm, "echo 0 > /sys/class/graphics/fbcon/cursor_blink; clear > /dev/tty1")
        ask(vm, "seq 1 60 > /dev/tty1")
        viewer.until(lambda: shows(viewer, "\n59"))
        viewer.until(lambda: viewer.pixels == vm.screen().pixels)
        picture = vm.screen()
        assert (picture.width, picture.height) == (1280, 800)
    assert "\n58\n59" in read_text(picture.pixels, 1280, 800)
    vm.save(tmp_path / "saved")
    vm.kill()
    with Machine.restore(tmp_path / "saved", display=f"vnc={tmp_path / 'again'}") as again:
        again.start()
        assert again.screen().pixels == picture.pixels
        ask(again, "echo goes on > /dev/tty1")
        assert again.display is not None
        with Viewer(again.display.address, encodings=(ZRLE,)) as viewer:
            viewer.until(lambda: shows(viewer, "goes on"))


def test_pointer_is_where_the_viewer_has_it(vm: Machine) -> None:
    found = ask(vm, "grep -l 'VirtualPS/2 VMware VMMouse' /sys/class/input/event*/device/name")
    # One for places, and one for movements.
    events = re.findall(r"input/(event\d+)/device", found)
    kinds = {
        name: ask(vm, f"cat /sys/class/input/{name}/device/capabilities/abs") for name in events
    }
    (places,) = (name for name, kind in kinds.items() if re.search(r"^3\r$", kind, re.MULTILINE))
    ask(vm, f"exec 3</dev/input/{places}")
    assert vm.display is not None
    with Viewer(vm.display.address) as viewer:
        viewer.point(viewer.width - 1, 0)
        viewer.point(viewer.width - 1, viewer.height - 1, 1)
        form = """'24/1 "%02x" "\\n"'"""
        # Place, its end, place, button, its end: x stays, so it is told once.
        said = ask(vm, f"dd bs=24 count=5 <&3 2>/dev/null | hexdump -ve {form}")
    told = re.findall(r"^([0-9a-f]{48})\r?$", said, re.MULTILINE)
    assert [struct.unpack("<16xHHi", bytes.fromhex(event)) for event in told] == [
        *((3, 0, 0xFFFF), (0, 0, 0)),
        *((3, 1, 0xFFFF), (1, 0x110, 1), (0, 0, 0)),
    ]
    vmware = vm._platform.vmware
    assert vmware is not None
    wait_until(lambda: not vmware.mouse.state.waiting, "the guest takes all", LIMIT_S)
    assert vmware.mouse.point(ABS_MAX // 2, 0, 0, 0)
    ask(vm, "rmmod psmouse")
    assert not vmware.mouse.point(0, 0, 0, 0)


def drawn(vm: Machine, command: str) -> str:
    """What the program says when it has drawn that."""
    vm.console.send(command + "\n")
    return vm.console.expect(re.compile(r"^drawn.*$", re.MULTILINE), LIMIT_S)


def pattern(width: int, height: int) -> list[bytearray]:
    """What the program draws first, line by line."""
    return [
        bytearray(byte for x in range(width) for byte in ((x ^ y) & 255, y & 255, x & 255))
        for y in range(height)
    ]


def fill(lines: list[bytearray], x: int, y: int, width: int, height: int, colour: int) -> None:
    for line in lines[y : y + height]:
        line[3 * x : 3 * (x + width)] = colour.to_bytes(3) * width


def test_stock_viewer_sees_what_a_program_draws_by_kms(vm: Machine) -> None:
    assert vm.display is not None
    host, _, port = vm.display.address.partition(":")
    said = drawn(vm, "kms_picture")
    assert "drawn 1280x800" in said
    expected = pattern(1280, 800)

    async def use() -> None:
        async with asyncvnc.connect(host, int(port)) as client:

            async def compare() -> None:
                wanted, end = b"".join(expected), time.monotonic() + LIMIT_S
                # The display looks 25 times a second.
                while (await client.screenshot())[:, :, :3].tobytes() != wanted:
                    assert time.monotonic() < end

            await compare()
            for part in ((0, 0, 1, 1, 0xFFFFFF), (3, 5, 200, 77, 0x12_3456), (1279, 799, 1, 1, 0)):
                x, y, width, height, colour = part
                fill(expected, *part)
                command = f"rect {x} {y} {width} {height} {colour:x}"
                await asyncio.to_thread(drawn, vm, command)
                await compare()

    asyncio.run(use())
    assert vm.screen().pixels == b"".join(expected)
    # The console is back when the program has ended, and takes what is typed.
    ask(vm, "end")
    with Viewer(vm.display.address, encodings=(ZRLE,)) as viewer:
        viewer.until(lambda: shows(viewer, "built-in shell"))
        viewer.type(*map(ord, "echo 6*8=$((6*8))"), 0xFF0D)
        viewer.until(lambda: shows(viewer, "\n6*8=48"))


def test_viewers_that_are_slow_or_gone_hold_nobody_up(vm: Machine) -> None:
    assert vm.display is not None
    drawn(vm, "kms_picture")
    begun = time.monotonic()
    drawn(vm, "many 800")
    alone = time.monotonic() - begun
    slow = Viewer(vm.display.address)
    for _ in range(50):
        slow.request(incremental=False)  # 4 MiB each, of which it takes nothing
    gone = Viewer(vm.display.address)
    gone.request(incremental=False)
    gone.socket.close()
    with Viewer(vm.display.address, encodings=(ZRLE,)) as viewer:
        begun = time.monotonic()
        drawn(vm, "many 1600")
        assert time.monotonic() - begun < 10 * alone + 5
        expected = pattern(1280, 800)
        for number in range(800):
            fill(expected, 0, number, 1280, 1, 0x01_0203 * ((800 + number) % 64))
        viewer.until(lambda: viewer.pixels == b"".join(expected))
    # It has got what it asked for, whole, though late.
    slow.update()
    slow.socket.close()
    drawn(vm, "many 1")
    ask(vm, "end")
