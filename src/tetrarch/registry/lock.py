"""Locks of open file descriptions (fcntl(2), F_OFD_SETLK).

The kernel lets go of one when the last descriptor of its opening is closed, however a process
ends. Whether one is held can be asked without taking it, which flock(2) offers no way to.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

__all__ = ["is_locked", "open_lock", "take", "try_take"]

#: struct flock on x86-64: type, whence, start, length, pid. A length of 0 is to the end.
_FLOCK: Final = struct.Struct("hhqqi4x")
_WHOLE_FILE: Final = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def open_lock(path: Path) -> int:
    """A descriptor of the file, which is made if it is not there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def take(descriptor: int) -> None:
    """Waits for it."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _WHOLE_FILE)


def try_take(descriptor: int) -> bool:
    """False where somebody else has it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
    except (BlockingIOError, PermissionError):  # POSIX leaves open which of the two
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether somebody has it; false where there is no such file."""
    try:
        # A FIFO that is there in its place would be waited for.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags)
    except OSError:
        return False
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _WHOLE_FILE)
    finally:
        os.close(descriptor)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
