"""Packages of the Debian archive, fetched through the host's own apt.

apt does what must not be done twice: it knows the mirrors and proxies that the
host is configured for, checks the signature of the archive's index and the
checksum of each package. Nothing here needs root, and nothing is installed:
``apt-get download`` puts a package into our cache.

The host's package lists may be missing (container images ship without them)
or old (the archive then no longer has the version they name). In that case we
keep lists of our own: a private apt state directory in the cache, with the
system's sources and keys, which ``apt-get update`` may write without root.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tetrarch._files import remove_tree
from tetrarch.images import apt
from tetrarch.images.apt import ArchiveError
from tetrarch.images.disk import require_space

__all__ = ["SCRATCH", "Archive", "ArchiveError", "Package", "is_present", "sha256_of", "unpack"]

# A meta package names the current kernel in its dependencies; the kernel's own
# package has the version in its name.
_REAL_KERNEL = re.compile(r"^(linux-image-\d[^ (|]*)")
_META_DEPTH_MAX = 4
# Debian 12's main list unpacks to 47 MB, and apt maps an index of the same size.
_LISTS_BYTES = 128 << 20
SCRATCH = ".fetch-"
"""How the names of directories for downloads under way begin."""

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all)."""


@dataclass(frozen=True)
class Package:
    """One package version as the signed index describes it."""

    name: str
    version: str
    size: int
    sha256: str
    unpacked: int
    """What its files take, in bytes."""

    @property
    def filename(self) -> str:
        """The name ``apt-get download`` gives: the epoch's colon is escaped."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_amd64.deb"


class Archive:
    """The Debian archive, seen through apt."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._private = False

    def resolve(self, name: str) -> Package:
        """The package to fetch for ``name``: for a meta package, the real kernel."""
        self._require_apt()
        try:
            return self._resolve(name)
        except ArchiveError:
            if self._private:
                raise
        self.refresh()
        return self._resolve(name)

    def refresh(self) -> None:
        """Fetches package lists into our private state; from then on they are used."""
        self._require_apt()
        self._private = True
        for part in ("lists/partial", "cache/archives/partial"):
            (self._state_dir / part).mkdir(parents=True, exist_ok=True)
        require_space({self._state_dir: _LISTS_BYTES}, "apt's package lists")
        done = apt.run(self._command("apt-get", ["update", "-q"]), self._state_dir)
        if done.returncode != 0 or apt.network_is_down(done.stderr):
            raise apt.failure(
                "apt could not fetch the package lists",
                done.stderr,
                self._state_dir,
                "check the network and apt's sources, or give --kernel and --initrd",
            )

    def download(self, package: Package, directory: Path, progress: Progress) -> Path:
        """Puts the package into ``directory`` and gives its path. A present one stays."""
        target = directory / package.filename
        if is_present(package, directory):
            return target
        self._require_apt()
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / f"{SCRATCH}{os.getpid()}"
        remove_tree(scratch)
        scratch.mkdir()
        try:
            done = apt.run(
                self._command("apt-get", ["download", "-q", f"{package.name}={package.version}"]),
                scratch,
                lambda so_far: progress(so_far, package.size),
            )
            fetched = next(scratch.glob("*.deb"), None)
            if done.returncode != 0 or fetched is None:
                raise apt.failure(
                    f"apt could not download {package.name}",
                    done.stderr if done.returncode != 0 else "no file came",
                    directory,
                    "check the network, or give --kernel and --initrd",
                )
            if sha256_of(fetched) != package.sha256:
                raise ArchiveError(
                    f"{package.name}: the file does not have the checksum of the signed index",
                    "try again, and check apt's proxy if it happens again",
                )
            progress(package.size, package.size)
            os.replace(fetched, target)
        finally:
            remove_tree(scratch)
        return target

    def _resolve(self, name: str) -> Package:
        asked = name
        for _ in range(_META_DEPTH_MAX):
            fields = self._show(name, asked)
            real = next(
                (
                    match[1]
                    for item in fields.get("Depends", "").split(",")
                    if (match := _REAL_KERNEL.match(item.strip()))
                ),
                None,
            )
            if real is None or real == name:
                return _package(name, fields)
            name = real
        raise ArchiveError(
            f"{asked}: the meta packages of the archive name each other in a circle",
            "name a package with its version, like linux-image-6.1.0-40-amd64",
        )

    def _show(self, name: str, asked: str) -> dict[str, str]:
        done = apt.run(self._command("apt-cache", ["show", "--no-all-versions", name]))
        fields: dict[str, str] = {}
        for line in done.stdout.splitlines():
            if not line.strip() and fields:
                break
            key, colon, value = line.partition(": ")
            if colon and not line.startswith(" "):
                fields[key] = value
        if done.returncode != 0 or "Filename" not in fields:
            raise ArchiveError(
                f"the archive that apt is set up for has no package {asked}",
                "name a linux-image package of Debian, or give --kernel and --initrd",
            )
        return fields

    def _command(self, program: str, arguments: Sequence[str]) -> list[str]:
        options = [
            # A package whose index no trusted key has signed is refused, whatever
            # the host's configuration says.
            "APT::Get::AllowUnauthenticated=false",
            "Acquire::AllowInsecureRepositories=false",
            # apt as root drops to the user _apt, who cannot write into our cache.
            "APT::Sandbox::User=root",
            "Acquire::Languages=none",
            # By default apt waits 1 + 2 + 4 s for each file of a mirror that is away.
            "Acquire::Retries=1",
            f"Acquire::http::Timeout={apt.NETWORK_TIMEOUT_S}",
            f"Acquire::https::Timeout={apt.NETWORK_TIMEOUT_S}",
        ]
        if self._private:
            options += [
                f"Dir::State={self._state_dir}",
                f"Dir::State::lists={self._state_dir}/lists",
                "Dir::State::status=/var/lib/dpkg/status",
                f"Dir::Cache={self._state_dir}/cache",
            ]
        return [program, *(part for option in options for part in ("-o", option)), *arguments]

    def _require_apt(self) -> None:
        for program in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(program) is None:
                raise ArchiveError(
                    f"no {program} on this host, so no Debian kernel can be fetched",
                    "give --kernel and --initrd, or install apt and dpkg",
                )


def unpack(deb: Path, directory: Path) -> None:
    """Unpacks the files of a package, without its scripts."""
    done = apt.run(["dpkg-deb", "--extract", str(deb), str(directory)], directory)
    if done.returncode != 0:
        raise apt.failure(
            f"cannot unpack {deb.name}", done.stderr, directory, f"remove {deb} and try again"
        )


def is_present(package: Package, directory: Path) -> bool:
    """Whether the package lies there whole."""
    target = directory / package.filename
    return target.is_file() and sha256_of(target) == package.sha256


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _package(name: str, fields: dict[str, str]) -> Package:
    try:
        return Package(
            name,
            fields["Version"],
            int(fields["Size"]),
            fields["SHA256"],
            int(fields.get("Installed-Size", 0)) << 10,
        )
    except (KeyError, ValueError) as error:
        raise ArchiveError(
            f"the archive's index has no usable entry for {name}", "name another package"
        ) from error
