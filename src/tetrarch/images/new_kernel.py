"""The newest kernel of an installed disk, which its guest has got since: the next start takes it.

Kernel and initial RAM disk lie beside the disk, since there is no firmware that would read them
from it. Its guest hands them out: a file system that a guest has written is read by no program of
the host.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import IO

from tetrarch._files import ScratchDirectory
from tetrarch.errors import ImageError
from tetrarch.images.store import INITRD, KERNEL, DiskStore, InstalledDisk

__all__ = ["take_newest_kernel"]

_SCRIPT = """\
cd /boot || exit
for release in $(ls | sed -n s/^vmlinuz-//p | sort -rV); do
    [ ! -e "initrd.img-$release" ] ||
        exec tar -c -h -f - "vmlinuz-$release" "initrd.img-$release"
done
echo "there is no kernel with an initial RAM disk in its /boot" >&2
exit 1
"""

_NAMES = {KERNEL: "vmlinuz-", INITRD: "initrd.img-"}
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~_-]{0,99}")
# Far more than any has; a guest may say anything.
_SIZE_MAX = 512 << 20
_CHUNK = 1 << 20
_WORDS_MAX = 4096


def take_newest_kernel(store: DiskStore, name: str) -> InstalledDisk:
    """Starts the disk's guest for a moment. Raises ImageError; the disk is as it was then."""
    found = store.find(name)
    if found is None:
        raise ImageError(f"there is no disk {name} in {store.root}", "see tetrarch image ls")
    command = [sys.executable, "-m", "tetrarch", "run", name, "--", "sh", "-c", _SCRIPT]
    data = {"XDG_DATA_HOME": str(store.root.parents[1])}
    with ScratchDirectory(prefix=".kernel-", dir=found.directory) as folder:
        scratch = Path(folder)
        with (
            (scratch / "said").open("wb") as said,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env={**os.environ, **data},
            ) as process,
        ):
            assert process.stdout is not None
            try:
                # Where it does not end with the archive, it finds nobody who reads on.
                with process.stdout as archive:
                    release = _unpack(archive, scratch)
            except tarfile.TarError:
                release = ""
        if process.returncode != 0 or not release:
            why = _last_line(scratch / "said") or "its guest handed out none"
            raise ImageError(f"no kernel can be taken from {name}: {why}", "look into its /boot")
        # The old pair is whole until here, and the new one is on the host's disk.
        for file in _NAMES:
            (scratch / file).rename(found.directory / file)
    return store.set_release(found, release)


def _last_line(said: Path) -> str:
    with said.open("rb") as file:
        file.seek(max(0, said.stat().st_size - _WORDS_MAX))
        lines = file.read().decode("utf-8", "replace").split("\n")
    lines = [line for line in lines if line.strip()]
    return lines[-1].strip().removeprefix("tetrarch: ") if lines else ""


def _unpack(archive: IO[bytes], folder: Path) -> str:
    """The release of the kernel whose two files are in the archive; "" where it is another."""
    releases = []
    with tarfile.open(fileobj=archive, mode="r|") as tar:
        for file, prefix in _NAMES.items():
            member = tar.next()
            source = None if member is None else tar.extractfile(member)
            if member is None or source is None or member.size > _SIZE_MAX:
                return ""
            releases.append(member.name.removeprefix(prefix))
            with (folder / file).open("wb") as target:
                while data := source.read(_CHUNK):
                    target.write(data)
                target.flush()
                os.fsync(target.fileno())
        if tar.next() is not None:
            return ""
        archive.read(_CHUNK)  # what fills up its last block
    alike = releases[0] == releases[1] and _RELEASE.fullmatch(releases[0])
    return releases[0] if alike else ""
