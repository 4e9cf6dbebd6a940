"""Linux and a disk of qemu-storage-daemon, by vhost-user."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.virtio.driver import wait_until
from tests.virtio.test_blk_linux import ext4, shell

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.config import VirtioTransport

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None or shutil.which("mkfs.ext4") is None,
    reason="no qemu-storage-daemon or no mkfs.ext4: apt-get install qemu-system-common e2fsprogs",
)


@contextmanager
def served(image: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """The socket of a daemon that serves a raw image."""
    path = image.with_suffix(".sock")
    command = [
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,node-name=file,filename={image}"),
        *("--export", "type=vhost-user-blk,id=disk,node-name=file,writable=on,num-queues=2,"),
    ]
    command[-1] += f"addr.type=unix,addr.path={path}"
    with subprocess.Popen(command) as daemon:
        try:
            wait_until(path.exists, "the daemon listens")
            yield path, daemon
        finally:
            daemon.kill()


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_file_system_is_written_and_there_again(
    debian_guest: CachedGuest, tmp_path: Path, virtio: VirtioTransport
) -> None:
    image = ext4(tmp_path / "disk.img")
    sums = []
    with served(image) as (socket, _):
        for _ in range(2):
            with Machine(
                engine="bt",
                kernel=debian_guest.kernel,
                initrd=debian_guest.initrd,
                disk=f"vhost-user={socket}",
                virtio=virtio,
            ) as machine:
                ask = shell(machine)
                ask("mount -t ext4 /dev/vda /mnt")
                ask("[ -e /mnt/data ] || dd if=/dev/urandom of=/mnt/data bs=64k count=200")
                # A program that is read from there runs: its pages had other code before.
                ask("cp /bin/busybox /mnt/; sync; echo 3 > /proc/sys/vm/drop_caches")
                sums.append(ask("/mnt/busybox sha256sum < /mnt/data").split()[-5])
                ask("umount /mnt")
                machine.console.send("poweroff -f\n")
                assert machine.wait(60).ok
    assert len(sums[0]) == 64
    assert sums[0] == sums[1]
    subprocess.run(["e2fsck", "-fn", image], check=True, timeout=60)


def test_daemon_that_is_killed_gives_the_guest_errors(
    debian_guest: CachedGuest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        served(ext4(tmp_path / "disk.img")) as (socket, daemon),
        Machine(
            engine="bt",
            kernel=debian_guest.kernel,
            initrd=debian_guest.initrd,
            disk=f"vhost-user={socket}",
        ) as machine,
    ):
        ask = shell(machine)
        ask("dd if=/dev/vda of=/dev/null bs=64k count=16")
        with caplog.at_level(logging.WARNING):
            daemon.kill()
            daemon.wait()
            said = ask("! dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct")
        assert "I/O error" in said or "Input/output error" in said
        assert caplog.text.count("disk0: the back end hung up") == 1
        ask("echo alive")
        machine.console.send("poweroff -f\n")
        assert machine.wait(60).ok
