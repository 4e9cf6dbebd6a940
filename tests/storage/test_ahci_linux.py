"""Linux uses disks and CDs at an AHCI controller by its own drivers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from tests.nodes import can_be_opened
from tests.storage.iso import make_iso
from tests.storage.linux import Linux, check, ext4, needs_ext4, sha256_in

from tetrarch import Machine, block
from tetrarch.images import CachedGuest

pytestmark = [needs_ext4, pytest.mark.long]


def test_file_system_is_mounted_written_trimmed_and_clean(
    standard_guest: CachedGuest, tmp_path: Path
) -> None:
    path = ext4(tmp_path / "disk.img")
    data = os.urandom(3 << 20)
    machine = Machine(
        engine="bt",
        kernel=standard_guest.kernel,
        initrd=standard_guest.initrd,
        disk=f"{path},bus=ahci",
        cdrom=make_iso(tmp_path / "disc.iso", "DATA.BIN", data),
    )
    with machine:
        linux = Linux(machine)
        linux.ask(f"until {can_be_opened('sda')}; do sleep 0.1; done")
        assert "Tetrarch" in linux.ask("cat /sys/block/sda/device/model")
        assert "32" in linux.ask("cat /sys/block/sda/device/queue_depth")
        linux.ask("mount -t ext4 /dev/sda /mnt")
        linux.ask("dd if=/dev/urandom of=/mnt/data bs=64k count=300 && sync")
        written = linux.sha256("/mnt/data")
        linux.ask("cp /mnt/data /mnt/more && sync && rm /mnt/more && sync")
        allocated = block.info(path)["allocated"]
        linux.ask("fstrim -v /mnt && umount /mnt")
        assert block.info(path)["allocated"] < allocated - (10 << 20)

        linux.ask(f"until {can_be_opened('sr0')}; do sleep 0.1; done")
        linux.ask("mount -t iso9660 -o ro /dev/sr0 /mnt")
        assert linux.sha256("/mnt/data.bin") == hashlib.sha256(data).hexdigest()
        linux.ask("umount /mnt")
        complaints = linux.ask("dmesg | grep -E 'ata[0-9.]+:.*(error|exception|fail)' || true")
        assert "ata1" not in complaints, complaints
    check(path)
    assert sha256_in(path, "/data") == written


def test_saved_machine_goes_on_with_its_disk(standard_guest: CachedGuest, tmp_path: Path) -> None:
    path, saved = ext4(tmp_path / "disk.img"), tmp_path / "machine.saved"
    iso = make_iso(tmp_path / "disc.iso", "DATA.TXT", b"on the disc")
    machine = Machine(
        engine="bt",
        kernel=standard_guest.kernel,
        initrd=standard_guest.initrd,
        disk=f"{path},bus=ahci",
        cdrom=iso,
        memory="256M",
    )
    with machine:
        linux = Linux(machine)
        linux.ask(f"until {can_be_opened('sda')}; do sleep 0.1; done")
        linux.ask("mount -t ext4 /dev/sda /mnt")
        machine.console.send(
            "while :; do dd if=/dev/zero of=/mnt/x bs=64k count=50; sync; done &\n"
        )
        machine.console.expect("records out", 60)
        for _ in range(10):
            with machine.paused():
                pass
        machine.pause()  # its disk is not to change any more
        machine.save(saved)
    restored = Machine.restore(saved, disk=f"{path},bus=ahci", cdrom=iso)
    with restored:
        restored.start()
        restored.console.send("kill %1; wait; echo kept > /mnt/y; umount /mnt; echo do''ne $?\n")
        restored.console.expect("done 0", 120)
        restored.console.send(
            "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/data.txt; echo fi''nished\n"
        )
        assert "on the disc" in restored.console.expect("finished", 60)
    check(path)
