"""A Debian user land, unpacked from the archive's own packages, and an initramfs of it.

apt resolves, fetches and checks the packages; nothing is configured and nothing is
installed on the host. What is built stays in the user's cache.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tetrarch.images import Initramfs
from tetrarch.images.cache import default_root

# Counts up when what is made of the same packages changes.
RECIPE = 1
PROGRAMS = Path(__file__).parent / "programs"
# Guests do not read it, and it is a fifth of the whole.
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")

# Mounts, from devpts to /tmp, then a loop: reads the name of a case and its command,
# runs the command as the host does, prints what came out between two marks.
_INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
busybox ln -s /proc/self/fd /dev/fd
busybox mount -t tmpfs shm /dev/shm
busybox mount -t devpts devpts /dev/pts
busybox mount -t tmpfs tmp /tmp
busybox ip link set lo up
busybox stty -echo
echo "=== ready"
while read -r name command; do
    echo "=== begin $name"
    env -i {environment} /bin/sh -c "cd /tmp; $command" >/dev/shm/out 2>&1 </dev/null
    code=$?
    cat /dev/shm/out
    echo "=== end $name $code"
done
busybox poweroff -f
"""
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}


class DebianRoot:
    """One set of packages with all that they depend on."""

    def __init__(self, packages: Sequence[str]) -> None:
        key = hashlib.sha256(f"{RECIPE} {' '.join(sorted(packages))}".encode()).hexdigest()[:12]
        self._base = default_root() / "tests" / f"userland-{key}"
        self.root = self._base / "root"
        self.initrd = self._base / "initrd.cpio"
        self._packages = packages

    def build(self) -> None:
        """Makes the root if there is none, and the initramfs with the programs of today."""
        self._base.mkdir(parents=True, exist_ok=True)
        with (self._base / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.root.is_dir():
                self._unpack(self._fetch())
            _copy_programs(self.root / "cases")
            self.initrd.write_bytes(self._initramfs().cpio())

    def run(self, command: str) -> tuple[int, str]:
        """Runs a command in the root on this host: its exit code and output."""
        # The mounts are seen by this command only and go with it.
        mounts = " && ".join(
            (
                "mount --rbind /dev dev",
                "mount --rbind /proc proc",
                "mount --rbind /sys sys",
                "mount -t tmpfs tmp tmp",
            )
        )
        own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        done = subprocess.run(
            [
                *("unshare", "--mount", *own_user, "/bin/sh", "-c"),
                f'{mounts} && exec /usr/sbin/chroot . /usr/bin/env -i "$@"',
                *("sh", *(f"{name}={value}" for name, value in ENVIRONMENT.items())),
                *("/bin/sh", "-c", f"cd /tmp; {command}"),
            ],
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def _fetch(self) -> list[Path]:
        state, archives = self._base / "apt", self._base / "archives"
        for directory in (state / "lists/partial", archives / "partial"):
            directory.mkdir(parents=True, exist_ok=True)
        # No package counts as installed, so that all the dependencies come.
        (state / "status").touch()
        options = [
            f"Dir::State::status={state}/status",
            f"Dir::Cache::archives={archives}",
            f"Dir::State={state}",
            f"Dir::Cache={state}",
            "APT::Sandbox::User=root",
            "APT::Install-Recommends=false",
            "Acquire::Languages=none",
            "Debug::NoLocking=1",
        ]
        arguments = [part for option in options for part in ("-o", option)]
        _run("apt-get", *arguments, "-qq", "update")
        _run(*("apt-get", *arguments, "-qq", "-y", "--download-only", "install"), *self._packages)
        return sorted(archives.glob("*.deb"))

    def _unpack(self, packages: Sequence[Path]) -> None:
        scratch = self._base / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        for directory in ("dev", "proc", "sys", "tmp", "root", "run", "var"):
            (scratch / directory).mkdir(parents=True)
        for package in packages:
            _run("dpkg-deb", "--extract", str(package), str(scratch))
        for name in _LEFT_OUT:
            shutil.rmtree(scratch / name, ignore_errors=True)
        scratch.rename(self.root)

    def _initramfs(self) -> Initramfs:
        tree = Initramfs()
        tree.tree(self.root)
        tree.character_device("dev/console", 5, 1)
        tree.character_device("dev/null", 1, 3, 0o666)
        environment = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        tree.file("init", _INIT.format(environment=environment).encode(), 0o755)
        return tree


def _copy_programs(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(PROGRAMS, target, ignore=shutil.ignore_patterns("__pycache__"))
    # Static, so that the root needs no library of the host's version.
    for source in PROGRAMS.glob("*.cpp"):
        _run("g++", "-O1", "-static", "-o", str(target / source.stem), str(source))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
