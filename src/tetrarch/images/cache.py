"""The cache of guests, under XDG_CACHE_HOME/tetrarch.

    packages/                       what was fetched, as Debian packages
    apt/                            package lists of our own (see archive.py)
    images/NAME.json                the manifest of a guest: what it is, where it is
    images/NAME-DIGEST/             its kernel and its initramfs
                                    (whatever no manifest names goes with the next change)
    lock                            held by whoever writes

A guest's directory never changes once its manifest names it: a new build gets a
new directory, and the manifest is replaced in one step. So a run needs no lock,
and one that is killed halfway leaves nothing that a later one would trust.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tetrarch._files import read_bounded, remove_tree
from tetrarch.errors import ImageError
from tetrarch.images.archive import SCRATCH, sha256_of
from tetrarch.images.default_guest import RECIPE_VERSION, BuiltGuest
from tetrarch.images.disk import unusable_mend

__all__ = ["Cache", "CacheError", "CachedGuest", "Manifest", "default_root"]

_KERNEL = "vmlinuz"
_INITRD = "initrd.gz"


class CacheError(ImageError):
    """The cache cannot be read or written."""


@dataclass(frozen=True)
class Manifest:
    """One cached guest."""

    name: str
    directory: str
    release: str
    package: str
    version: str
    recipe: int
    packages: dict[str, str]
    """File name in packages/ -> its SHA-256."""
    sha256: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CachedGuest:
    manifest: Manifest
    kernel: Path
    initrd: Path


class Cache:
    """One cache directory; ``root`` defaults to the user's."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root()

    @property
    def packages(self) -> Path:
        return self.root / "packages"

    @property
    def apt(self) -> Path:
        return self.root / "apt"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def find(self, name: str) -> CachedGuest | None:
        """The guest if it is there whole, else None."""
        manifest = self._manifest(self.images / f"{name}.json")
        if manifest is None:
            return None
        directory = self.images / manifest.directory
        for file, size in manifest.sizes.items():
            try:
                if (directory / file).stat().st_size != size:
                    return None
            except OSError:
                return None
        return CachedGuest(manifest, directory / _KERNEL, directory / _INITRD)

    def list(self) -> list[CachedGuest]:
        names = sorted(path.stem for path in self.images.glob("*.json"))
        return [guest for name in names if (guest := self.find(name)) is not None]

    def store(
        self, name: str, guest: BuiltGuest, package: str, version: str, packages: dict[str, str]
    ) -> CachedGuest:
        """Puts a built guest in, replacing one of the same name. Call it under lock()."""
        files = {_KERNEL: guest.kernel, _INITRD: guest.initrd}
        digests = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
        identity = hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:12]
        manifest = Manifest(
            name=name,
            directory=f"{name}-{identity}",
            release=guest.release,
            package=package,
            version=version,
            recipe=RECIPE_VERSION,
            packages=packages,
            sha256=digests,
            sizes={file: len(data) for file, data in files.items()},
        )
        directory = self.images / manifest.directory
        if any(_digest(directory / file) != digest for file, digest in digests.items()):
            self._write_directory(directory, files)
        _write_atomically(
            self.images / f"{name}.json", json.dumps(asdict(manifest), indent=2).encode() + b"\n"
        )
        self._sweep()
        found = self.find(name)
        if found is None:
            raise CacheError(
                f"the guest written to {directory} cannot be read back", "check the disk"
            )
        return found

    def remove(self, name: str) -> CachedGuest:
        """Takes a guest out, with what no other needs; gives what it was. Call it under lock()."""
        path = self.images / f"{name}.json"
        manifest = self._manifest(path)
        if manifest is None:
            raise CacheError(f"no guest {name} is cached in {self.root}", "see tetrarch image ls")
        path.unlink()
        self._sweep()
        directory = self.images / manifest.directory
        return CachedGuest(manifest, directory / _KERNEL, directory / _INITRD)

    def _sweep(self) -> None:
        """Removes what no manifest names: older builds and packages, and what was cut short.

        What another version of ours has put here cannot be read, and stays: it may be in use.
        """
        manifests = [self._manifest(path) for path in self.images.glob("*.json")]
        known = [manifest for manifest in manifests if manifest is not None]
        if len(known) < len(manifests):
            return
        directories = {manifest.directory for manifest in known}
        for path in self.images.iterdir():
            if path.is_dir() and path.name not in directories:
                remove_tree(path)
        packages = {name for manifest in known for name in manifest.packages}
        for path in self.packages.iterdir():
            if path.name.startswith(SCRATCH):
                remove_tree(path)
            elif path.name not in packages:
                path.unlink(missing_ok=True)
        if not known:  # the package lists of our own serve the next pull only
            remove_tree(self.apt)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while writing, so that runs at the same time do the work once."""
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            self.packages.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            os.close(descriptor)

    def _unusable(self, error: OSError) -> CacheError:
        return CacheError(
            f"cannot write the cache {self.root}: {error.strerror or error}",
            unusable_mend(error, "XDG_CACHE_HOME"),
        )

    def _manifest(self, path: Path) -> Manifest | None:
        try:
            manifest = Manifest(**json.loads(read_bounded(path)))
        except (OSError, ValueError, TypeError, RecursionError):  # missing, or of another version
            return None
        return manifest if _is_sound(manifest) else None

    def _write_directory(self, directory: Path, files: dict[str, bytes]) -> None:
        scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=self.images))
        try:
            for file, data in files.items():
                _write_atomically(scratch / file, data)
            scratch.chmod(0o755)
            remove_tree(directory)
            os.rename(scratch, directory)
        finally:
            remove_tree(scratch)


def default_root() -> Path:
    # XDG Base Directory Specification: a relative path is to be ignored.
    configured = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(configured) if configured.startswith("/") else Path.home() / ".cache"
    return base / "tetrarch"


def _is_sound(manifest: Manifest) -> bool:
    """Whether its values are what they are to be: the directory is removed with the guest."""
    texts = [manifest.name, manifest.release, manifest.package, manifest.version]
    tables: list[tuple[object, type]] = [
        (manifest.packages, str),
        (manifest.sha256, str),
        (manifest.sizes, int),
    ]
    return (
        all(isinstance(text, str) for text in [*texts, manifest.directory])
        and manifest.directory not in ("", ".", "..")
        and "/" not in manifest.directory
        and isinstance(manifest.recipe, int)
        and all(
            isinstance(table, dict) and all(isinstance(value, kind) for value in table.values())
            for table, kind in tables
        )
    )


def _digest(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


def _write_atomically(path: Path, data: bytes) -> None:
    descriptor, scratch = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
