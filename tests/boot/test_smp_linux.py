"""Linux with several CPUs on engine bt: they start, run apart, go off and come back."""

from __future__ import annotations

import os
import re

import pytest

from tetrarch import Machine, StopReason
from tetrarch.images import CachedGuest

PROMPT = "root@tetrarch"
PATIENCE = 300.0
COMPLAINTS = r"soft lockup|hard LOCKUP|rcu.*stall|BUG:|WARNING:|Oops|not responding"


def _said(vm: Machine, command: str) -> str:
    """What a command prints, between two marks that its echo does not have."""
    vm.console.send(f"echo BEG''IN; {command}; echo EN''D\n")
    vm.console.expect("BEGIN", PATIENCE)
    return vm.console.expect("END", PATIENCE).rpartition("END")[0].strip()


def _has_no_complaint(vm: Machine) -> None:
    assert _said(vm, f"dmesg | grep -E '{COMPLAINTS}'") == ""


@pytest.mark.parametrize("cpus", [2, pytest.param(16, marks=pytest.mark.long)])
def test_each_cpu_runs_and_can_go_and_come_back(debian_guest: CachedGuest, cpus: int) -> None:
    with Machine(engine="bt", cpus=cpus) as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        assert _said(vm, "nproc") == str(cpus)
        # Field 39 is the CPU that a task runs on (proc(5), /proc/pid/stat).
        where = "taskset -c $c cut -d' ' -f39 /proc/self/stat"
        everywhere = f"for c in $(seq 0 {cpus - 1}); do {where}; done"
        assert _said(vm, everywhere).split() == [str(cpu) for cpu in range(cpus)]
        online = "/sys/devices/system/cpu/cpu1/online"
        for _ in range(3):
            assert _said(vm, f"echo 0 > {online}; nproc") == str(cpus - 1)
            assert _said(vm, f"echo 1 > {online}; nproc") == str(cpus)
        assert _said(vm, f"c=1; {where}") == "1"
        ticks = [int(n) for n in re.findall(r"\d+", _said(vm, "grep LOC: /proc/interrupts"))]
        assert len(ticks) == cpus
        assert all(ticks), "a CPU without a timer"
        _has_no_complaint(vm)
        vm.console.send("poweroff\n")
        assert vm.wait(PATIENCE).reason is StopReason.POWERED_OFF


def test_linux_sees_the_topology_that_was_asked_for(debian_guest: CachedGuest) -> None:
    """Two sockets of three cores of two threads: IDs with gaps, which another CPU's IPI reaches."""
    with Machine(engine="bt", cpus="12,sockets=2,cores=3,threads=2") as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        # What the kernel says of a busy host does not belong to an answer.
        assert _said(vm, "dmesg -n 1; nproc") == "12"

        def each(file: str) -> list[str]:
            return _said(
                vm, f"cd /sys/devices/system/cpu; for c in $(seq 0 11); do cat cpu$c/{file}; done"
            ).split()

        assert each("topology/physical_package_id") == ["0"] * 6 + ["1"] * 6
        cores = [f"{first}-{first + 1}" for first in range(0, 12, 2)]
        assert each("topology/thread_siblings_list") == [cores[cpu // 2] for cpu in range(12)]
        packages = ["0-5", "6-11"]
        assert each("topology/package_cpus_list") == [packages[cpu // 6] for cpu in range(12)]
        ids = re.findall(r": (\d+)", _said(vm, "grep '^apicid' /proc/cpuinfo"))
        assert ids == [str(number) for number in (*range(6), *range(8, 14))]
        _has_no_complaint(vm)


# A guest that is disturbed, with others on the same host CPUs, may be late.
LATE = r"BUG: (?!soft)|Oops|general protection|double fault|Kernel panic|invalid opcode|corrupt"


def _boots_disturbed(seed: int, cpus: int) -> None:
    with Machine(engine="bt", cpus=cpus, chaos=seed) as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        assert _said(vm, "dmesg -n 1; nproc") == str(cpus)
        # Processes, pages and code come and go.
        work = "for n in $(seq 20); do ls -lR /sys/class | md5sum | cat; done | sort | uniq | wc -l"
        assert _said(vm, work) == "1"
        assert _said(vm, f"dmesg | grep -E '{LATE}'") == ""
        vm.console.send("poweroff\n")
        assert vm.wait(PATIENCE).reason is StopReason.POWERED_OFF
        assert vm.stats()["bt"]["tlb_flushes"] > 0


def test_a_disturbed_guest_boots(debian_guest: CachedGuest) -> None:
    _boots_disturbed(seed=1, cpus=2)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_disturbed_boots_with_four_cpus(debian_guest: CachedGuest) -> None:
    """As many as TETRARCH_CHAOS_BOOTS says, with the seeds from TETRARCH_CHAOS_SEED on."""
    first = int(os.environ.get("TETRARCH_CHAOS_SEED", "1"))
    for seed in range(first, first + int(os.environ.get("TETRARCH_CHAOS_BOOTS", "200"))):
        try:
            _boots_disturbed(seed, cpus=4)
        except Exception as error:
            error.add_note(f"with chaos={seed}")
            raise


@pytest.mark.long
def test_twenty_boots_with_four_cpus(debian_guest: CachedGuest) -> None:
    for _ in range(20):
        with Machine(engine="bt", cpus=4) as vm:
            vm.start()
            vm.console.expect(PROMPT, PATIENCE)
            assert _said(vm, "nproc") == "4"
            _has_no_complaint(vm)
            vm.console.send("poweroff\n")
            assert vm.wait(PATIENCE).reason is StopReason.POWERED_OFF
