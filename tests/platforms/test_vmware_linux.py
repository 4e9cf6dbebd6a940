"""Linux and open-vm-tools find VMware."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from tests.platforms.linux import PATIENCE, PROMPT, lives_again, said
from tests.userland.debian import DebianRoot

from tetrarch import Machine, MachineStateError
from tetrarch.images import CachedGuest


def test_linux_says_that_it_is_on_vmware(debian_guest: CachedGuest, tmp_path: Path) -> None:
    saved, vsock = tmp_path / "saved", tmp_path / "vsock"
    with Machine(engine="bt", platform="vmware", cpus=2, vsock=vsock) as vm:
        vm.start()
        vm.console.expect(PROMPT, PATIENCE)
        log = said(vm, "dmesg")
        for line in (
            "Hypervisor detected: VMware",
            "vmware: hypercall mode: 0x02",
            "DMI: VMware, Inc. VMware Virtual Platform",
            "Booting paravirtualized kernel on VMware hypervisor",
        ):
            assert line in log
        if Path("/proc/thread-self/schedstat").exists():
            assert all(f"vmware-stealtime: cpu {number}, pa" in log for number in (0, 1))
        mhz = re.search(r"vmware: TSC freq read from hypervisor : (\d+\.\d+) MHz", log)
        assert mhz is not None
        assert said(vm, "grep -c x2apic /proc/cpuinfo") == "2"
        dmi = said(vm, "cd /sys/class/dmi/id; cat sys_vendor product_serial product_uuid")
        vendor, serial, uuid = dmi.split("\r\n")
        assert vendor == "VMware, Inc."
        assert serial.replace(" ", "").removeprefix("VMware-").replace("-", "") == uuid.replace(
            "-", ""
        )
        clock = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
        assert said(vm, clock) == "tsc"
        # Commands come by VMCI's queue pairs.
        data = bytes(range(256)) * 2000
        assert vm.exec(["cat"], data).stdout == data
        assert "vmw_vsock_vmci_transport" in said(vm, "lsmod")
        vm.guestinfo["kept"] = "yes"
        vm.save(saved)
    with Machine.restore(saved, vsock=vsock) as vm:
        vm.start()
        assert vm.config.platform == "vmware"
        assert dict(vm.guestinfo) == {"kept": "yes"}
        assert said(vm, "cat /sys/class/dmi/id/product_uuid") == uuid
        assert vm.exec(["cat"], data).stdout == data
        before, begun = float(said(vm, "cut -d' ' -f1 /proc/uptime")), time.monotonic()
        after = float(said(vm, "sleep 2; cut -d' ' -f1 /proc/uptime"))
        assert after - before == pytest.approx(time.monotonic() - begun, abs=0.5)


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/thread-self/schedstat").exists(), reason="the host tells of no waiting threads"
)
def test_guest_sees_time_that_a_busy_host_has_stolen(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    def stolen(vm: Machine) -> int:
        """In ticks of 10 ms, of all vCPUs."""
        return int(said(vm, "head -n 1 /proc/stat").split()[8])

    def steals(vm: Machine) -> None:
        """Until a tenth of a second more was."""
        before, end = stolen(vm), time.monotonic() + PATIENCE
        while stolen(vm) < before + 10:
            assert time.monotonic() < end
            said(vm, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")

    saved = tmp_path / "saved"
    processors = os.sched_getaffinity(0)
    busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in 2 * list(processors)]
    try:
        with Machine(engine="bt", platform="vmware", cpus=2) as vm:
            vm.start()
            vm.console.expect(PROMPT, PATIENCE)
            steals(vm)
            # A vCPU takes its clock away, and has it again.
            said(vm, "cd /sys/devices/system/cpu/cpu1; echo 0 >online; echo 1 >online")
            assert said(vm, "dmesg | grep -c 'stealtime: cpu 1'") == "2"
            steals(vm)
            vm.save(saved)
        with Machine.restore(saved) as vm:
            vm.start()
            steals(vm)
            # What time there was between is nobody's.
            total = sum(map(int, said(vm, "head -n 1 /proc/stat").split()[1:9]))
            assert stolen(vm) < total
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_recorded_guest_lives_again_on_its_platform(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    assert lives_again("vmware", tmp_path / "recording")


def test_another_platform_has_neither_variables_nor_tools(debian_guest: CachedGuest) -> None:
    with Machine(engine="bt") as vm:
        with pytest.raises(MachineStateError, match="pc, has nothing of VMware's; make it with"):
            vm.guestinfo["x"] = "y"
        with pytest.raises(MachineStateError, match="nothing of VMware's"):
            _ = vm.tools


class Small:
    """A guest with Debian's open-vm-tools, without systemd."""

    def __init__(self, vm: Machine) -> None:
        self.vm = vm

    @classmethod
    def started(cls, kernel: CachedGuest) -> Self:
        root = DebianRoot(("busybox-static", "open-vm-tools", "coreutils", "dash"))
        root.build()
        vm = Machine(
            kernel=kernel.kernel,
            initrd=root.initrd,
            append="console=ttyS0 quiet reboot=t panic=-1",
            memory="1G",
            engine="bt",
            platform="vmware",
        )
        vm.start()
        vm.console.expect("=== ready\r\n", PATIENCE)
        return cls(vm)

    def run(self, command: str) -> str:
        self.vm.console.send(f"x {command}\n")
        self.vm.console.expect("=== begin x\r\n", PATIENCE)
        output = self.vm.console.expect(re.compile(r"=== end x (\d+)\r\n"), PATIENCE)
        return output.rpartition("=== end x ")[0].replace("\r\n", "\n")


