"""Linux drives what is there: the default guest, by its own drivers."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tetrarch import Machine, block
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


def test_linux_without_messages_has_its_interrupts_by_lines(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    block.create(tmp_path / "disk.img", 8 << 20)
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        append_extra="pci=nomsi",
        balloon=False,
        disk=tmp_path / "disk.img",
    ) as vm:
        vm.start()
        vm.console.expect(PROMPT, 120)

        def ask(command: str) -> str:
            vm.console.send(command + "\n")
            return vm.console.expect(PROMPT, 120)

        assert "4096" in ask(
            "dd if=/dev/zero of=/dev/vda bs=4k count=64 conv=fsync; echo $((64*64))"
        )
        assert "1000" in ask("head -c 1000 /dev/hwrng | wc -c")
        interrupts = ask("cat /proc/interrupts")
        lines = [line for line in interrupts.splitlines() if "virtio" in line]
        assert lines
        for line in lines:
            _, count, chip = line.split()[:3]
            assert chip == "IO-APIC", line
            assert int(count) > 0, line
        # Each on the line of its slot, which they may share.
        assert {name for line in lines for name in re.findall(r"virtio\d", line)} == {
            "virtio0",
            "virtio1",
        }


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
