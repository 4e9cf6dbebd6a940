"""Running the programs of apt and dpkg: without a terminal, and never for ever."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tetrarch.errors import ImageError
from tetrarch.images.disk import no_space, require_space
from tetrarch.images.tool import end_group, start_group

__all__ = ["NETWORK_TIMEOUT_S", "ArchiveError", "failure", "network_is_down", "run"]

NETWORK_TIMEOUT_S = 20
"""How long apt is to wait for a mirror that stays silent; twice, as it tries each file again."""
# Whatever does nothing for so long does not come back. Longer pauses without a fault than for the
# network are not known: apt reads its lists in some seconds.
SILENCE_S = 60.0
_POLL_S = 0.1
_PAUSE_S = 3.0
# Room for one more small file, which a disk that stopped apt has not.
_SMALL_FILE = 1 << 20

# What apt says when it could not reach a mirror at all (apt-pkg/acquire-worker.cc
# and the connect method), with LC_ALL=C.
_NETWORK_SIGNS = (
    "Temporary failure resolving",
    "Could not resolve",
    "Could not connect",
    "Unable to connect",
    "Connection timed out",
    "Connection failed",
    "Network is unreachable",
    "Failed to fetch",
)
# And what apt or dpkg-deb says on a full disk (strerror(3), apt-pkg/acquire-item.cc).
_SPACE_SIGNS = ("No space left on device", "enough free space", "Disk quota exceeded")


class ArchiveError(ImageError):
    """A package could not be fetched or opened."""


def run(
    command: Sequence[str],
    writes_to: Path | None = None,
    progress: Callable[[int], None] = lambda so_far: None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, or until it has written nothing for too long.

    ``progress`` hears how many bytes lie in the directory that it writes to.
    """
    with start_group(
        command,
        cwd=writes_to,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            output, complaint = _follow(process, command[0], writes_to, progress)
        except BaseException:
            end_group(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, complaint)


def _follow(
    process: subprocess.Popen[str],
    program: str,
    writes_to: Path | None,
    progress: Callable[[int], None],
) -> tuple[str, str]:
    so_far, since = 0, time.monotonic()
    while True:
        try:
            return process.communicate(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            pass
        seen = _bytes_in(writes_to) if writes_to is not None else 0
        if seen != so_far:
            so_far, since = seen, time.monotonic()
            progress(so_far)
            continue
        quiet = time.monotonic() - since
        if quiet > _PAUSE_S and writes_to is not None:
            # On a full disk apt-get update waits for ever.
            require_space({writes_to: _SMALL_FILE}, f"what {program} writes")
        if quiet > SILENCE_S:
            raise ArchiveError(
                f"{program} did nothing for {SILENCE_S:g} s",
                "check the network and apt's sources, or give --kernel and --initrd",
            )


def failure(what: str, complaint: str, directory: Path, mend: str) -> ImageError:
    """The error for a program that failed: the disk's or its own."""
    if any(sign in complaint for sign in _SPACE_SIGNS):
        return no_space("what is fetched and unpacked there", directory)
    return ArchiveError(f"{what}: {_first_complaint(complaint)}", mend)


def network_is_down(complaint: str) -> bool:
    # apt-get update ends with 0 when it only failed to fetch.
    return any(sign in complaint for sign in _NETWORK_SIGNS)


def _first_complaint(complaint: str) -> str:
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    for prefix in ("E: ", "W: "):
        for line in lines:
            if line.startswith(prefix):
                return line.removeprefix(prefix).rstrip(".")
    return lines[-1] if lines else "no reason given"


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed between the listing and the look
            continue
    return total
