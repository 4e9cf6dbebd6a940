"""CPUs of a machine in the background, by its command and from Python; the machine is jailed."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
from tests.machine import guests
from tests.remote.conftest import LIMIT_S, tetrarch_cli

import tetrarch
from tetrarch.control.client import ControlError
from tetrarch.errors import HostError, MachineStateError
from tetrarch.remote import RemoteMachine
from tetrarch.testing import pvh_kernel


def says(vm: RemoteMachine, typed: str) -> str:
    vm.console.send(typed)
    return vm.console.expect(re.compile("[@-O1-9]"), LIMIT_S)[-1]


def test_cpus_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.watch_cpu_1()))
    options = ("--engine", "bt", "--cpus", "1,max=3", "--kernel", kernel)
    started = tetrarch_cli("run", "--detach", "--name", "cpus", *options)
    assert started.returncode == 0, started.stderr
    vm = tetrarch.connect("cpus")
    try:
        assert tetrarch_cli("attach-cpu", "cpus").stdout == b"cpu1\n"
        assert says(vm, "s") == "1"
        assert vm.plug_vcpu(2) == 2
        assert [vcpu.number for vcpu in vm.vcpus] == [0, 1, 2]
        assert vm.vcpus[2].regs.rip is not None
        (row,) = json.loads(tetrarch_cli("ps", "--json").stdout)
        assert row["cpus"] == 3
        refused = tetrarch_cli("attach-cpu", "cpus")
        assert (refused.returncode, refused.stdout) == (1, b"")
        assert refused.stderr.startswith(b"tetrarch: all 3 CPUs that the machine can have are in")
        for number in (7, -1):
            with pytest.raises(MachineStateError, match=f"can have no CPU {number}: they are 0 to"):
                vm.plug_vcpu(number)
        with pytest.raises(HostError, match=r"the guest has not given cpu2 up within 0.1 s"):
            vm.unplug_vcpu(2, timeout=0.1)
        with pytest.raises(ControlError, match="CPU 0 stays in its machine"):
            vm.unplug_vcpu(0)
        with pytest.raises(MachineStateError, match="there is no CPU 7 in the machine"):
            vm.unplug_vcpu(7)
        taken = threading.Thread(target=tetrarch_cli, args=("detach", "cpus", "cpu1"))
        taken.start()
        while says(vm, "r") not in "EG":  # it is to be given up
            pass
        vm.console.send("8")
        taken.join(LIMIT_S)
        assert [vcpu.number for vcpu in vm.vcpus] == [0, 2]
    finally:
        vm.kill()
