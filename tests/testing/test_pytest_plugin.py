"""The fixtures for pytest, as a project that uses them has them: in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.machine import guests

from tetrarch.images import CachedGuest
from tetrarch.testing import pvh_kernel

LIMIT_S = 240

TESTS = """
import pathlib
import subprocess

import pytest


@pytest.fixture
def tetrarch_options():
    return {"engine": "bt", "name": "patient"}


def test_guest(tetrarch_guest, tmp_path):
    guest, vm = tetrarch_guest, tetrarch_guest.vm
    assert guest.run("echo $((6 * 7))") == "42\\n"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        guest.run("echo no >&2; exit 3")
    assert (caught.value.returncode, caught.value.stderr) == (3, "no\\n")
    assert guest.run("exit 3", check=False) == ""

    pathlib.Path("file").write_text("from the host")
    vm.copy_in("file", "/tmp/file")
    assert vm.exec(["cat", "/tmp/file"]).stdout == b"from the host"
    vm.copy_out("/tmp/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "from the host"

    image = tmp_path / "disk.raw"
    image.write_bytes(b"on the disk".ljust(1 << 20, b"\\0"))
    deleted = vm.events("device-deleted")
    disk = vm.attach_disk(image)
    wait = "n=0; until [ -e %s ] || [ $((n += 1)) = 600 ]; do sleep 0.05; done"
    assert guest.run(wait % "/dev/vda" + "; head -c 11 /dev/vda") == "on the disk"
    card = vm.attach_net(f"socket={tmp_path}/switch,mac=52:54:00:01:02:03")
    found = guest.run(wait % "/sys/class/net/eth0" + "; cat /sys/class/net/eth0/address")
    assert found == "52:54:00:01:02:03\\n"
    for device in (disk, card):
        vm.detach(device)
        assert deleted.next(30).data["device"] == device
    assert guest.run("[ -e /dev/vda ] || [ -e /sys/class/net/eth0 ] || echo gone") == "gone\\n"

    assert vm.stop(60)
    assert not pathlib.Path(vm.config.vsock).exists()
    pytest.fail("to see the console")


def test_machine(tetrarch_machine):
    vm = tetrarch_machine(kernel="kernel", engine="bt", memory="16M")
    vm.start()
    assert vm.running
"""


def test_fixtures_boot_guests_and_show_consoles(tmp_path: Path, debian_guest: CachedGuest) -> None:
    (tmp_path / "test_guest.py").write_text(TESTS)
    (tmp_path / "kernel").write_bytes(pvh_kernel(guests.ENDLESS_LOOP))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:randomly", "-W", "error", "--rootdir=.", "-q"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "Failed: to see the console" in done.stdout, done.stdout
    console = done.stdout.partition("Console of patient")[2]
    assert "reboot: Power down" in console
