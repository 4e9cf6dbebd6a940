"""Linux with several CPUs on engine bt: they start, run apart, go off and come back."""

from __future__ import annotations

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
