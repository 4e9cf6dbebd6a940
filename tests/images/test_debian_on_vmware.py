"""A Debian with VMware's drivers and tools, on VMware's disk controller, card and screen; then the
same disk as a machine of the usual devices."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tetrarch import Machine, MachineConfig
from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DiskStore
from tetrarch.machine.guest import with_installed_disk
from tetrarch.net import NetSpec

LIMIT_S = 900
# VMCI is not there beside the vsock device, by which the test asks.
DRIVERS = ("vmw_pvscsi", "vmxnet3", "vmwgfx", "vmw_balloon")
PROGRAMS = ("linux-image-amd64", "open-vm-tools", "fio")
FIO = (
    "fio --name=all --filename=/root/fio --size=64M --rw=randwrite --bsrange=4k-64k --direct=1 "
    "--ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 --verify_fatal=1 "
    "--output-format=terse --minimal"
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(6 * LIMIT_S)]


@pytest.fixture
def disk(tmp_path: Path, disk_programs: None, monkeypatch: pytest.MonkeyPatch) -> MachineConfig:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    recipe = DebianRecipe("web", 3 << 30, "box", packages=PROGRAMS)
    build_debian_disk(recipe, DiskStore(), Reporter())
    return with_installed_disk(
        MachineConfig(engine="bt", image="web", memory=1024, vsock=tmp_path / "vsock")
    )


def ask(vm: Machine, command: str) -> str:
    """What a command of the guest's says, once its agent is there."""
    done = vm.exec(["sh", "-c", command], timeout=LIMIT_S)
    assert done.code == 0, done
    return done.stdout.decode()


def test_debian_runs_on_vmware_and_its_disk_elsewhere(disk: MachineConfig) -> None:
    (root,) = disk.disk
    vmware = disk.model_copy(
        update={
            "platform": "vmware",
            "disk": (replace(root, bus="pvscsi"),),
            "net": (NetSpec.parse("user,model=vmxnet3"),),
            "vga": True,
        }
    )
    with Machine(vmware) as vm:
        vm.start()
        vm.console.expect("\nbox login: ", LIMIT_S)
        assert ask(vm, "systemctl is-system-running --wait || systemctl --failed") == "running\n"
        assert ask(vm, "systemd-detect-virt") == "vmware\n"
        bound = ask(vm, "lsmod; dmesg")
        for driver in DRIVERS:
            assert driver in bound, driver
        for driver in DRIVERS[:3]:
            assert ask(vm, f"ls /sys/bus/pci/drivers/{driver} | grep 0000:"), driver
        assert ask(vm, "findmnt --noheadings --output SOURCE /").startswith("/dev/sd")
        ask(vm, FIO)
        # The tools' service comes by itself.
        assert ask(vm, "systemctl is-active open-vm-tools") == "active\n"
        assert re.search(r"\d+ MHz", ask(vm, "vmware-toolbox-cmd stat speed"))
        vm.guestinfo["x"] = "y"
        assert ask(vm, "vmware-rpctool 'info-get guestinfo.x'") == "y\n"
        deadline = time.monotonic() + LIMIT_S
        while not vm.tools.status.running:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        vm.tools.halt()
        assert vm.wait(LIMIT_S).ok
    with Machine(disk.model_copy(update={"net": (NetSpec.parse("user"),)})) as vm:
        vm.start()
        vm.console.expect("\nbox login: ", LIMIT_S)
        assert ask(vm, "systemctl is-system-running --wait || systemctl --failed") == "running\n"
        assert ask(vm, "findmnt --noheadings --output SOURCE /").startswith("/dev/vd")
        assert ask(vm, "systemd-detect-virt") != "vmware\n"
        vm.kill()
