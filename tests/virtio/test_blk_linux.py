"""Linux uses disks: file systems on them, and what is left of them when the VMM is killed."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.nodes import can_be_opened

from tetrarch import Machine, block
from tetrarch._native import Vm
from tetrarch.block.disk import open_disk
from tetrarch.images import CachedGuest
from tetrarch.machine.config import VirtioTransport
from tetrarch.virtio.blk import BlkKind
from tetrarch.virtio.pci import VirtioPci

PROMPT = "root@tetrarch:~# "
SIZE = 96 << 20

pytestmark = pytest.mark.skipif(
    shutil.which("mkfs.ext4") is None, reason="no mkfs.ext4: apt-get install e2fsprogs"
)


def ext4(path: Path) -> Path:
    """A disk with a file system, raw or qcow2 by its name."""
    raw = path.with_suffix(".img")
    block.create(raw, SIZE, image_format="raw")
    subprocess.run(["mkfs.ext4", "-q", "-F", raw], check=True, timeout=60)
    if path != raw:
        block.convert(raw, path)
        raw.unlink()
    return path


def shell(machine: Machine) -> Callable[[str], str]:
    machine.start()
    machine.console.expect(PROMPT, 120)

    def ask(command: str) -> str:
        machine.console.send(command + "; echo status $?\n")
        said = machine.console.expect(PROMPT, 120)
        assert "status 0" in said, said
        return said

    return ask


@pytest.mark.long
def test_disk_is_plugged_in_and_out_of_a_guest_that_is_busy(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    for name in ("stays.img", "comes.img"):
        block.create(tmp_path / name, 8 << 20)
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=tmp_path / "stays.img",
    ) as vm:
        ask = shell(vm)
        ask(
            "(while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; done) & true"
        )
        assert isinstance(vm.engine_vm, Vm)
        for count in range(50):
            mark = f"round {count} "
            (tmp_path / "comes.img").write_bytes(mark.encode().ljust(8 << 20, b"."))
            disk = open_disk(block.DiskSpec(tmp_path / "comes.img"))
            device = VirtioPci(vm.engine_vm, BlkKind(vm.engine_vm, disk, "comes", 1))
            vm.attach_pci(device, name="comes")
            ask(f"until {can_be_opened('vdb')}; do sleep 0.05; done")
            assert mark in ask("head -c 10 /dev/vdb")
            # It is taken away in the middle of reads, or of writes.
            # It is open before: a dd that came too late would make a file of that name. Behind
            # a shell of its own, since without a terminal busybox's ends when a job does.
            use = "<&3 >/dev/null" if count % 2 else "</dev/zero >&3"
            ask(f"exec 3<>/dev/vdb; (dd bs=4k {use} 2>/dev/null &); exec 3>&-")
            vm.detach(device, timeout=120)
            ask("until [ ! -e /dev/vdb ]; do sleep 0.05; done")
            # The image is nobody's now.
            open_disk(block.DiskSpec(tmp_path / "comes.img")).close()
        said = ask("kill %1; dmesg")
        assert not re.search(r"BUG|Oops|WARNING|Call Trace|blocked for more", said), said
        vm.console.send("poweroff -f\n")
        assert vm.wait(120).ok


@pytest.mark.parametrize(
    ("virtio", "name", "options"),
    [
        ("pci", "disk.img", ""),
        ("pci", "disk.img", ",cache=none"),
        ("mmio", "disk.qcow2", ""),
    ],
)
def test_file_system_is_mounted_written_trimmed_and_clean(
    debian_guest: CachedGuest, tmp_path: Path, virtio: VirtioTransport, name: str, options: str
) -> None:
    path = ext4(tmp_path / name)
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=f"{path}{options}",
        virtio=virtio,
    )
    with machine:
        ask = shell(machine)
        assert "disk0" in ask("cat /sys/block/vda/serial")
        ask("mount -t ext4 /dev/vda /mnt")
        first = ask(
            "dd if=/dev/urandom of=/mnt/data bs=64k count=300 && sync && sha256sum < /mnt/data"
        )
        again = ask("echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/data")
        assert first.split()[-5:-3] == again.split()[-5:-3]
        allocated = block.info(path)["allocated"]
        ask("rm /mnt/data && sync && fstrim -v /mnt && umount /mnt && sync")
        assert block.info(path)["allocated"] < allocated - (10 << 20)
    raw = path
    if path.suffix == ".qcow2":
        assert block.check(path)["errors"] == 0
        raw = tmp_path / "back.img"
        block.convert(path, raw)
    subprocess.run(["e2fsck", "-fn", raw], check=True, timeout=60)


def test_held_and_saved_machine_goes_on_with_its_disk(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    path, saved = ext4(tmp_path / "disk.img"), tmp_path / "machine.saved"
    machine = Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        disk=path,
        memory="256M",
    )
    with machine:
        ask = shell(machine)
        ask("mount -t ext4 /dev/vda /mnt")
        machine.console.send(
            "while :; do dd if=/dev/zero of=/mnt/x bs=64k count=50; sync; done &\n"
        )
        machine.console.expect("records out", 60)
        for _ in range(10):
            with machine.paused():
                pass
        machine.console.send("kill %1; wait; sync; echo kept > /mnt/y; sync; echo do''ne\n")
        machine.console.expect("done", 60)
        machine.pause()  # its disk is not to change any more
        machine.save(saved)
    restored = Machine.restore(saved, disk=path)
    with restored:
        restored.start()
        restored.console.send("cat /mnt/y; umount /mnt; echo status $?\n")
        said = restored.console.expect("status 0", 60)
        assert "kept" in said
    subprocess.run(["e2fsck", "-fn", path], check=True, timeout=60)


LOAD = (
    "mount -t ext4 /dev/vda /mnt; i=0; while :; do i=$((i+1)); printf '%08d' $i | "
    "dd of=/mnt/log bs=8 seek=$i conv=notrunc,fsync 2>/dev/null && echo ack $i; done\n"
)


def acknowledged(line: bytes) -> int:
    """The record of a whole line of the guest's, else 0."""
    found = re.fullmatch(rb"ack (\d+)\r?\n", line)
    return int(found[1]) if found else 0


