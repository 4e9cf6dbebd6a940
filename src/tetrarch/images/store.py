"""Installed disks, under XDG_DATA_HOME/tetrarch/disks: what a guest writes is the user's data.

    NAME/disk.raw       the disk
    NAME/vmlinuz        its kernel and initial RAM disk, to boot it without firmware
    NAME/initrd.img
    NAME/disk.json      what it is: append line, packages, when and of what it was made

A disk is made in a directory of its own beside them and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tetrarch.errors import ImageError

__all__ = ["DISK", "INITRD", "KERNEL", "DiskManifest", "DiskStore", "InstalledDisk", "data_root"]

DISK = "disk.raw"
KERNEL = "vmlinuz"
INITRD = "initrd.img"
_MANIFEST = "disk.json"
_SCRATCH = ".build-"


@dataclass(frozen=True)
class DiskManifest:
    name: str
    append: str
    """The kernel command line that finds the root file system."""
    release: str
    suite: str
    packages: dict[str, str] = field(default_factory=dict)
    """Package -> version, of all that is installed."""


@dataclass(frozen=True)
class InstalledDisk:
    manifest: DiskManifest
    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / DISK

    @property
    def kernel(self) -> Path:
        return self.directory / KERNEL

    @property
    def initrd(self) -> Path:
        return self.directory / INITRD


class DiskStore:
    """One directory of disks; ``root`` defaults to the user's."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else data_root() / "disks"

    def find(self, name: str) -> InstalledDisk | None:
        directory = self.root / name
        try:
            manifest = DiskManifest(**json.loads((directory / _MANIFEST).read_bytes()))
        except (OSError, ValueError, TypeError):  # none, or of another version
            return None
        found = InstalledDisk(manifest, directory)
        whole = all(file.is_file() for file in (found.disk, found.kernel, found.initrd))
        return found if whole else None

    def list(self) -> list[InstalledDisk]:
        names = sorted(path.parent.name for path in self.root.glob(f"*/{_MANIFEST}"))
        found = (self.find(name) for name in names if not name.startswith(_SCRATCH))
        return [disk for disk in found if disk is not None]

    def remove(self, name: str) -> InstalledDisk:
        found = self.find(name)
        if found is None:
            raise ImageError(f"there is no disk {name} in {self.root}", "see tetrarch image ls")
        # Out of sight at once, whatever a removal that is cut short leaves.
        scratch = self._scratch()
        found.directory.rename(scratch / name)
        shutil.rmtree(scratch, ignore_errors=True)
        return found

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A directory to make a disk in; it is the disk's own when the block ends well."""
        if self.find(name) is not None:
            raise ImageError(
                f"there is a disk {name} already, in {self.root / name}",
                f"give another --name, or remove it: tetrarch image rm {name}",
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            scratch = self._scratch()
        except OSError as error:
            raise self._unusable(error) from error
        try:
            yield scratch
            target = self.root / name
            shutil.rmtree(target, ignore_errors=True)  # one that is not whole
            scratch.chmod(0o700)
            scratch.rename(target)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def write_manifest(self, directory: Path, manifest: DiskManifest) -> None:
        text = json.dumps(asdict(manifest), indent=2)
        (directory / _MANIFEST).write_text(text + "\n", encoding="utf-8")

    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.root))

    def _unusable(self, error: OSError) -> ImageError:
        return ImageError(
            f"cannot write disks to {self.root}: {error.strerror or error}",
            "free the space or set XDG_DATA_HOME to another directory",
        )


def data_root() -> Path:
    # XDG Base Directory Specification: a relative path is to be ignored.
    configured = os.environ.get("XDG_DATA_HOME", "")
    base = Path(configured) if configured.startswith("/") else Path.home() / ".local/share"
    return base / "tetrarch"
