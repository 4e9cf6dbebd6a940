"""Linux finds Xen, as its PVH guest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.platforms.linux import PATIENCE, PROMPT, lives_again, said

from tetrarch import Machine, images
from tetrarch.images import CachedGuest
from tetrarch.machine.status import StopReason


def test_linux_is_a_guest_of_xen(debian_guest: CachedGuest, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with Machine(engine="bt", platform="xen", cpus=2) as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        log = said(vm, "dmesg")
        for line in (
            "Hypervisor detected: Xen HVM",
            "Booting kernel on Xen PVH",
            "Xen version: 4.17",
            "xen:events: Using 2-level ABI",
            "xen:events: Xen HVM callback vector for event delivery is enabled",
            "installing Xen timer for CPU 1",
            "clocksource: Switched to clocksource xen",
        ):
            assert line in log
        assert said(vm, "cat /sys/hypervisor/type") == "xen"
        version = "cat /sys/hypervisor/version/major /sys/hypervisor/version/minor"
        assert said(vm, version).split() == ["4", "17"]
        # Each vCPU's own timer and its own calls of functions, by upcalls alone.
        said(vm, "taskset 1 sleep 0.1; taskset 2 sleep 0.1")
        interrupts = said(vm, "cat /proc/interrupts")
        rows = {line.split()[-1]: line.split()[1:3] for line in interrupts.splitlines()[1:]}
        assert int(rows["timer0"][0]) > 0
        assert int(rows["timer1"][1]) > 0
        assert int(rows["callfuncsingle0"][0]) > 0
        vm.save(saved)
    with Machine.restore(saved) as vm:
        vm.start()
        assert vm.config.platform == "xen"
        before, begun = float(said(vm, "cut -d' ' -f1 /proc/uptime")), time.monotonic()
        after = float(said(vm, "sleep 2; cut -d' ' -f1 /proc/uptime"))
        assert after - before == pytest.approx(time.monotonic() - begun, abs=0.5)
        vm.console.send("poweroff\n")
        assert vm.wait(PATIENCE).reason is StopReason.POWERED_OFF


def test_guest_that_reboots_starts_again_on_xen(debian_guest: CachedGuest) -> None:
    with Machine(engine="bt", platform="xen") as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        vm.console.send("reboot -f\n")
        vm.console.expect("reboot: Restarting system", PATIENCE)
        vm.console.expect(PROMPT, PATIENCE)
        assert "Booting kernel on Xen PVH" in said(vm, "dmesg")


@pytest.mark.long
def test_recorded_guest_of_xen_lives_again(debian_guest: CachedGuest, tmp_path: Path) -> None:
    assert lives_again("xen", tmp_path / "recording")


@pytest.mark.long
@pytest.mark.parametrize("name", ["debian", "debian-amd64", "debian-rt"])
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_stock_kernels_boot_as_pvh(name: str, cpus: int) -> None:
    guest = images.ensure(images.Cache(), name, images.TerminalReporter())
    kernel, initrd = guest.kernel, guest.initrd
    with Machine(engine="bt", platform="xen", kernel=kernel, initrd=initrd, cpus=cpus) as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        assert "Booting kernel on Xen PVH" in said(vm, "dmesg")
        assert said(vm, "nproc") == str(cpus)


def test_engine_is_one_that_can_have_xen(debian_guest: CachedGuest) -> None:
    with Machine(platform="xen", kernel=debian_guest.kernel) as vm:
        assert (vm.engine, vm.engine_reason) == ("bt", "its platform is xen")
