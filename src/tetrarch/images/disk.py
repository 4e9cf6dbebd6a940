"""Room on the disks that a guest is fetched to and built on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from tetrarch.errors import ImageError

__all__ = ["NoSpaceError", "no_space", "require_size", "require_space", "unusable_mend"]


class NoSpaceError(ImageError):
    """A disk is full, or would be."""


def require_space(needs: Mapping[Path, int], what: str) -> None:
    """Refuses at once what would fill a disk; directories on one disk add up."""
    disks: dict[int, tuple[Path, int]] = {}
    for directory, size in needs.items():
        there = next(path for path in (directory, *directory.parents) if path.exists())
        first, so_far = disks.setdefault(there.stat().st_dev, (directory, 0))
        disks[there.stat().st_dev] = (first, so_far + size)
    for directory, size in disks.values():
        there = next(path for path in (directory, *directory.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < size:
            raise no_space(
                f"{what} ({size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free)", directory
            )


def require_size(disk: Path, size: int) -> None:
    """Says now whether the host's file system takes so large a file; it is there then."""
    try:
        with disk.open("wb") as file:
            file.truncate(size)
    except OSError as error:
        raise ImageError(
            f"no file of {_shown(size)} can be made in {disk.parent}: {error.strerror}",
            "give a smaller --size, or set XDG_DATA_HOME to a directory on another file system",
        ) from error


def _shown(size: int) -> str:
    return f"{size >> 30} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def unusable_mend(error: OSError, variable: str) -> str:
    """What to do about a directory that cannot be written to, which ``variable`` sets."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    first = "free some space" if full else "give yourself the right to write there"
    return f"{first}, or set {variable} to another directory"


def no_space(what: str, directory: Path) -> NoSpaceError:
    return NoSpaceError(
        f"the disk of {directory} has no room for {what}",
        "free some, or name another disk: XDG_CACHE_HOME for the cache, XDG_DATA_HOME for what is "
        "built, TMPDIR to unpack on",
    )
