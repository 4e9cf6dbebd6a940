"""Disks, the network card and shares on the engine kvm, on a KVM that works: in QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, nested_host
from tests.programs import initrd_with

from tetrarch import images

# About three minutes on two idle CPUs.
BOOT_LIMIT_S = 1800

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + BOOT_LIMIT_S)]


def test_fio_finds_what_it_wrote_to_every_disk_beside_a_busy_network_and_shares_are_copied(
    tmp_path: Path,
) -> None:
    # Debian's kernel for machines has drivers of all of them.
    guest = images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
    programs = {
        "vmlinuz": guest.kernel,
        "initrd": initrd_with(guest, ["fio"], tmp_path),
        "devices_on_kvm.py": Path(__file__).with_name("devices_on_kvm.py"),
    }
    # virtiofsd changes its root, which it cannot where the root is the initramfs itself
    # (Documentation/filesystems/ramfs-rootfs-initramfs.rst).
    commands = (
        "mkdir /root-of-a-mount && busybox mount --rbind / /root-of-a-mount\n"
        f"timeout {BOOT_LIMIT_S - 600} busybox chroot /root-of-a-mount "
        "python3 /suite/devices_on_kvm.py"
    )
    host = nested_host(tmp_path, "qemu-system-common")
    console = host.boot(commands, BOOT_LIMIT_S, programs, drivers=["tun"])
    for line in (
        "every disk has what fio wrote",
        "the network has carried both ways",
        "the shares have the same files",
        "the guest has powered off",
    ):
        assert f"outer: {line}\n" in console, console
