"""Linux uses PVSCSI disks by VMware's own driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.nodes import can_be_opened
from tests.storage.iso import make_iso
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
from tetrarch.storage import PvscsiController, ScsiDrive

pytestmark = needs_ext4


def test_file_system_is_mounted_written_trimmed_and_clean(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    path, second = ext4(tmp_path / "disk.img"), tmp_path / "second.qcow2"
    block.create(second, 64 << 20)
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=[f"{path},bus=pvscsi", f"{second},bus=pvscsi,readonly"],
        cdrom=f"{make_iso(tmp_path / 'disc.iso', 'FILE.TXT', b'on the disc')},bus=pvscsi",
    )
    with machine:
        linux = Linux(machine)
        linux.ask(f"until {can_be_opened('sr0')}; do sleep 0.1; done")
        assert "disk0" in linux.ask("cat /sys/block/sda/device/vpd_pg80")
        assert "write back" in linux.ask("cat /sys/block/sda/queue/write_cache")
        linux.ask("[ $(cat /sys/block/sda/ro) = 0 ] && [ $(cat /sys/block/sdb/ro) = 1 ]")
        linux.ask("mount -t iso9660 /dev/sr0 /mnt && cat /mnt/*")
        linux.ask("umount /mnt")
        written = fill_and_trim(linux, "sda", path)
        assert "vmw_pvscsi: using MSI-X" in linux.ask("dmesg | grep pvscsi")
        complaints = linux.ask(
            "dmesg | grep -iE 's[dr] 0:.*(error|abort|timeout|fail|illegal|add. sense)' || true"
        )
        assert "0:0:" not in complaints, complaints
    check(path)
    assert sha256_in(path, "/data") == written


@pytest.mark.parametrize("interrupt", ["msi", "intx"])
def test_other_interrupts_serve_too(
    debian_guest: CachedGuest, tmp_path: Path, interrupt: str
) -> None:
    path = ext4(tmp_path / "disk.img")
    less = " vmw_pvscsi.disable_msi=1" if interrupt == "intx" else ""
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=f"{path},bus=pvscsi",
        append_extra=f"vmw_pvscsi.disable_msix=1{less}",
    )
    with machine:
        linux = Linux(machine)
        kind = linux.ask("dmesg | grep 'vmw_pvscsi: using'")
        assert f"using {interrupt.upper().replace('INTX', 'INTx')}" in kind
        linux.ask("mount -t ext4 /dev/sda /mnt")
        linux.ask("dd if=/dev/urandom of=/mnt/data bs=64k count=100 && sync")
        written = linux.sha256("/mnt/data")
        linux.ask("umount /mnt")
    check(path)
    assert sha256_in(path, "/data") == written


def test_saved_machine_goes_on_with_its_disk(debian_guest: CachedGuest, tmp_path: Path) -> None:
    path, saved = ext4(tmp_path / "disk.img"), tmp_path / "machine.saved"
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=f"{path},bus=pvscsi",
        memory="256M",
    )
    with machine:
        save_busy(Linux(machine), "sda", saved)
    restored = Machine.restore(saved, disk=f"{path},bus=pvscsi")
    with restored:
        go_on_and_unmount(restored)
    check(path)


def test_controller_and_disks_come_and_go_while_linux_runs(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    path, second = ext4(tmp_path / "disk.img"), ext4(tmp_path / "second.img")
    with Machine(engine="bt", kernel=debian_guest.kernel, initrd=debian_guest.initrd) as vm:
        linux = Linux(vm)
        assert isinstance(vm.engine_vm, Vm)
        first = ScsiDrive("first", block.open_disk(block.DiskSpec(path)))
        controller = PvscsiController(vm.engine_vm, [first], name="scratch")
        vm.attach_pci(controller, name="scratch")
        linux.ask(f"until {can_be_opened('sda')}; do sleep 0.1; done")
        linux.ask("mount -t ext4 /dev/sda /mnt && echo here > /mnt/data && umount /mnt")
        # Its driver hears of a disk that comes, and of one that is to go.
        other = ScsiDrive("second", block.open_disk(block.DiskSpec(second)))
        target = controller.attach(other)
        linux.ask(f"until {can_be_opened('sdb')}; do sleep 0.1; done")
        linux.ask("mount -t ext4 /dev/sdb /mnt && echo there > /mnt/data && umount /mnt")
        controller.detach(target)
        linux.ask("[ ! -e /dev/sdb ]")
        check(second)
        vm.detach("scratch")
        linux.ask("[ ! -e /dev/sda ]")
        block.open_disk(block.DiskSpec(path))
    check(path)
