"""A Debian with VMware's drivers and tools, on VMware's disk controller, card and screen; then the
same disk as a machine of the usual devices."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tetrarch import Machine, MachineConfig
from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DiskStore
from tetrarch.machine.guest import with_installed_disk
from tetrarch.net import NetSpec
from tetrarch.platforms.vmware import ToolsError

LIMIT_S = 900
DRIVERS = ("vmw_pvscsi", "vmxnet3", "vmwgfx", "vmw_vmci", "vmw_balloon")
PROGRAMS = ("linux-image-amd64", "open-vm-tools", "fio", "iperf3")
FIO = (
    "fio --name=all --filename=/root/fio --size=64M --rw=randwrite --bsrange=4k-64k --direct=1 "
    "--ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 --verify_fatal=1 "
    "--output-format=terse --minimal"
)
#: By passt the default route is the host itself.
GATEWAY = r"$(ip route | sed -n 's/^default via \([^ ]*\).*/\1/p')"
IPERF = f"iperf3 --json --time 3 --client {GATEWAY} --port"
#: VMCI is not there beside the vsock device, by which the test asks: what there is at a start
#: without one the guest says by itself.
SAYS_VMCI = """cat >/etc/systemd/system/says.service <<'END'
[Unit]
After=open-vm-tools.service
ConditionVirtualization=vmware
[Service]
Type=oneshot
ExecStart=sh -c 'vmware-rpctool "info-set guestinfo.vmci $$(ls /sys/bus/pci/drivers/vmw_vmci)"'
[Install]
WantedBy=multi-user.target
END
systemctl enable says.service"""

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


def iperf(vm: Machine, option: str) -> float:
    """Bytes that came over, by a server of the host's for one client."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        ["iperf3", "--server", "--one-off", "--bind", "127.0.0.1", "--port", port],
        stdout=subprocess.DEVNULL,
    )
    try:
        said = ask(vm, f"{IPERF} {port} {option}")
    finally:
        server.kill()
        server.wait()
    return float(json.loads(said)["end"]["sum_received"]["bytes"])


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def is_right(vm: Machine) -> bool:
    """The guest's clock."""
    return abs(int(ask(vm, "date +%s")) - time.time()) < 5


def halts(vm: Machine) -> bool:
    """Tools that have just come are at work with that."""
    try:
        vm.tools.halt()
    except ToolsError:
        return False
    return True


def test_debian_runs_on_vmware_and_its_disk_elsewhere(disk: MachineConfig) -> None:
    (root,) = disk.disk
    vmware = disk.model_copy(
        update={
            "platform": "vmware",
            "disk": (replace(root, bus="pvscsi"),),
            "net": (NetSpec.parse("user,model=vmxnet3"),),
            "vga": True,
            "input": ("ps2-keyboard", "ps2-mouse"),
        }
    )
    with Machine(vmware) as vm:
        vm.start()
        vm.console.expect("\nbox login: ", LIMIT_S)
        assert ask(vm, "systemctl is-system-running --wait || systemctl --failed") == "running\n"
        assert ask(vm, "systemd-detect-virt") == "vmware\n"
        bound = ask(vm, "lsmod; dmesg; cat /proc/bus/input/devices")
        assert "Hypervisor detected: VMware" in bound
        assert "VMware VMMouse" in bound
        for driver in DRIVERS:
            assert driver in bound, driver
        for driver in DRIVERS[:4]:
            assert ask(vm, f"ls /sys/bus/pci/drivers/{driver} | grep 0000:"), driver
        assert ask(vm, "findmnt --noheadings --output SOURCE /").startswith("/dev/sd")
        ask(vm, FIO)
        for option in ("", "--reverse"):
            assert iperf(vm, option) > 1 << 20
        # The tools' service comes by itself.
        assert ask(vm, "systemctl is-active open-vm-tools") == "active\n"
        assert re.search(r"\d+ MHz", ask(vm, "vmware-toolbox-cmd stat speed"))
        vm.guestinfo["x"] = "y"
        assert ask(vm, "vmware-rpctool 'info-get guestinfo.x'") == "y\n"
        until(lambda: vm.tools.status.running)
        # They come again and again, each time anew.
        ages = [vm.tools.status.heartbeat_s]

        def younger() -> bool:
            ages.append(vm.tools.status.heartbeat_s)
            return ages[-1] is not None and ages[-2] is not None and ages[-1] < ages[-2]

        until(younger)
        # The clock goes back to the host's when the tools are told to keep it.
        ask(vm, "timedatectl set-ntp false; date -s 2001-01-01")
        assert ask(vm, "vmware-toolbox-cmd timesync enable") == "Enabled\n"
        until(lambda: is_right(vm))
        ask(vm, "vmware-toolbox-cmd timesync disable; date -s 2001-01-01")
        vm.tools.synchronize_time()
        until(lambda: is_right(vm))
        ask(vm, SAYS_VMCI)
        vm.tools.halt()
        assert vm.wait(LIMIT_S).ok
    with Machine(vmware.model_copy(update={"vsock": None})) as vm:
        vm.start()
        until(lambda: "vmci" in vm.guestinfo)
        assert re.search(r"0000:[0-9a-f:.]+", vm.guestinfo["vmci"])
        until(lambda: halts(vm))
        assert vm.wait(LIMIT_S).ok
    with Machine(disk.model_copy(update={"net": (NetSpec.parse("user"),)})) as vm:
        vm.start()
        vm.console.expect("\nbox login: ", LIMIT_S)
        assert ask(vm, "systemctl is-system-running --wait || systemctl --failed") == "running\n"
        assert ask(vm, "findmnt --noheadings --output SOURCE /").startswith("/dev/vd")
        assert ask(vm, "systemd-detect-virt") != "vmware\n"
        vm.kill()
    xen = disk.model_copy(update={"platform": "xen", "net": (NetSpec.parse("user"),)})
    with Machine(xen) as vm:
        vm.start()
        vm.console.expect("\nbox login: ", LIMIT_S)
        assert ask(vm, "systemctl is-system-running --wait || systemctl --failed") == "running\n"
        assert ask(vm, "systemd-detect-virt; cat /sys/hypervisor/type") == "xen\nxen\n"
        assert ask(vm, "findmnt --noheadings --output SOURCE /").startswith("/dev/vd")
        vm.kill()
