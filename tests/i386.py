"""Debian's i386 packages, for guests of 32-bit code.

The host's apt fetches and checks them with a state of its own, so that nothing is installed and the
host's lists stay as they are.
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

__all__ = ["i386_package"]

_LIMIT_S = 600


def i386_package(name: str) -> Path:
    """The directory with the files of a package; of one that only names the current kernel,
    that kernel's. It is fetched once. Skips where there is no apt or no network."""
    base = default_root() / "tests" / "i386"
    base.mkdir(parents=True, exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = base / name
        if not root.is_dir():
            scratch = base / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            deb = _download(base, scratch, name)
            unpack(deb, scratch)
            deb.unlink()
            scratch.rename(root)
    return root


def _download(base: Path, directory: Path, name: str) -> Path:
    state = base / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    # An archive of the host's that has no i386 does not count.
    _apt(state, directory, "apt-get", "update", "-qq", needed=False)
    depends = _apt(state, directory, "apt-cache", "show", "--no-all-versions", name)
    if real := re.search(r"^Depends:.*\b(linux-image-\d[^ ,(]*)", depends, re.MULTILINE):
        name = real[1]
    _apt(state, directory, "apt-get", "download", "-qq", name)
    return next(directory.glob("*.deb"))


def _apt(state: Path, directory: Path, program: str, *arguments: str, needed: bool = True) -> str:
    options = [
        "APT::Architecture=i386",
        "APT::Architectures=i386",
        f"Dir::State={state}",
        f"Dir::State::status={state}/status",
        f"Dir::Cache={state}/cache",
        "APT::Sandbox::User=root",
        "Acquire::Languages=none",
    ]
    if shutil.which(program) is None:
        pytest.skip(f"no {program} on this host, so no i386 packages")
    done = subprocess.run(
        [program, *(part for option in options for part in ("-o", option)), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if needed and done.returncode != 0:
        pytest.skip(f"{program} {arguments[0]} of i386 packages: {done.stderr.strip()[-300:]}")
    return done.stdout
