"""Viewers of a machine: what they see, whatever they ask for, and what others of them do."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.vnc.viewer import (
    DESKTOP_SIZE,
    EXTENDED_DESKTOP_SIZE,
    LIMIT_S,
    QEMU_KEYS,
    RAW,
    ZLIB,
    ZRLE,
    Viewer,
    open_socket,
)

from tetrarch import Machine
from tetrarch.control import Client
from tetrarch.display.font import VGA_BIOS
from tetrarch.testing import pvh_kernel

pytestmark = pytest.mark.skipif(
    not VGA_BIOS.exists(), reason="no VGA BIOS: apt-get install seabios"
)

TEXT = 0xB_8000
VERSIONS = (b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n")


def show(vm: Machine, text: str, line: int = 0) -> None:
    cells = b"".join(bytes([byte, 0x1F]) for byte in text.encode())
    vm.write_memory(TEXT + 160 * line, cells)


def hide_cursor(vm: Machine) -> None:
    """Pictures have none."""
    vga = vm.pc.vga
    assert vga is not None
    vga.write(0x24, 1, 0x0A)
    vga.write(0x25, 1, 0x20)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(pvh_kernel(b"\xfb\xf4\xeb\xfd"))  # sti; hlt; jmp
    return path


@pytest.fixture
def vm(kernel: Path, tmp_path: Path) -> Iterator[Machine]:
    with Machine(
        engine="bt", kernel=kernel, memory="16M", display=f"vnc={tmp_path / 'vnc'}", name="shown"
    ) as machine:
        hide_cursor(machine)
        show(machine, "shown to viewers")
        machine.start()
        yield machine


def address(vm: Machine) -> str:
    assert vm.display is not None
    return vm.display.address


@pytest.mark.parametrize("version", VERSIONS)
def test_viewers_of_each_version_see_the_picture(vm: Machine, version: bytes) -> None:
    with Viewer(address(vm), version=version) as viewer:
        assert viewer.name == "shown"
        viewer.request(incremental=False)
        viewer.update()
        assert viewer.pixels == vm.screen().pixels


@pytest.mark.parametrize("encoding", [RAW, ZLIB, ZRLE])
def test_what_changes_comes_in_each_encoding(vm: Machine, encoding: int) -> None:
    with Viewer(address(vm), encodings=(5, encoding, RAW)) as viewer:
        viewer.request(incremental=False)
        viewer.update()
        assert viewer.used == {encoding}
        for line in range(3):
            show(vm, "".join(chr(33 + (line + column) % 90) for column in range(80)), line)
            viewer.request()
            parts = viewer.update()
            assert all(part[1] < 64 for part in parts)
        viewer.until(lambda: viewer.pixels == vm.screen().pixels)
        viewer.request(incremental=False, rect=(600, 390, 100, 100))
        assert viewer.update() == [(600, 390, 40, 10)]


@pytest.mark.parametrize(
    ("format_", "want"),
    [
        ((32, 24, 1, 1, 255, 255, 255, 16, 8, 0), b"\0\0\0\xaa"),
        ((16, 16, 0, 1, 31, 63, 31, 11, 5, 0), (21).to_bytes(2, "little")),
        ((16, 15, 1, 1, 31, 31, 31, 10, 5, 0), (21).to_bytes(2)),
        ((8, 8, 0, 1, 7, 7, 3, 0, 3, 6), bytes([2 << 6])),
    ],
)
def test_points_are_as_the_viewer_wants_them(
    vm: Machine, format_: tuple[int, ...], want: bytes
) -> None:
    with Viewer(address(vm)) as viewer:
        viewer.set_format(*format_)
        viewer.request(incremental=False, rect=(0, 0, 1, 1))  # blue paper
        assert struct.unpack(">BxH", viewer.read(4)) == (0, 1)
        viewer.read(12)
        assert viewer.read(len(want)) == want


def test_viewer_of_few_colours_is_told_what_they_are(vm: Machine) -> None:
    with Viewer(address(vm)) as viewer:
        viewer.set_format(8, 8, 0, 0, 0, 0, 0, 0, 0, 0)
        viewer.request(incremental=False, rect=(0, 0, 1, 1))
        assert struct.unpack(">BxHH", viewer.read(6)) == (1, 0, 256)
        colours = struct.unpack(">768H", viewer.read(1536))
        viewer.read(16)
        (point,) = viewer.read(1)
        assert colours[3 * point : 3 * point + 3] == (0, 0, 2 * 0xFFFF // 3)


def smaller(vm: Machine) -> None:
    """320 by 200 points, without text."""
    vga = vm.pc.vga
    assert vga is not None
    for index, value in ((6, 5), (5, 0x40)):
        vga.write(0x1E, 1, index)
        vga.write(0x1F, 1, value)


@pytest.mark.parametrize("pseudo", [DESKTOP_SIZE, EXTENDED_DESKTOP_SIZE])
def test_screen_changes_its_size(vm: Machine, pseudo: int) -> None:
    with Viewer(address(vm), encodings=(RAW, pseudo)) as viewer:
        if pseudo == EXTENDED_DESKTOP_SIZE:  # it says at once that it knows it
            viewer.request()
            assert viewer.update() == []
            assert viewer.pseudo.pop()[1] == (0, 0, 640, 400)
        viewer.request(incremental=False)
        viewer.update()
        smaller(vm)
        viewer.until(lambda: viewer.width == 320)
        assert viewer.pseudo[-1][0] == pseudo
        assert viewer.pseudo[-1][1] == (0, 0, 320, 200)
        viewer.request()
        viewer.update()
        assert viewer.pixels == vm.screen().pixels


def test_viewer_that_knows_one_size_keeps_it(vm: Machine) -> None:
    with Viewer(address(vm), encodings=(ZRLE,)) as viewer:
        viewer.request(incremental=False)
        viewer.update()
        smaller(vm)
        vm.write_memory(0xA_0000, bytes(64_000))
        viewer.until(lambda: not any(viewer.pixels))
        show(vm, "x")  # of which nothing is to be seen
        vm.write_memory(0xA_0000 + 320 * 100, b"\x0f" * 320)
        viewer.until(lambda: any(viewer.pixels))
        assert len([at for at, line in enumerate(viewer.lines) if any(line)]) == 1


def test_viewer_does_not_change_the_size(vm: Machine) -> None:
    with Viewer(address(vm), encodings=(RAW, EXTENDED_DESKTOP_SIZE)) as viewer:
        viewer.request()
        viewer.update()
        screen = struct.pack(">IHHHHI", 0, 0, 0, 800, 600, 0)
        viewer.socket.sendall(struct.pack(">BxHHBx", 251, 800, 600, 1) + screen)
        assert viewer.update() == []
        assert viewer.pseudo[-1][1] == (1, 1, 640, 400)


def test_keys_and_pointer_are_the_guests(vm: Machine) -> None:
    keyboard, mouse = vm.inputs
    assert (keyboard.model, mouse.model) == ("ps2-keyboard", "ps2-mouse")
    i8042 = vm.pc.devices["i8042"]
    with Viewer(address(vm), encodings=(RAW, QEMU_KEYS)) as viewer:
        viewer.request()
        viewer.update()
        assert viewer.pseudo == [(QEMU_KEYS, (0, 0, 0, 0), b"")]
        viewer.key(ord("a"), True)
        viewer.scan_code(0xC8, True)
        end = time.monotonic() + LIMIT_S
        read: list[int] = []
        want = [0x1E, 0xE0, 0x48]
        while read != want:
            assert time.monotonic() < end
            if i8042.status.read(0, 1) & 1:  # type: ignore[attr-defined]
                read.append(i8042.data.read(0, 1))  # type: ignore[attr-defined]
    released: list[int] = []
    while released != [0x9E, 0xE0, 0xC8]:
        assert time.monotonic() < end
        if i8042.status.read(0, 1) & 1:  # type: ignore[attr-defined]
            released.append(i8042.data.read(0, 1))  # type: ignore[attr-defined]


def test_viewer_that_takes_nothing_hurts_nobody(vm: Machine) -> None:
    with Viewer(address(vm)) as slow, Viewer(address(vm)) as other:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(1000):  # asks for a gigabyte, and reads none of it
            slow.request(incremental=False)
        for number in range(5):
            show(vm, f"number {number}")
            other.request()
            other.update()
        other.until(lambda: other.pixels == vm.screen().pixels)
    with Viewer(address(vm)) as after:
        after.request(incremental=False)
        after.update()
        assert after.pixels == vm.screen().pixels


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"RFB 003.008\n\x02",
        b"RFB 003.008\n\x01\x01\x09",
        b"RFB 003.008\n\x01\x01\xff\x01",
        b"RFB 003.008\n\x01\x01" + struct.pack(">B3xI", 6, 0xFFFF_FFFF),
        b"RFB 003.003\n\x01\x00",
        b"\xff" * 70_000,
    ],
)
def test_who_sends_rubbish_is_hung_up_on(vm: Machine, rubbish: bytes) -> None:
    with open_socket(address(vm)) as connection, suppress(OSError):  # or before it has sent all
        connection.sendall(rubbish)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    with Viewer(address(vm)) as viewer:
        viewer.request(incremental=False)
        viewer.update()


def test_who_says_nothing_leaves_room_for_others(vm: Machine) -> None:
    silent = [open_socket(address(vm)) for _ in range(4)]
    try:
        for connection in silent:
            assert connection.recv(12) == b"RFB 003.008\n"
        with open_socket(address(vm)) as fifth:
            assert fifth.recv(12) == b""  # too many at once
    finally:
        for connection in silent:
            connection.close()
    end = time.monotonic() + LIMIT_S
    while True:
        assert time.monotonic() < end
        try:
            with Viewer(address(vm)):
                break
        except (EOFError, OSError):
            time.sleep(0.01)


def test_there_are_so_many_viewers_and_no_more(vm: Machine) -> None:
    viewers: list[Viewer] = []
    try:
        for _ in range(16):
            viewers.append(Viewer(address(vm)))
        assert vm.display is not None
        assert len(vm.display.viewers) == 16
        with pytest.raises((EOFError, OSError)):
            Viewer(address(vm))
        viewers[0].request(incremental=False)
        viewers[0].update()
    finally:
        for viewer in viewers:
            viewer.socket.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_password_lets_in_who_knows_it(kernel: Path, tmp_path: Path, version: bytes) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"secret\nmore\n")
    with Machine(
        engine="bt", kernel=kernel, memory="16M", display=f"vnc=0,password-file={file}"
    ) as vm:
        vm.start()
        begun = time.monotonic()
        with pytest.raises(PermissionError, match=r"the password is wrong|^$"):
            Viewer(address(vm), version=version, password=b"guess")
        assert time.monotonic() - begun > 1
        with Viewer(address(vm), version=version, password=b"secret") as viewer:
            viewer.request(incremental=False)
            viewer.update()
            assert viewer.pixels[:3] == b"\0\0\0"


def test_end_of_the_machine_is_that_of_its_viewers(kernel: Path, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"secret")
    with Machine(
        engine="bt", kernel=kernel, memory="16M", display=f"vnc=0,password-file={file}"
    ) as vm:
        vm.start()
        where = address(vm)
        viewer = Viewer(where, password=b"secret")
        waiting = open_socket(where)
        guess = threading.Thread(target=_guess, args=(where,))
        guess.start()
        viewer.request(incremental=False)
        viewer.update()
        viewer.request()
    with viewer, waiting:
        assert viewer.socket.recv(1) == b""
    guess.join(LIMIT_S)
    with pytest.raises(OSError, match="refused"):
        open_socket(where)
    end = time.monotonic() + LIMIT_S
    while any(thread.name.startswith("vnc") for thread in threading.enumerate()):
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.01)


def _guess(where: str) -> None:
    with pytest.raises((EOFError, OSError)):
        Viewer(where, password=b"guess")


def test_control_tells_who_watches(vm: Machine, kernel: Path, tmp_path: Path) -> None:
    vm.serve_control(tmp_path / "qmp")
    with Client(tmp_path / "qmp") as client, Viewer(address(vm)):
        assert client.execute("query-vnc") == {
            "enabled": True,
            "host": str(tmp_path / "vnc"),
            "service": "",
            "family": "unix",
            "auth": "none",
            "clients": [{"host": "", "service": "", "family": "unix", "websocket": False}],
        }
    with Machine(engine="bt", kernel=kernel, memory="16M", vga=True) as other:
        other.serve_control(tmp_path / "other")
        with Client(tmp_path / "other") as client:
            assert client.execute("query-vnc") == {"enabled": False}
            host, _, port = other.serve_display().address.rpartition(":")
            with Viewer(f"{host}:{port}") as viewer:
                told = client.execute("query-vnc")
                assert (told["host"], told["service"], told["family"]) == (host, port, "ipv4")
                (watches,) = told["clients"]
                assert watches["service"] == str(viewer.socket.getsockname()[1])


def test_saved_machine_is_shown_again(vm: Machine, tmp_path: Path) -> None:
    vm.save(tmp_path / "saved")
    vm.kill()
    with Machine.restore(tmp_path / "saved", display="vnc=0") as again:
        again.start()
        assert [one.model for one in again.inputs] == ["ps2-keyboard", "ps2-mouse"]
        with Viewer(address(again)) as viewer:
            viewer.request(incremental=False)
            viewer.update()
            assert viewer.pixels == again.screen().pixels
            assert again.screen().text == "shown to viewers"
