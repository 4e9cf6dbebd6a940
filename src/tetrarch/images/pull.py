"""From a name to a guest in the cache: fetch what is missing, build, store."""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tetrarch.errors import ConfigError, ImageError
from tetrarch.images.archive import Archive, ArchiveError, Package, is_present, sha256_of
from tetrarch.images.cache import Cache, CachedGuest
from tetrarch.images.default_guest import (
    BUSYBOX_PACKAGE,
    RECIPE_VERSION,
    BuiltGuest,
    build_guest,
)
from tetrarch.images.disk import require_space
from tetrarch.images.progress import Reporter

__all__ = [
    "DEFAULT_IMAGE",
    "IMAGES",
    "UnknownImageError",
    "build",
    "ensure",
    "package_of",
    "pull",
    "rebuild",
    "remove",
]

DEFAULT_IMAGE = "debian"

# The names a user types, and the meta package of Debian behind each.
IMAGES = {
    "debian": "linux-image-cloud-amd64",
    "debian-amd64": "linux-image-amd64",
    "debian-rt": "linux-image-rt-amd64",
}

_PACKAGE_NAME = re.compile(r"^linux-image-[a-z0-9][a-z0-9.+-]*$")


class UnknownImageError(ConfigError):
    """A name that is no image of ours and no Debian kernel package."""


def package_of(name: str, beside: Callable[[], Iterable[str]] = tuple) -> str:
    """The Debian package that an image name stands for. ``beside`` gives the other names that
    could have been meant."""
    if name in IMAGES:
        return IMAGES[name]
    if _PACKAGE_NAME.match(name):
        return name
    near = difflib.get_close_matches(name.lower(), {*IMAGES, *beside()}, n=1)
    known = f"there are {', '.join(IMAGES)}, and any linux-image package of Debian"
    raise UnknownImageError(
        f"no image is called {name!r}", f"did you mean {near[0]}?" if near else known
    )


def ensure(cache: Cache, name: str, reporter: Reporter) -> CachedGuest:
    """The cached guest, without network if it is there; else it is pulled."""
    package_of(name)
    guest = cache.find(name)
    if guest is not None and guest.manifest.recipe == RECIPE_VERSION:
        return guest
    with cache.lock():
        guest = cache.find(name)  # another run may have built it while we waited
        if guest is not None and guest.manifest.recipe == RECIPE_VERSION:
            return guest
        if guest is not None and _packages_are_whole(cache, guest):
            return _rebuild(cache, guest)
        return _pull(cache, name, reporter)


def pull(cache: Cache, name: str, reporter: Reporter) -> CachedGuest:
    """Fetches the newest version that apt knows, and builds the guest from it."""
    package_of(name)
    with cache.lock():
        return _pull(cache, name, reporter)


def rebuild(cache: Cache, name: str) -> CachedGuest:
    """Builds the cached guest anew from the cached packages, without network."""
    with cache.lock():
        return _rebuild(cache, _with_packages(cache, name))


def remove(cache: Cache, name: str) -> CachedGuest:
    """Takes a guest out of the cache, and the packages that no other guest is built from."""
    package_of(name)
    with cache.lock():
        return cache.remove(name)


def build(cache: Cache, name: str, overlay: Path | None) -> BuiltGuest:
    """Builds from the cached packages, without network; the cache stays as it is."""
    if overlay is not None and not overlay.is_dir():
        raise ImageError(f"{overlay} is no directory", "name one whose files go into the initramfs")
    return build_guest(*_debs(cache, _with_packages(cache, name)), overlay=overlay)


def _with_packages(cache: Cache, name: str) -> CachedGuest:
    package_of(name)
    guest = cache.find(name)
    if guest is None or not _packages_are_whole(cache, guest):
        raise ArchiveError(
            f"the packages of {name} are not in the cache", f"run: tetrarch image pull {name}"
        )
    return guest


def _pull(cache: Cache, name: str, reporter: Reporter) -> CachedGuest:
    archive = Archive(cache.apt)
    with reporter.step(f"Looking up {package_of(name)}"):
        kernel = archive.resolve(package_of(name))
        busybox = archive.resolve(BUSYBOX_PACKAGE)
    known = cache.find(name)
    if (
        known is not None
        and known.manifest.recipe == RECIPE_VERSION
        and known.manifest.packages == {p.filename: p.sha256 for p in (kernel, busybox)}
    ):
        return known
    try:
        debs = _fetch(archive, cache, (kernel, busybox), reporter)
    except ArchiveError:
        # The lists may name versions that the mirror has since dropped.
        with reporter.step("Fetching newer package lists"):
            archive.refresh()
        kernel = archive.resolve(package_of(name))
        busybox = archive.resolve(BUSYBOX_PACKAGE)
        debs = _fetch(archive, cache, (kernel, busybox), reporter)
    with reporter.step(f"Building the initramfs for {kernel.name}"):
        built = build_guest(debs[0], debs[1])
        return cache.store(
            name,
            built,
            package=kernel.name,
            version=kernel.version,
            packages={package.filename: package.sha256 for package in (kernel, busybox)},
        )


def _fetch(
    archive: Archive, cache: Cache, packages: Sequence[Package], reporter: Reporter
) -> list[Path]:
    missing = [package for package in packages if not is_present(package, cache.packages)]
    to_fetch = sum(package.size for package in missing)
    require_space(
        {
            # The guest is made of what is in the packages, compressed anew.
            cache.root: to_fetch + sum(package.size for package in packages),
            Path(tempfile.gettempdir()): sum(package.unpacked for package in packages),
        },
        f"{packages[0].name}: to fetch it, unpack it and build a guest of it",
    )
    return [_download(archive, cache, package, reporter) for package in packages]


def _download(archive: Archive, cache: Cache, package: Package, reporter: Reporter) -> Path:
    if is_present(package, cache.packages):
        return cache.packages / package.filename
    with reporter.transfer(f"{package.name} {package.version}", package.size) as progress:
        return archive.download(package, cache.packages, progress)


def _rebuild(cache: Cache, guest: CachedGuest) -> CachedGuest:
    manifest = guest.manifest
    built = build_guest(*_debs(cache, guest))
    return cache.store(manifest.name, built, manifest.package, manifest.version, manifest.packages)


def _debs(cache: Cache, guest: CachedGuest) -> tuple[Path, Path]:
    kernel, busybox = (cache.packages / file for file in guest.manifest.packages)
    return kernel, busybox


def _packages_are_whole(cache: Cache, guest: CachedGuest) -> bool:
    packages = guest.manifest.packages
    return len(packages) == 2 and all(
        (cache.packages / file).is_file() and sha256_of(cache.packages / file) == digest
        for file, digest in packages.items()
    )
