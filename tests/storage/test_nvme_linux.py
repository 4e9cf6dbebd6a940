"""Linux uses NVMe disks by its own driver."""

from __future__ import annotations

from pathlib import Path

from tests.nodes import can_be_opened
from tests.storage.linux import (
    Linux,
    check,
    ext4,
    fill_and_trim,
    go_on_and_unmount,
    needs_ext4,
    save_busy,
    sha256_in,
)

from tetrarch import Machine, block
from tetrarch._native import Vm
from tetrarch.images import CachedGuest
from tetrarch.storage import NvmeController

pytestmark = needs_ext4


def test_file_system_is_mounted_written_trimmed_and_clean(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    path = ext4(tmp_path / "disk.img")
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=f"{path},bus=nvme",
    )
    with machine:
        linux = Linux(machine)
        assert "disk0" in linux.ask("cat /sys/block/nvme0n1/device/serial")
        assert "Tetrarch" in linux.ask("cat /sys/block/nvme0n1/device/model")
        written = fill_and_trim(linux, "nvme0n1", path)
        complaints = linux.ask("dmesg | grep -iE 'nvme.*(error|timeout|invalid|fail)' || true")
        assert "nvme nvme0" not in complaints, complaints
    check(path)
    assert sha256_in(path, "/data") == written


def test_saved_machine_goes_on_with_its_disk(debian_guest: CachedGuest, tmp_path: Path) -> None:
    path, saved = ext4(tmp_path / "disk.img"), tmp_path / "machine.saved"
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=f"{path},bus=nvme",
        memory="256M",
    )
    with machine:
        save_busy(Linux(machine), "nvme0n1", saved)
    restored = Machine.restore(saved, disk=f"{path},bus=nvme")
    with restored:
        go_on_and_unmount(restored)
    check(path)


def test_disk_is_plugged_in_and_out_while_linux_runs(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    path = ext4(tmp_path / "disk.img")
    with Machine(engine="bt", kernel=debian_guest.kernel, initrd=debian_guest.initrd) as vm:
        linux = Linux(vm)
        linux.ask("modprobe nvme")
        assert isinstance(vm.engine_vm, Vm)
        disk = NvmeController(vm.engine_vm, block.open_disk(block.DiskSpec(path)), name="scratch")
        vm.attach_pci(disk, name="scratch")
        linux.ask(f"until {can_be_opened('nvme0n1')}; do sleep 0.1; done")
        linux.ask("mount -t ext4 /dev/nvme0n1 /mnt && echo here > /mnt/data && umount /mnt")
        # A larger disk is seen at once.
        disk.resize(2 * block.info(path)["size"])
        linux.ask("until [ $(cat /sys/block/nvme0n1/size) = 393216 ]; do sleep 0.1; done")
        vm.detach("scratch")
        linux.ask("[ ! -e /dev/nvme0n1 ]")
        block.open_disk(block.DiskSpec(path))
    check(path)
