"""A Debian archive of two tiny packages, behind stand-ins for apt's programs."""

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tetrarch.errors import ImageError
from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DiskStore
from tetrarch.images.tool import find_tool

META = "linux-image-cloud-amd64"
KERNEL = "linux-image-6.1.0-1-cloud-amd64"
RELEASE = "6.1.0-1-cloud-amd64"

# Both programs look the package up as a file; FAKE_APT says what goes wrong.
_APT_CACHE = """#!/bin/sh
for name; do :; done
[ "$FAKE_APT" = no-lists ] && case "$*" in *Dir::State::lists*) ;; *) exit 100 ;; esac
cat "{index}/$name" 2>/dev/null || {{ echo "E: No packages found" >&2; exit 100; }}
"""
_APT_GET = """#!/bin/sh
echo "$*" >>"{index}/log"
for last; do :; done
case "$*" in
*" update "*)
    [ "$FAKE_APT" = offline ] || exit 0
    echo "W: Failed to fetch http://deb/ Temporary failure resolving 'deb'" >&2
    exit 0 ;;
esac
# A helper of apt's that goes on, as its methods do.
[ "$FAKE_APT" != hanging ] || {{ sleep 1000 & echo $! >"{index}/helper"; wait; }}
# More than a pipe holds, twice.
[ "$FAKE_APT" != noisy ] || head -c 140000 /dev/zero | tr '\\0' x >&2
if [ "$FAKE_APT" = full ]; then
    echo "E: Failed to fetch http://deb/x.deb write, still have 1 to write but couldn't" >&2
    echo "E: Write error - write (28: No space left on device)" >&2
    exit 100
fi
if [ "$FAKE_APT" = offline ]; then
    echo "E: Failed to fetch http://deb/x.deb Could not resolve 'deb'" >&2
    exit 100
fi
cp "{index}/${{last%%=*}}.deb" .
[ "$FAKE_APT" != damaged ] || for deb in *.deb; do echo x >>"$deb"; done
"""


@dataclass
class FakeArchive:
    index: Path

    def log(self) -> str:
        path = self.index / "log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeArchive:
    index = tmp_path / "index"
    index.mkdir()
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("apt-cache", _APT_CACHE), ("apt-get", _APT_GET)):
        (programs / name).write_text(text.format(index=index))
        (programs / name).chmod(0o755)
    _package(
        index,
        KERNEL,
        {
            f"boot/vmlinuz-{RELEASE}": b"kernel",
            f"lib/modules/{RELEASE}/modules.builtin": b"kernel/fs/ext4/ext4.ko\n",
        },
    )
    _package(index, "busybox-static", {"bin/busybox": b"busybox"})
    (index / META).write_text(
        f"Package: {META}\nVersion: 6.1.1-1\nDepends: {KERNEL} (= 6.1.1-1)\n"
        "Filename: pool/x.deb\nSize: 1\nSHA256: 0\n"
    )
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FAKE_APT", raising=False)
    return FakeArchive(index)


def _package(index: Path, name: str, files: dict[str, bytes]) -> None:
    root = index.parent / f"root-{name}"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN").chmod(0o755)  # dpkg-deb refuses what a strict umask makes of it
    (root / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 6.1.1-1\nArchitecture: amd64\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: for a test\n"
    )
    for path, data in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    deb = index / f"{name}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(root), str(deb)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    data = deb.read_bytes()
    (index / name).write_text(
        f"Package: {name}\nVersion: 6.1.1-1\nFilename: pool/{name}.deb\n"
        f"Installed-Size: 8\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    )


@pytest.fixture(scope="session")
def disk_programs() -> None:
    """What makes a Debian on a disk, and keys for it."""
    for program in ("mmdebstrap", "mke2fs", "debugfs", "sfdisk", "ssh-keygen"):
        try:
            find_tool(program, program)
        except ImageError:
            pytest.skip(f"needs {program} (Debian: mmdebstrap, e2fsprogs, fdisk, openssh-client)")


@pytest.fixture(scope="session")
def debian_disk(tmp_path_factory: pytest.TempPathFactory, disk_programs: None) -> Path:
    """An XDG_DATA_HOME with the disk ``web``, which the user ``me`` may enter with ``key``."""
    data = tmp_path_factory.mktemp("data")
    key = data / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = key.with_suffix(".pub").read_text()
    recipe = DebianRecipe("web", 2 << 30, "box", "me", ssh_keys=[public])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(data))
        build_debian_disk(recipe, DiskStore(), Reporter())
    return data
