"""Directories of the host in a Linux guest: whole, read-only, and when their server dies."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.virtio.test_blk_linux import PROMPT, shell

from tetrarch import Machine
from tetrarch.errors import HostError, StateError
from tetrarch.images import CachedGuest
from tetrarch.machine.config import VirtioTransport
from tetrarch.share import virtiofsd
from tetrarch.testing import pvh_kernel

needs_virtiofsd = pytest.mark.skipif(
    shutil.which("virtiofsd") is None
    and not any(os.access(place, os.X_OK) for place in virtiofsd._PLACES),
    reason="no virtiofsd: apt-get install qemu-system-common",
)


def tree(root: Path) -> Path:
    """Directories, files of many sizes, names that are not ASCII, a link, an executable."""
    seeded = random.Random(26)
    for name in ("a/b/c", "d/ä ö"):
        (root / name).mkdir(parents=True)
    for index, directory in enumerate(sorted(root.rglob("*"))):
        for size in (0, 1, 4095, 4096, 4097, 300_000 * (index + 1)):
            (directory / f"file {size}").write_bytes(seeded.randbytes(size))
    (root / "a/link").symlink_to("b/c/file 4095")
    (root / "a/run").write_text("echo it runs\n")
    (root / "a/run").chmod(0o755)
    return root


def sums(root: Path) -> dict[str, str]:
    """Of each file, its hash."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def machine(guest: CachedGuest, shares: list[str], virtio: VirtioTransport = "pci") -> Machine:
    return Machine(
        engine="bt", kernel=guest.kernel, initrd=guest.initrd, share=shares, virtio=virtio
    )


@needs_virtiofsd
@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_tree_is_copied_both_ways_and_what_is_read_only_stays(
    debian_guest: CachedGuest, tmp_path: Path, virtio: VirtioTransport
) -> None:
    source, target = tree(tmp_path / "source"), tmp_path / "out,put"
    target.mkdir()
    before = sums(source)
    shares = [f"{source},readonly", f"{tmp_path}/out,,put:target"]
    with machine(debian_guest, shares, virtio) as vm:
        ask = shell(vm)
        # They are mounted by themselves.
        ask("cp -a /mnt/source /mnt/target/copy && sync")
        assert "it runs" in ask("sh /mnt/source/a/run")
        # What one side writes, the other reads.
        (target / "from the host").write_text("hello, guest\n")
        assert "hello, guest" in ask("cat '/mnt/target/from the host'")
        # Root in the guest may do all that it likes: the host's kernel refuses it.
        for attempt in (
            "echo x > /mnt/source/new",
            "echo x >> /mnt/source/a/run",
            "rm /mnt/source/a/run",
            "mkdir /mnt/source/directory",
            "mknod /mnt/source/null c 1 3",
            "chmod 777 /mnt/source/a/run",
            "chown 1:1 /mnt/source/a/run",
            "ln -s x /mnt/source/link",
            "mv /mnt/source/a/run /mnt/source/moved",
            "touch /mnt/source/a/run",
            "truncate -s 0 /mnt/source/a/run",
        ):
            assert "Read-only file system" in ask(f"! {attempt}"), attempt
        with pytest.raises(StateError, match="share0 cannot be saved"):
            vm.save(tmp_path / "saved")
        pids = [share.daemon.pid for share in vm._pc.shares]
        vm.console.send("poweroff -f\n")
        assert vm.wait(60).ok
    assert sums(source) == before == sums(target / "copy")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@needs_virtiofsd
