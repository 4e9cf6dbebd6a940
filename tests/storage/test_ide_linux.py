"""Linux uses disks and CDs at an IDE controller by its own drivers."""

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
    go_on_and_unmount,
    needs_ext4,
    save_busy,
    sha256_in,
)

from tetrarch import Machine, block
from tetrarch.images import CachedGuest

pytestmark = needs_ext4

READY = f"until {can_be_opened('sda')}; do sleep 0.1; done"


@pytest.mark.parametrize("dma", [True, False])
def test_file_system_is_mounted_written_trimmed_and_clean(
    debian_guest: CachedGuest, tmp_path: Path, dma: bool
) -> None:
    path = ext4(tmp_path / "disk.img")
    data = os.urandom((3 << 20) if dma else (64 << 10))
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        append_extra="" if dma else "libata.dma=0",
        disk=f"{path},bus=ide",
        cdrom=f"{make_iso(tmp_path / 'disc.iso', 'DATA.BIN', data)},bus=ide",
    )
    with machine:
        linux = Linux(machine)
        linux.ask(READY)
        assert "Tetrarch" in linux.ask("cat /sys/block/sda/device/model")
        modes = linux.ask("cat /sys/class/ata_device/dev1.*/xfer_mode")
        assert modes.count("XFER_MW_DMA" if dma else "XFER_PIO") == 2, modes
        linux.ask("mount -t ext4 /dev/sda /mnt")
        blocks = 300 if dma else 8
        linux.ask(f"dd if=/dev/urandom of=/mnt/data bs=64k count={blocks} && sync")
        written = linux.sha256("/mnt/data")
        if dma:
            linux.ask("cp /mnt/data /mnt/more && sync && rm /mnt/more && sync")
            allocated = block.info(path)["allocated"]
            linux.ask("fstrim -v /mnt")
            assert block.info(path)["allocated"] < allocated - (10 << 20)
        linux.ask("umount /mnt")
        linux.ask(f"until {can_be_opened('sr0')}; do sleep 0.1; done")
        linux.ask("mount -t iso9660 -o ro /dev/sr0 /mnt")
        assert linux.sha256("/mnt/data.bin") == hashlib.sha256(data).hexdigest()
        linux.ask("umount /mnt")
        complaints = linux.ask("dmesg | grep -E 'ata[0-9.]+:.*(error|exception|fail)' || true")
        assert "ata1" not in complaints, complaints
    check(path)
    assert sha256_in(path, "/data") == written


def test_saved_machine_goes_on_with_its_disk(debian_guest: CachedGuest, tmp_path: Path) -> None:
    path, saved = ext4(tmp_path / "disk.img"), tmp_path / "machine.saved"
    iso = make_iso(tmp_path / "disc.iso", "DATA.TXT", b"on the disc")
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=f"{path},bus=ide",
        cdrom=f"{iso},bus=ide",
        memory="256M",
    )
    with machine:
        linux = Linux(machine)
        linux.ask(READY)
        save_busy(linux, "sda", saved)
    restored = Machine.restore(saved, disk=f"{path},bus=ide", cdrom=f"{iso},bus=ide")
    with restored:
        go_on_and_unmount(restored)
        restored.console.send(
            "mount -t iso9660 /dev/sr0 /mnt; cat /mnt/data.txt; echo fi''nished\n"
        )
        assert "on the disc" in restored.console.expect("finished", 60)
    check(path)
