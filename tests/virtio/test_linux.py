"""Linux drives what is there: the default guest, by its own drivers."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.config import VirtioTransport

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "root@tetrarch:~# "


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_random_numbers_come_from_the_host(
    debian_guest: CachedGuest, virtio: VirtioTransport
) -> None:
    with Machine(
        engine="bt", kernel=debian_guest.kernel, initrd=debian_guest.initrd, virtio=virtio
    ) as vm:
        vm.start()
        vm.console.expect(PROMPT, 90)

        def ask(command: str) -> str:
            vm.console.send(command + "\n")
            return vm.console.expect(PROMPT, 60)

        assert "virtio_rng.0" in ask("cat /sys/class/misc/hw_random/rng_current")
        counted = ask("head -c 100000 /dev/hwrng | wc -c")
        assert "100000" in counted


@pytest.mark.usefixtures("debian_guest")
def test_example_of_a_console_in_python_is_one_for_linux() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples/virtio_console.py"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the guest said hello, and was answered\n"


def test_console_in_python_goes_on_in_a_restored_machine(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    shouting = runpy.run_path(str(ROOT / "examples/virtio_console.py"))["ShoutingConsole"]
    with Machine(
        engine="bt", kernel=debian_guest.kernel, initrd=debian_guest.initrd, virtio="mmio"
    ) as vm:
        vm.attach_virtio(shouting())
        vm.start()
        vm.console.expect(PROMPT, 90)
        vm.console.send("exec 3<>/dev/hvc0; stty raw -echo <&3\n")
        vm.console.expect(PROMPT, 60)
        vm.save(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as vm:
        device = shouting()
        vm.attach_virtio(device)
        vm.start()
        vm.console.send("echo again >&3; read -r line <&3; echo it says $line\n")
        vm.console.expect("it says AGAIN", 60)
        assert device.heard == b"again\n"