@pytest.fixture(scope="module")
def tools(debian_guest: CachedGuest) -> Iterator[Small]:
    small = Small.started(debian_guest)
    yield small
    small.vm.kill()


def test_programs_of_open_vm_tools_work(tools: Small) -> None:
    assert "good" in tools.run("vmware-checkvm")
    tools.vm.guestinfo["x"] = "from the host"
    assert tools.run("vmware-rpctool 'info-get guestinfo.x'") == "from the host\n"
    tools.run("vmware-rpctool 'info-set guestinfo.y from the guest'")
    assert tools.vm.guestinfo["y"] == "from the guest"
    # A long one is moved in strings, and not four bytes at a time.
    before = tools.vm.stats()["exits"]["port_with_registers"]
    tools.vm.guestinfo["long"] = "0123456789abcdef" * 3000
    length, done = tools.run(
        "x=$(vmware-rpctool 'info-get guestinfo.long'); echo ${#x}; "
        'vmware-rpctool "info-set guestinfo.back $x" >/dev/null && echo set'
    ).split()
    assert (length, done) == ("48000", "set")
    assert tools.vm.guestinfo["back"] == tools.vm.guestinfo["long"]
    assert tools.vm.stats()["exits"]["port_with_registers"] < before + 500
    assert "Unknown command" in tools.run("vmware-rpctool 'no.such.thing'")
    mhz = re.search(r"(\d+) MHz", tools.run("vmware-toolbox-cmd stat speed"))
    assert mhz is not None
    assert int(mhz[1]) == tools.vm._vm.tsc_hz() // 1_000_000  # type: ignore[attr-defined]
    assert re.search(r"\d\d:\d\d:\d\d", tools.run("vmware-toolbox-cmd stat hosttime"))
    vmware = tools.vm._platform.vmware
    assert vmware is not None
    assert f"0x{vmware.guestlib.session:x}\n" in tools.run("vmware-toolbox-cmd stat sessionid")
    assert "0 MB" in tools.run("vmware-toolbox-cmd stat balloon")


def test_service_of_open_vm_tools_comes_and_is_asked(tools: Small, tmp_path: Path) -> None:
    tools.run("vmtoolsd -b /tmp/pid >/tmp/log 2>&1; sleep 1")
    deadline = time.monotonic() + PATIENCE
    while not tools.vm.tools.status.version:
        assert time.monotonic() < deadline, tools.run("cat /tmp/log")
        time.sleep(0.2)
    status = tools.vm.tools.status
    assert status.running
    assert status.capabilities
    said = re.search(r"(\d+)\.(\d+)\.(\d+)", tools.run("vmware-toolbox-cmd -v"))
    assert said is not None
    major, minor, update = map(int, said.groups())
    assert status.version == str(major * 1024 + minor * 32 + update)
    # The clock goes back to the host's.
    tools.run("date -s '2001-01-01'")
    tools.vm.tools.synchronize_time()
    assert abs(int(tools.run("date +%s")) - time.time()) < 5
    # So does the guest have it done, once a minute and at once; a clock that is late is set as the
    # machine goes on, too.
    assert "Disabled" in tools.run("vmware-toolbox-cmd timesync status")
    tools.run("date -s '2001-01-01'")
    assert "Enabled" in tools.run("vmware-toolbox-cmd timesync enable")
    assert tools.vm.tools.status.keeps_time
    assert "Enabled" in tools.run("vmware-toolbox-cmd timesync status")
    until_right(tools)
    assert "Disabled" in tools.run("vmware-toolbox-cmd timesync disable")
    tools.run("date -s '2001-01-01'")
    tools.vm.pause()
    tools.vm.resume()
    until_right(tools)
    # So it is where the machine goes on in another process: its tools come by themselves.
    tools.run("date -s '2001-01-01'")
    tools.vm.save(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as restored:
        restored.start()
        until_right(Small(restored))
        assert restored.tools.status.version == status.version


def until_right(tools: Small) -> None:
    """The guest's clock is set to the host's."""
    deadline = time.monotonic() + PATIENCE
    while abs(int(tools.run("date +%s")) - time.time()) > 5:
        assert time.monotonic() < deadline
        time.sleep(0.2)