def test_share_that_is_removed_or_whose_server_is_killed_gives_the_guest_errors(
    debian_guest: CachedGuest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("gone", "stays", "removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(1 << 20))
    shares = [str(tmp_path / name) for name in ("gone", "stays", "removed")]
    with machine(debian_guest, shares) as vm:
        ask = shell(vm)
        shutil.rmtree(tmp_path / "removed")
        ask('! cat /mnt/removed/file && ! touch /mnt/removed/new && [ -z "$(ls /mnt/removed)" ]')
        read = "while cat /mnt/gone/file > /dev/null; do :; done; echo over > /tmp/over"
        ask(f"({read}) 2>/dev/null & true")
        with caplog.at_level(logging.WARNING):
            os.kill(vm._pc.shares[0].daemon.pid, signal.SIGKILL)
            ask("until [ -e /tmp/over ]; do sleep 0.1; done")
            assert "Input/output error" in ask("! cat /mnt/gone/file")
        assert caplog.text.count("share0: the back end hung up") == 1
        ask("cmp -n 1048576 /mnt/stays/file /dev/zero")
        vm.console.send("poweroff -f\n")
        assert vm.wait(60).ok


@needs_virtiofsd
def test_machine_that_is_reset_has_its_share_again(
    debian_guest: CachedGuest, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(bytes(1 << 20))
    with Machine(
        engine="bt",
        kernel=debian_guest.kernel,
        initrd=debian_guest.initrd,
        share=tmp_path / "data",
        on_reset="restart",
    ) as vm:
        ask = shell(vm)
        # In the middle of requests.
        ask("(while :; do cat /mnt/data/file > /dev/null; done) & true")
        vm.console.send("reboot -f\n")
        vm.console.expect(PROMPT, 120)
        vm.console.send("cmp -n 1048576 /mnt/data/file /dev/zero && echo the $((1 + 1))nd time\n")
        vm.console.expect("the 2nd time", 60)
        assert vm.resets == 1


def test_directories_mounted_in_a_read_only_one_are_too(tmp_path: Path) -> None:
    """The script that runs virtiofsd, with a shell in its place."""
    (tmp_path / "sub").mkdir()
    place = str(tmp_path)
    confined = [sys.executable, "-I", str(virtiofsd._CONFINED), place]
    probe = ["/bin/sh", "-c", f"touch {place}/x; touch {place}/sub/x; touch {place}/../outside"]

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        script = f'mount -t tmpfs none {place}/sub && exec "$@"'
        command = ["unshare", "-Urm", "/bin/sh", "-c", script, "sh", *confined, mode, "--", *probe]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run("rw")
    if "unshare" in done.stderr:
        pytest.skip(f"the host allows no user namespaces: {done.stderr}")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "x").unlink()
    said = run("ro").stderr.splitlines()
    assert [line.endswith("Read-only file system") for line in said] == [True, True]
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("newgidmap") is None or not Path("/usr/bin/python3").exists(),
    reason="not root, no newgidmap (apt-get install uidmap) or no /usr/bin/python3",
)
def test_user_in_several_groups_has_one_in_the_namespace(tmp_path: Path) -> None:
    """QEMU's virtiofsd ends where it cannot drop the others."""
    lent = tmp_path / "subgid"
    lent.write_text("nobody:200000:65536\n")
    lent.chmod(0o644)
    # The host's own file is as it was: the mount is in a namespace.
    script = f'mount --bind {lent} /etc/subgid && exec "$@"'
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--groups=1000,1001"]
    done = subprocess.run(
        [
            *("unshare", "-m", "/bin/sh", "-c", script, "sh", *user),
            *("/usr/bin/python3", "-I", "-", "/", "rw", "--", "/usr/bin/id", "-G"),
        ],
        input=virtiofsd._CONFINED.read_text(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    (tmp_path / "kernel").write_bytes(pvh_kernel(b"\xf4"))  # hlt
    return tmp_path / "kernel"


def test_host_without_virtiofsd_is_one_line(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(virtiofsd, "_PLACES", ())
    with pytest.raises(HostError) as raised:
        Machine(engine="bt", kernel=kernel, share=tmp_path)
    assert raised.value.cause == "this host has no virtiofsd, which shares need"
    assert "apt-get install" in raised.value.mend


@pytest.mark.parametrize("readonly", ["", ",readonly"])
def test_virtiofsd_that_does_not_start_is_told_in_its_own_words(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readonly: str
) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text('#!/bin/sh\n[ "$1" = --help ] || echo "the moon is full" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(HostError, match=r"cannot share .*: the moon is full"):
        Machine(engine="bt", kernel=kernel, share=f"{tmp_path}{readonly}")


def test_directory_that_is_not_there_is_one_line(kernel: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot share .*/none: no such directory"):
        Machine(engine="bt", kernel=kernel, share=tmp_path / "none")
