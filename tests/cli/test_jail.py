"""A jailed ``tetrarch run``: every thread has given up what it should, and the machine works."""

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.display.test_screen import needs_font
from tests.firmware.test_linux_rom import kernel as linux_kernel
from tests.firmware.test_linux_rom import needs_seabios
from tests.machine import guests
from tests.vnc.viewer import Viewer

from tetrarch import _native
from tetrarch.control import Client
from tetrarch.testing import pvh_kernel


@contextmanager
def running(tmp_path: Path, *options: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A guest that has said that it is there, and goes on for ever."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.say(b"ready") + guests.ENDLESS_LOOP))
    with subprocess.Popen(
        [sys.executable, "-m", "tetrarch", "run", "--engine", "bt", "--kernel", kernel, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(5) == b"ready"
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)


def threads(pid: int) -> dict[str, dict[str, str]]:
    """The status of each thread (proc_pid_status(5)), with its network."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (line.partition(":") for line in (task / "status").read_text().splitlines())
        status = {key: value.strip() for key, _, value in lines}
        found[f"{status['Name']} {task.name}"] = status | {"net": os.readlink(task / "ns/net")}
    return found


def test_every_thread_has_given_up_its_rights(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    sockets = ("--vsock", tmp_path / "v", "--control", tmp_path / "c")
    own = os.readlink("/proc/self/ns/net")
    with running(tmp_path, "--disk", disk, *sockets) as process:
        seen = threads(process.pid)
    # Python's main one, those of the console, the control socket and the keeper, vCPU and I/O.
    assert len(seen) > 5
    for name, status in seen.items():
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), name
        assert int(status["CapEff"], 16) & ~(1 << 5) == 0, name  # CAP_KILL
        assert status["net"] != own, name
    assert not (tmp_path / "v").exists()
    assert not (tmp_path / "c").exists()


def test_machine_that_is_not_to_be_jailed_is_not(tmp_path: Path) -> None:
    with running(tmp_path, "--jail", "off") as process:
        seen = threads(process.pid)
    own = Path("/proc/self/status").read_text()
    assert all(f"Seccomp:\t{status['Seccomp']}\n" in own for status in seen.values())


def test_memory_of_a_jailed_machine_is_not_dumped(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    values = {line[:25].strip(): line[26:].split()[:2] for line in limits}
    assert values["Max core file size"] == ["0", "0"]
    assert int(values["Max open files"][1]) <= 4096
    assert values["Max address space"][1] != "unlimited"


def test_jailed_guest_resets_and_starts_again_from_its_file(cli: Cli, tmp_path: Path) -> None:
    # Its file is opened again each time.
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.say(b"up") + guests.KEYBOARD_RESET))
    done = cli(
        *("run", "--engine", "bt", "--kernel", kernel),
        *("--on-reset", "restart", "--timeout", "2", "--console", "file=" + str(tmp_path / "log")),
    )
    assert done.returncode == 124, done.stderr
    assert (tmp_path / "log").read_bytes().count(b"up") > 1


@needs_seabios
def test_firmware_of_a_jailed_machine_reads_kernel_and_initrds(cli: Cli, tmp_path: Path) -> None:
    """The guest asks for them, so a thread reads them that may open nothing."""
    # mov dx, 0x3f8 ; mov al, '!' ; out dx, al ; mov dx, 0x604 ; mov ax, 0x3400 ; out dx, ax ; hlt
    code = bytes.fromhex("baf803 b021 ee ba0406 b80034 ef f4")
    kernel, first, second = (tmp_path / name for name in ("kernel", "first", "second"))
    kernel.write_bytes(linux_kernel(0x20F, code=code))
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    done = cli(
        *("run", "--engine", "bt", "--memory", "64M", "--firmware", "seabios"),
        *("--kernel", kernel, "--initrd", f"{first},{second}", "--timeout", "50"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("!")


@needs_font
def test_screen_of_a_jailed_machine_is_shown(tmp_path: Path) -> None:
    """The font is read for the first picture."""
    with running(tmp_path, "--vga", "--control", tmp_path / "c"), Client(tmp_path / "c") as client:
        png = base64.b64decode(client.execute("x-screen")["png"])
    assert png.startswith(b"\x89PNG")


def test_wrong_jail_is_one_line(cli: Cli) -> None:
    done = cli("run", "--jail", "on")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tetrarch: --jail: 'on' is no jail; there are auto and off\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.skipif(_native.landlock_version() == 0, reason="this kernel has no Landlock")
def test_user_without_rights_is_jailed_as_well(tmp_path: Path) -> None:
    """By a user namespace, where the host lets users have one."""
    code = (
        "import ctypes, os\n"
        "from tetrarch import _native\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        # A process that was root does not own its files in /proc (PR_SET_DUMPABLE).
        "ctypes.CDLL(None).prctl(4, 1)\n"
        "_native.own_user_namespace()\n"
        "assert os.getuid() == 65534, os.getuid()\n"
        "print(_native.confine_prepare(False, []))\n"
        "_native.confine_control([], [])\n"
        "try: open('/etc/hostname')\n"
        "except OSError as error: print(error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    if "own_user_namespace" in done.stderr:
        pytest.skip("the host lets users have no namespaces")
    assert (done.stdout, done.stderr) == ("True\nPermission denied\n", "")


@needs_font
def test_display_of_a_jailed_machine_is_shown(tmp_path: Path) -> None:
    """Viewers come when no socket can be made any more."""
    where, file = tmp_path / "vnc", tmp_path / "password"
    file.write_text("secret\n")
    display = f"vnc={where},password-file={file}"
    with running(tmp_path, "--display", display, "--control", tmp_path / "c"):
        with pytest.raises(PermissionError):
            Viewer(where, password=b"guess")
        with Viewer(where, password=b"secret", encodings=(16,)) as viewer:
            viewer.request(incremental=False)
            viewer.update()
            viewer.type(ord("a"))
            viewer.point(1, 1, 1)
            assert viewer.used == {16}
        with Client(tmp_path / "c") as client:
            assert client.execute("query-vnc")["auth"] == "vnc"
    assert not where.exists()
