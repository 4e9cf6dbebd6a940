"""A Debian system with Python, our wheel and tests as one initramfs, to run where KVM is.

The host of the test needs no virtualization: QEMU's TCG emulates a CPU with SVM, on
which Debian's own kvm-amd gives a real /dev/kvm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from tests.initrds import shell_tree
from tests.userland.debian import DebianRoot

from tetrarch.images import Initramfs
from tetrarch.images.modules import ModuleTree, modules_dep
from tetrarch.images.store import InstalledDisk

ROOT = Path(__file__).resolve().parents[2]
BUILD_LIMIT_S = 1200
# Now and then a CPU of QEMU's does not come out of a nested guest, where its interrupts should
# take it out; the system's own kernel says so. That says nothing of us: it is booted again.
_STUCK = "soft lockup - CPU"
_TRIES = 3

# python3 has the whole standard library; the kernel serves both levels.
PACKAGES = ("busybox-static", "coreutils", "dash", "linux-image-cloud-amd64", "python3")

# What the inner guest does, for the outer to see on its console.
INNER_SCRIPT = """
mount -t devtmpfs dev /dev
echo "inner: clocks $(cat /sys/devices/system/clocksource/clocksource0/available_clocksource)"
echo "inner: processors $(grep -c ^processor /proc/cpuinfo)"
poweroff -f
"""
INNER_APPEND = "console=ttyS0 quiet panic=-1"

# Where the outer system's user, root, has the disks that he has built.
_DISKS = "root/.local/share/tetrarch/disks"

_OUTER_INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 PYTHONPATH=/site
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
for driver in {drivers}; do busybox modprobe $driver; done
{commands}
busybox poweroff -f
"""


def built_wheel(directory: Path) -> Path:
    """The wheel named by TETRARCH_WHEEL, or one that is built now."""
    if named := os.environ.get("TETRARCH_WHEEL"):
        return Path(named)
    build = (sys.executable, "-m", "maturin", "build", "--release", "--strip", "--locked")
    subprocess.run([*build, "--out", directory], cwd=ROOT, check=True, timeout=BUILD_LIMIT_S)
    (built,) = directory.glob("*.whl")
    return built


def nested_host(directory: Path, *packages: str) -> NestedHost:
    """In an empty directory, with further Debian packages. Skips the test, or fails it with
    REQUIRE_KVM=1, without QEMU."""
    if shutil.which("qemu-system-x86_64") is None:
        missing = "no qemu-system-x86_64 for a host with SVM; install qemu-system-x86"
        if os.environ.get("REQUIRE_KVM") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return NestedHost(built_wheel(directory), directory, packages)


class NestedHost:
    """The outer system; ``boot`` runs commands in it and returns its console."""

    def __init__(self, wheel: Path, scratch: Path, packages: Sequence[str] = ()) -> None:
        self._debian = DebianRoot((*PACKAGES, *packages))
        self._debian.build()
        self._site = scratch / "site"
        self._initrd = scratch / "outer.cpio"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:"),
                *("--disable-pip-version-check", "--python-version", "3.11"),
                *("--target", self._site, wheel, "pytest"),
            ],
            check=True,
            timeout=300,
        )

    @property
    def kernel(self) -> Path:
        (kernel,) = (self._debian.root / "boot").glob("vmlinuz-*")
        return kernel

    def boot(
        self,
        commands: str,
        timeout: float,
        programs: Mapping[str, Path] | None = None,
        disk: InstalledDisk | None = None,
        drivers: Sequence[str] = (),
    ) -> str:
        """``programs`` lie in /suite by name; ``disk`` is one of the user's own there, with what
        is written to it forgotten; ``drivers`` are modules of the kernel that are used."""
        inner = shell_tree(INNER_SCRIPT).cpio()
        if disk is not None:
            drivers = [*drivers, "virtio_pci", "virtio_blk"]
        tree = self._outer(commands, inner, programs or {}, drivers)
        drive: list[str] = []
        if disk is not None:
            drive = ["-drive", f"file={disk.disk},format=raw,if=virtio,snapshot=on"]
            home = f"{_DISKS}/{disk.manifest.name}"
            for file in (disk.kernel, disk.initrd, disk.disk.with_suffix(".json")):
                tree.file(f"{home}/{file.name}", file.read_bytes())
            tree.symlink(f"{home}/{disk.disk.name}", "/dev/vda")
        self._initrd.write_bytes(tree.cpio())
        command: list[str | Path] = [
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max,+svm", "-smp", "2"),
            *("-m", "2G", "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"),
            *("-kernel", self.kernel, "-initrd", self._initrd),
            # QEMU's TSC goes evenly, but on a busy host Linux's watchdog finds it late; KVM
            # would then move a guest's TSC by a clock of its own. And it panics where the PIT
            # ticks too seldom while it looks.
            *("-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check"),
            *drive,
        ]
        for _ in range(_TRIES - 1):
            console = _console(command, timeout)
            if _STUCK not in console:
                return console
        return _console(command, timeout)

    def _outer(
        self, commands: str, inner: bytes, programs: Mapping[str, Path], drivers: Sequence[str]
    ) -> Initramfs:
        tree = Initramfs()
        slim = self._initrd.parent / "root"
        shutil.rmtree(slim, ignore_errors=True)
        shutil.copytree(self._debian.root, slim, symlinks=True, ignore=_left_out)
        tree.tree(slim)
        (release,) = (self._debian.root / "lib/modules").iterdir()
        loaded = ("kvm_amd", *drivers)
        modules = ModuleTree(release).closure(loaded)
        for module in modules:
            tree.file(f"lib/modules/{release.name}/{module.path}", module.data)
        tree.file(f"lib/modules/{release.name}/modules.dep", modules_dep(modules).encode())
        for file in sorted(self._site.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                tree.file(f"site/{file.relative_to(self._site)}", file.read_bytes(), 0o755)
        for file in (Path(__file__).parents[1] / "conformance").glob("*.py"):
            tree.file(f"suite/tests/conformance/{file.name}", file.read_bytes())
        for name, program in programs.items():
            tree.file(f"suite/{name}", program.read_bytes(), 0o755)
        tree.file("inner.cpio", inner)
        tree.file("vmlinuz", self.kernel.read_bytes())
        tree.character_device("dev/console", 5, 1)
        tree.file(
            "init", _OUTER_INIT.format(commands=commands, drivers=" ".join(loaded)).encode(), 0o755
        )
        return tree


def _console(command: Sequence[str | Path], timeout: float) -> str:
    """What a system writes until it ends, or one of its CPUs is stuck."""
    lines = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as qemu:
        timer = threading.Timer(timeout, qemu.kill)
        timer.start()
        try:
            assert qemu.stdout is not None
            for line in qemu.stdout:
                lines.append(line.decode("utf-8", "replace"))
                if _STUCK in lines[-1]:
                    break
        finally:
            timer.cancel()
            qemu.kill()
    return "".join(lines).replace("\r", "")


def _left_out(directory: str, names: list[str]) -> set[str]:
    """Modules and the kernel, which have places of their own."""
    return {name for name in names if ".ko" in name or name.startswith(("vmlinuz-", "System.map-"))}
