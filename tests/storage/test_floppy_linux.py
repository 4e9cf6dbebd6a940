"""Linux's driver on floppy drives, and what it leaves in their images."""

from __future__ import annotations

import gc
import hashlib
import os
from pathlib import Path

import pytest

from tetrarch import Machine, images
from tetrarch.errors import ImageError

PROMPT = "root@tetrarch:~# "
LIMIT_S = 120
SIZE = 1440 << 10


def ask(vm: Machine, command: str) -> str:
    vm.console.send(f"{command}; echo st''atus $?\n")
    said = vm.console.expect("status 0", LIMIT_S)
    vm.console.expect(PROMPT, LIMIT_S)
    return said


@pytest.mark.long
def test_linux_reads_and_writes_both_drives_before_and_after_a_restore(tmp_path: Path) -> None:
    # Debian's kernel for machines has the driver.
    guest = images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
    first, second, saved = tmp_path / "a.img", tmp_path / "b.img", tmp_path / "saved"
    data = os.urandom(SIZE)
    first.write_bytes(data)
    second.write_bytes(bytes(SIZE))
    floppies = [f"{first},readonly", str(second)]
    with Machine(engine="bt", kernel=guest.kernel, initrd=guest.initrd, floppy=floppies) as vm:
        vm.start()
        vm.console.expect(PROMPT, LIMIT_S)
        ask(vm, "until [ -b /dev/fd1 ]; do sleep 0.1; done")
        assert hashlib.sha256(data).hexdigest() in ask(vm, "sha256sum /dev/fd0")
        ask(vm, "! dd if=/dev/zero of=/dev/fd0 bs=512 count=1 conv=fsync")
        ask(vm, "dd if=/dev/fd0 of=/dev/fd1 bs=18k count=40 conv=fsync")
        vm.save(saved)
    with Machine.restore(saved, floppy=floppies) as vm:
        vm.start()
        ask(vm, "dd if=/dev/fd0 of=/dev/fd1 bs=18k skip=40 seek=40 conv=fsync")
        ask(vm, "! dmesg | grep -i -E 'floppy.*(error|timeout)|bug:'")
        vm.console.send("poweroff\n")
        assert vm.wait(LIMIT_S).ok
    assert second.read_bytes() == first.read_bytes() == data


@pytest.mark.parametrize(
    ("size", "cause", "mend"),
    [
        (1000, "has 1000 bytes, which no floppy disk has", "360, 720, 1200, 1440, 2880 KiB"),
        (None, "cannot be read: No such file or directory", "name an image"),
    ],
)
def test_what_is_no_floppy_disk_is_refused(
    tmp_path: Path, size: int | None, cause: str, mend: str
) -> None:
    path = tmp_path / "disk"
    if size is not None:
        path.write_bytes(bytes(size))
    with pytest.raises(ImageError, match=cause) as refused:
        Machine(engine="bt", floppy=path)
    assert mend in refused.value.mend


def test_directory_is_no_floppy_disk(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory"):
        Machine(engine="bt", floppy=tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="is no regular file"):
        Machine(engine="bt", floppy=tmp_path / "fifo")


def test_machine_that_fails_lets_go_of_its_floppy_disk(tmp_path: Path) -> None:
    floppy, disk = tmp_path / "a.img", tmp_path / "disk.img"
    for path in (floppy, disk):
        path.write_bytes(bytes(SIZE))
    gc.disable()  # it would let go of it, at some time
    try:
        with Machine(engine="bt", disk=f"{disk},format=raw") as other:
            with pytest.raises(ImageError, match="in use"):
                Machine(engine="bt", floppy=floppy, disk=f"{disk},format=raw")
            assert other.config.disk
            with Machine(engine="bt", floppy=floppy):
                pass
    finally:
        gc.enable()
