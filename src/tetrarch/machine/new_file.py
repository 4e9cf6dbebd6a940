"""Files that are there when they are whole, and not before."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO, Final

from tetrarch.errors import HostError

__all__ = ["new_file"]

_BUFFER: Final = 1 << 20
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_file(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file for its owner alone, which replaces one of that name at the end, if it gets there.

    ``what`` is what is done, for the HostError where it cannot be: "save the machine".
    """
    try:
        # A device or a socket would be replaced by the file.
        if "\0" in str(path) or (path.exists() and not path.is_file()):
            raise HostError(
                f"cannot {what} to {path}: it is no regular file", mend="name another file"
            )
        descriptor, scratch = mkstemp(".part", ".tetrarch-", path.parent)
        try:
            with os.fdopen(descriptor, "wb", buffering=_BUFFER) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(scratch).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(scratch).unlink()
            raise
    except OSError as error:
        raise HostError(
            f"cannot {what} to {path}: {error.strerror or error}",
            mend="free the space" if error.errno in _FULL else "name another file",
        ) from error