def kill_under_load(guest: CachedGuest, path: Path, kills: random.Random) -> None:
    """Runs a guest that writes and syncs record after record, kills the VMM, and looks."""
    command = [sys.executable, "-m", "tetrarch", "run", "--engine", "bt", "--disk", str(path)]
    command += ["--kernel", str(guest.kernel), "--initrd", str(guest.initrd)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        watchdog = threading.Timer(240, program.kill)
        watchdog.start()
        try:
            program.stdin.write(LOAD.encode())
            program.stdin.flush()
            last, enough = 0, kills.randrange(5, 60)
            for line in program.stdout:
                last = acknowledged(line) or last
                if last >= enough:
                    break
            program.kill()
            # What it had said already counts too.
            last = max(last, *map(acknowledged, program.stdout), 0)
        finally:
            watchdog.cancel()
            program.kill()
    assert last >= enough, f"only {last} records were written in time"

    raw = path
    if path.suffix == ".qcow2":
        report = block.check(path)
        assert report["errors"] == 0, report
        if shutil.which("qemu-img"):
            # 3: clusters are lost space, which any program that is killed leaves.
            checked = subprocess.run(["qemu-img", "check", path], check=False, timeout=60)
            assert checked.returncode in (0, 3)
        raw = path.with_suffix(".check.img")
        block.convert(path, raw)
    else:
        raw = path.with_suffix(".check.img")
        shutil.copyfile(path, raw)
    # The journal is replayed, as at the next mount; then nothing may be wrong.
    replayed = subprocess.run(["e2fsck", "-p", raw], capture_output=True, check=False, timeout=60)
    assert replayed.returncode in (0, 1), replayed.stdout
    subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True, timeout=60)
    log = subprocess.run(
        ["debugfs", "-R", "cat /log", raw], check=True, capture_output=True, timeout=60
    ).stdout
    raw.unlink()
    kept = [int(log[8 * i : 8 * i + 8] or b"0") for i in range(1, last + 1)]
    assert kept == list(range(1, last + 1))


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
def test_killed_vmm_loses_nothing_that_was_flushed(
    debian_guest: CachedGuest, tmp_path: Path, name: str
) -> None:
    kill_under_load(debian_guest, ext4(tmp_path / name), random.Random(os.urandom(4)))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
def test_killed_vmm_loses_nothing_in_a_hundred_rounds(
    debian_guest: CachedGuest, tmp_path: Path, name: str
) -> None:
    path = ext4(tmp_path / name)
    kills = random.Random(os.urandom(4))
    for _ in range(50):
        kill_under_load(debian_guest, path, kills)
