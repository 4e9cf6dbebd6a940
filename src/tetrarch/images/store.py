"""Installed disks, under XDG_DATA_HOME/tetrarch/disks: what a guest writes is the user's data.

    NAME/disk.raw       the disk
    NAME/vmlinuz        its kernel and initial RAM disk, to boot it without firmware
    NAME/initrd.img
    NAME/disk.json      what it is: append line, packages, when and of what it was made

A disk is made in a directory beside them, .build-NAME, which its maker has locked (flock(2)), and
which is renamed when it is whole. One that nobody has locked was left by a maker that was killed,
and goes when the next disk is made or removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from tetrarch._files import read_bounded, remove_tree, replaced_when_whole
from tetrarch.block.disk import open_disk
from tetrarch.block.spec import DiskSpec
from tetrarch.errors import ImageError
from tetrarch.images.disk import unusable_mend

__all__ = [
    "DISK",
    "INITRD",
    "KERNEL",
    "DiskManifest",
    "DiskStore",
    "InstalledDisk",
    "data_root",
    "read_manifest",
]

DISK = "disk.raw"
KERNEL = "vmlinuz"
INITRD = "initrd.img"
_MANIFEST = "disk.json"
_SCRATCH = ".build-"
_REMOVED = ".removed-"


@dataclass(frozen=True)
class DiskManifest:
    name: str
    append: str
    """The kernel command line that finds the root file system."""
    release: str
    suite: str
    packages: dict[str, str] = field(default_factory=dict)
    """Package -> version, of all that is installed."""
    asked: list[str] = field(default_factory=list)
    """The packages that were asked for; the others are for their sake."""
    time: int = 0
    """When it was made, in seconds since 1970; the same build has the same."""


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
            manifest = read_manifest(directory / _MANIFEST)
        except ImageError:
            return None
        found = InstalledDisk(manifest, directory)
        # A disk may be a link to a volume.
        whole = all(file.exists() for file in (found.disk, found.kernel, found.initrd))
        return found if whole else None

    def list(self) -> list[InstalledDisk]:
        names = sorted(path.parent.name for path in self.root.glob(f"*/{_MANIFEST}"))
        found = (self.find(name) for name in names if not name.startswith("."))
        return [disk for disk in found if disk is not None]

    def remove(self, name: str) -> InstalledDisk:
        found = self.find(name)
        if found is None:
            raise ImageError(f"there is no disk {name} in {self.root}", "see tetrarch image ls")
        # Refused while a machine has it.
        disk = open_disk(DiskSpec(found.disk, format="raw"))
        try:
            # Out of sight at once, whatever a removal that is cut short leaves.
            found.directory.rename(self.root / f"{_REMOVED}{uuid.uuid4()}")
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            disk.close()
        self._sweep()
        return found

    def _sweep(self) -> None:
        """Takes away what those have left who were killed while they made or removed a disk."""
        for path in self.root.glob(f"{_REMOVED}*"):
            remove_tree(path)
        for path in self.root.glob(f"{_SCRATCH}*"):
            with suppress(OSError):
                lock = _lock(path)
                if lock is not None:
                    remove_tree(path)
                    os.close(lock)

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A directory to make a disk in; it is the disk's own when the block ends well.

        Raises ImageError where there is such a disk, or another is making it.
        """
        scratch = self.root / f"{_SCRATCH}{name}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = _lock(scratch)
        except OSError as error:
            raise self._unusable(error) from error
        if lock is None:
            raise ImageError(
                f"a disk {name} is being made already, in {self.root}",
                "wait until it is done, or give another --name",
            )
        try:
            # Only now: who had the lock before may have made it.
            if self.find(name) is not None:
                raise ImageError(
                    f"there is a disk {name} already, in {self.root / name}",
                    f"give another --name, or remove it: tetrarch image rm {name}",
                )
            target = self.root / name
            if target.exists():  # of another version, perhaps: it may be somebody's data
                raise ImageError(
                    f"{target} is there, and no disk that can be read",
                    "give another --name, or move it away",
                )
            _empty(scratch)
            self._sweep()
            yield scratch
            scratch.rename(target)
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            remove_tree(scratch)
            os.close(lock)

    def write_manifest(self, directory: Path, manifest: DiskManifest) -> None:
        (directory / _MANIFEST).write_text(_text(manifest), encoding="utf-8")

    def set_release(self, found: InstalledDisk, release: str) -> InstalledDisk:
        """Writes down that the disk has another kernel now."""
        manifest = replace(found.manifest, release=release)
        with replaced_when_whole(found.directory / _MANIFEST) as file:
            file.write(_text(manifest).encode())
        return replace(found, manifest=manifest)

    def _unusable(self, error: OSError) -> ImageError:
        return ImageError(
            f"cannot write disks to {self.root}: {error.strerror or error}",
            unusable_mend(error, "XDG_DATA_HOME"),
        )


def _text(manifest: DiskManifest) -> str:
    return json.dumps(asdict(manifest), indent=2) + "\n"


def read_manifest(path: Path) -> DiskManifest:
    """What a later version has added is left out. Raises ImageError for what is none."""
    try:
        values = json.loads(read_bounded(path))
        known = {field.name for field in fields(DiskManifest)}
        manifest = DiskManifest(**{name: values[name] for name in values if name in known})
        texts = [*manifest.packages, *manifest.packages.values(), *manifest.asked]
        sound = isinstance(manifest.asked, list) and all(isinstance(text, str) for text in texts)
        words = (manifest.name, manifest.append, manifest.release, manifest.suite)
        sound = sound and all(isinstance(word, str) for word in words)
        # What ext4 can write down.
        sound = sound and type(manifest.time) is int and 0 <= manifest.time < 1 << 34
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", "name a disk.json") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(f"{path} describes no disk", "name the disk.json of one") from error
    if not sound:
        raise ImageError(f"{path} describes no disk", "name the disk.json of one")
    return manifest


def _lock(directory: Path) -> int | None:
    """Makes the directory and locks it; None where another has it. The lock ends with the
    descriptor."""
    while True:
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # its maker was done in between
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), directory.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except FileNotFoundError:
            pass
        # What was locked has another name by now: it is a disk that is whole.
        os.close(lock)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def data_root() -> Path:
    # XDG Base Directory Specification: a relative path is to be ignored.
    configured = os.environ.get("XDG_DATA_HOME", "")
    base = Path(configured) if configured.startswith("/") else Path.home() / ".local/share"
    return base / "tetrarch"
