"""Debian's packages with what guests are made of, of another architecture than the host's too.

The host's apt fetches and checks them with a state of its own, so that nothing is installed and the
host's lists stay as they are: a hypervisor in /boot would be what the host starts next.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tetrarch.images.archive import unpack
from tetrarch.images.cache import default_root

__all__ = ["debian_package"]

_LIMIT_S = 600


def debian_package(name: str, architecture: str = "amd64") -> Path:
    """The directory with the files of a package; of one that only names the current kernel,
    that kernel's. It is fetched once. Skips where there is no apt or no network."""
    base = default_root() / "tests" / architecture
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = base / name
        if not root.is_dir():
            scratch = base / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            deb = _Archive(base, scratch, architecture).download(name)
            unpack(deb, scratch)
            deb.unlink()
            scratch.rename(root)
    return root


class _Archive:
    """What apt finds for one architecture."""

    def __init__(self, base: Path, directory: Path, architecture: str) -> None:
        self._state = base / "apt"
        self._directory = directory
        self._architecture = architecture

    def download(self, name: str) -> Path:
        for part in ("lists/partial", "cache/archives/partial"):
            (self._state / part).mkdir(parents=True, exist_ok=True)
        (self._state / "status").touch()
        # An archive of the host's that does not have it does not count.
        self._apt("apt-get", "update", "-qq", needed=False)
        depends = self._apt("apt-cache", "show", "--no-all-versions", name)
        if real := re.search(r"^Depends:.*\b(linux-image-\d[^ ,(]*)", depends, re.MULTILINE):
            name = real[1]
        self._apt("apt-get", "download", "-qq", name)
        return next(self._directory.glob("*.deb"))

    def _apt(self, program: str, *arguments: str, needed: bool = True) -> str:
        options = [
            f"APT::Architecture={self._architecture}",
            f"APT::Architectures={self._architecture}",
            f"Dir::State={self._state}",
            f"Dir::State::status={self._state}/status",
            f"Dir::Cache={self._state}/cache",
            "APT::Sandbox::User=root",
            "Acquire::Languages=none",
        ]
        packages = f"{self._architecture} packages"
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this host, so no {packages}")
        done = subprocess.run(
            [program, *(part for option in options for part in ("-o", option)), *arguments],
            cwd=self._directory,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        if needed and done.returncode != 0:
            pytest.skip(f"{program} {arguments[0]} of {packages}: {done.stderr.strip()[-300:]}")
        return done.stdout
