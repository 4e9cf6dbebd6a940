"""Linux's CPUs that come into a machine on engine bt while it runs, work, and go."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tetrarch import Machine, StopReason
from tetrarch.images import CachedGuest

PROMPT = "root@tetrarch"
PATIENCE = 120.0
CPUS = "/sys/devices/system/cpu"
COMPLAINTS = r"soft lockup|hard LOCKUP|rcu.*stall|BUG:|WARNING:|Oops|not responding|[Ff]ail.*CPU"

pytestmark = pytest.mark.long


def said(vm: Machine, command: str) -> str:
    """What a command prints, between two marks that its echo does not have."""
    vm.console.send(f"echo BEG''IN; {command}; echo EN''D\n")
    vm.console.expect("BEGIN", PATIENCE)
    return vm.console.expect("END", PATIENCE).rpartition("END")[0].strip()


def bring_online(vm: Machine, cpu: int) -> None:
    """When the kernel has found the CPU. It numbers them as they come first."""
    online = f"{CPUS}/cpu{cpu}/online"
    said(vm, f"until [ -e {online} ]; do sleep 0.05; done; echo 1 > {online}")


def worked(vm: Machine, cpu: int) -> str:
    """Where a checksum of 8 MiB was made (field 39 of proc(5), /proc/pid/stat), and that."""
    sum_up = "dd if=/dev/zero bs=1M count=8 2>/dev/null | md5sum | cut -c1-8"
    work = f"cut -d' ' -f39 /proc/self/stat; {sum_up}"
    return said(vm, f'taskset -c {cpu} sh -c "{work}"')


def test_cpus_come_work_and_go_and_are_saved(debian_guest: CachedGuest, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with Machine(engine="bt", cpus="1,max=4") as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        said(vm, "dmesg -n 1")
        assert said(vm, f"cat {CPUS}/possible {CPUS}/present; nproc").split() == ["0-3", "0", "1"]
        for number in (1, 2):
            assert vm.plug_vcpu() == number
            bring_online(vm, number)
            assert worked(vm, number).split() == [str(number), "96995b58"]
        assert said(vm, f"cat {CPUS}/present; nproc").split() == ["0-2", "3"]

        # One goes by itself, the other is offline before it goes.
        vm.unplug_vcpu(1, timeout=PATIENCE)
        assert said(vm, f"cat {CPUS}/present; nproc").split() == ["0,2", "2"]
        said(vm, f"echo 0 > {CPUS}/cpu2/online")
        vm.save(saved)
        vm.unplug_vcpu(2, timeout=PATIENCE)
        assert said(vm, f"cat {CPUS}/present; nproc").split() == ["0", "1"]
        assert [vcpu.number for vcpu in vm.vcpus] == [0]

        assert vm.plug_vcpu(3) == 3
        bring_online(vm, 3)
        assert worked(vm, 3).split() == ["3", "96995b58"]
        assert said(vm, "grep '^apicid' /proc/cpuinfo").split()[2::3] == ["0", "3"]
        assert said(vm, f"dmesg | grep -E '{COMPLAINTS}'") == ""
        vm.console.send("poweroff\n")
        assert vm.wait(PATIENCE).reason is StopReason.POWERED_OFF

    with Machine.restore(saved) as vm:
        vm.start()
        vm.console.send("\n")
        vm.console.expect(PROMPT, PATIENCE)
        assert [vcpu.number for vcpu in vm.vcpus] == [0, 2]
        bring_online(vm, 2)
        assert worked(vm, 2).split() == ["2", "96995b58"]
        assert vm.plug_vcpu() == 1
        bring_online(vm, 1)
        assert worked(vm, 1).split() == ["1", "96995b58"]
        vm.unplug_vcpu(2, timeout=PATIENCE)
        assert said(vm, f"cat {CPUS}/present; nproc").split() == ["0-1", "2"]
        assert said(vm, f"dmesg | grep -E '{COMPLAINTS}'") == ""


def test_a_reset_keeps_cpus_which_then_are_there_from_the_start(
    debian_guest: CachedGuest,
) -> None:
    with Machine(engine="bt", cpus="1,max=4", on_reset="restart") as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        vm.plug_vcpu(2)
        bring_online(vm, 1)
        vm.console.send("reboot -f\n")
        vm.console.expect("reboot", PATIENCE)
        vm.console.expect(PROMPT, PATIENCE)
        while vm.resets == 0:
            time.sleep(0.05)
        assert said(vm, "nproc") == "2"
        assert [vcpu.number for vcpu in vm.vcpus] == [0, 2]
        vm.unplug_vcpu(2, timeout=PATIENCE)
        assert said(vm, "nproc") == "1"


def test_load_while_cpus_come_and_go(debian_guest: CachedGuest) -> None:
    """Work that keeps every CPU busy is moved from one that goes."""
    with Machine(engine="bt", cpus="2,max=4") as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        said(vm, "dmesg -n 1; for i in 1 2 3 4; do (while :; do :; done) & done")
        for _ in range(5):
            for number in (2, 3):
                vm.plug_vcpu(number)
                bring_online(vm, number)
            assert said(vm, "nproc") == "4"
            for number in (1, 3, 2):
                vm.unplug_vcpu(number, timeout=PATIENCE)
            assert said(vm, "nproc") == "1"
            vm.plug_vcpu(1)
            bring_online(vm, 1)
        assert said(vm, f"dmesg | grep -E '{COMPLAINTS}'") == ""
