"""Files that are there when they are whole, and not before.

Until then one is a `.part` beside it, which is locked (flock(2)) by who writes it: what a process
left that was killed goes when the next file is written there.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO, Final

from tetrarch.errors import HostError

__all__ = ["host_errors", "new_file"]

_BUFFER: Final = 1 << 20
_PREFIX: Final = ".tetrarch-"
_SUFFIX: Final = ".part"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_file(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file for its owner alone, which replaces one of that name at the end, if it gets there.

    ``what`` is what is done, for the HostError where it cannot be: "save the machine".
    """
    with host_errors(f"{what} to {path}"):
        # A device or a socket would be replaced by the file.
        if "\0" in str(path) or (path.exists() and not path.is_file()):
            raise HostError(
                f"cannot {what} to {path}: it is no regular file", mend="name another file"
            )
        _remove_what_the_dead_left(path.parent)
        descriptor, scratch = _locked_file(path.parent)
        try:
            with os.fdopen(descriptor, "wb", buffering=_BUFFER) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                # While it is locked: it has a name of its own then.
                scratch.replace(path)
        except BaseException:
            with suppress(OSError):
                scratch.unlink()
            raise


@contextmanager
def host_errors(what: str) -> Iterator[None]:
    """A HostError where the host does not let ``what`` be done with a file."""
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot {what}: {error.strerror or error}",
            mend="free the space" if error.errno in _FULL else "name another file",
        ) from error


def _locked_file(directory: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = mkstemp(_SUFFIX, _PREFIX, directory)
        # One that somebody found before it was locked, and took for left behind, has gone; where
        # the file system has no locks nobody takes it for that.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):
            return descriptor, Path(name)
        os.close(descriptor)


def _remove_what_the_dead_left(directory: Path) -> None:
    for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # another user's, or one that is being written
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)
