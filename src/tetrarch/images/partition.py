"""A disk with one file system on it, made from a tar archive without a loop device.

sfdisk writes the partition table into the file, and mke2fs the file system at its offset, from a
directory. To keep owners, the archive is unpacked as root: of the host, or of a user namespace in
which the user has subordinate IDs (newuidmap(1)).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

from tetrarch.errors import ImageError

__all__ = ["ROOT_PARTITION", "find_tool", "make_disk", "partition_uuid", "run_tool"]

_MIB = 1 << 20
#: The type of a root file system for x86-64 (UAPI group, Discoverable Partitions).
ROOT_PARTITION = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
_NAMESPACE = uuid.UUID("6f1d5a52-0a5b-4e0f-9e6e-7c1f0f2c5a11")

# What unpacks and writes: $1 the archive, $2 a directory that does not exist, then mke2fs and its
# arguments. Devices are the kernel's (devtmpfs), and a namespace may make none.
_SCRIPT = """
set -e
archive=$1 directory=$2
shift 2
mkdir "$directory"
trap 'rm -rf "$directory"' EXIT
tar --extract --file "$archive" --directory "$directory" --numeric-owner --preserve-permissions \
    --xattrs --xattrs-include='*' --exclude './dev/*'
"$@"
"""


def partition_uuid(name: str, what: str) -> str:
    """The same for the same name of a disk, so that a build can be repeated."""
    return str(uuid.uuid5(_NAMESPACE, f"{name}/{what}"))


def find_tool(program: str, package: str) -> str:
    """Raises ImageError where it is missing. Users' paths often lack the sbin directories."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = shutil.which(program, path=path)
    if found is None:
        raise ImageError(f"{program} is missing", f"install it: apt-get install {package}")
    return found


def run_tool(command: list[str], what: str, text: str = "") -> str:
    """Runs a program with ``text`` as its input; its output.

    Raises ImageError with the last line of what it complains.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ImageError(f"{what}: {error.strerror}", "look into the program") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        cause = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise ImageError(f"{what}: {cause}", _mend(done.stderr))
    return done.stdout


def _mend(errors: str) -> str:
    if "No space left" in errors or "Could not allocate block" in errors:
        return "free some space, or ask for a larger disk: --size"
    if "newuidmap" in errors or "unshare failed" in errors or "uid_map" in errors:
        return (
            "user namespaces are needed: apt-get install uidmap, a line for you in /etc/subuid and "
            "/etc/subgid, and sysctl kernel.unprivileged_userns_clone=1; or be root"
        )
    return "see what the program says above"


def make_disk(archive: Path, disk: Path, size: int, name: str) -> str:
    """Writes a GPT disk of ``size`` bytes whose root partition holds the archive; its PARTUUID."""
    mke2fs, sfdisk = find_tool("mke2fs", "e2fsprogs"), find_tool("sfdisk", "fdisk")
    shell, tar = find_tool("sh", "dash"), find_tool("tar", "tar")
    assert tar
    first, length = _MIB, size // _MIB * _MIB - 2 * _MIB
    part = partition_uuid(name, "partition")
    with disk.open("wb") as file:
        file.truncate(size)
    table = (
        f"label: gpt\nlabel-id: {partition_uuid(name, 'disk')}\n"
        f"start={first // 512}, size={length // 512}, type={ROOT_PARTITION}, "
        f"uuid={part}, name=root\n"
    )
    run_tool([sfdisk, "--quiet", str(disk)], f"cannot partition {disk}", table)
    with tempfile.TemporaryDirectory(prefix="tetrarch-", dir=disk.parent) as scratch:
        directory = f"{scratch}/root"
        seed = partition_uuid(name, "hash")
        command = [
            *(shell, "-c", _SCRIPT, "make-disk", str(archive), directory),
            *(mke2fs, "-q", "-F", "-t", "ext4", "-L", "root", "-d", directory),
            *("-U", partition_uuid(name, "root"), "-m", "1"),
            *("-E", f"offset={first},hash_seed={seed},root_owner=0:0"),
            *(str(disk), f"{length >> 10}k"),
        ]
        if os.geteuid() != 0:
            unshare = find_tool("unshare", "util-linux")
            find_tool("newuidmap", "uidmap")
            # The directory is another user's inside.
            Path(scratch).chmod(0o777)
            command = [unshare, "--map-auto", "--map-root-user", *command]
        run_tool(command, f"cannot make the file system of {disk}")
    return part
