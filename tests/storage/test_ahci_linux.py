"""Linux uses disks and CDs at an AHCI controller by its own drivers."""

from __future__ import annotations

import hashlib
import os
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

from tetrarch import Machine
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
        written = fill_and_trim(linux, "sda", path)

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
        save_busy(linux, "sda", saved)
    restored = Machine.restore(saved, disk=f"{path},bus=ahci", cdrom=iso)
    with restored:
        go_on_and_unmount(restored)
        restored.console.send(
            "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/data.txt; echo fi''nished\n"
        )
        assert "on the disc" in restored.console.expect("finished", 60)
    check(path)
