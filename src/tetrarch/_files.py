"""Files that a user names, and that may be anything: opened without waiting, read within bounds."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from tetrarch.errors import ConfigError

__all__ = [
    "ScratchDirectory",
    "open_regular",
    "open_to_write",
    "read_bounded",
    "read_text",
    "remove_tree",
    "replaced_when_whole",
    "write_all",
]

#: Far above any description of a machine, and any list of packages or keys.
_BYTES_MAX = 1 << 20


def read_bounded(path: Path, most: int = _BYTES_MAX) -> bytes:
    """All that a file holds. A FIFO without a writer is empty.

    Raises OSError where it cannot be read, or has more than ``most`` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        os.set_blocking(descriptor, True)  # a writer that is there may take its time
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB", str(path))
    return data


def open_regular(path: str | Path) -> int:
    """A descriptor that reads a file. Raises OSError, also for what is none: a FIFO would be waited
    for, and a device has no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is no regular file", str(path))


def open_to_write(path: Path, mode: int = 0o666, buffering: int = 0) -> BinaryIO:
    """An emptied or new file. Raises OSError, so for a FIFO that nobody reads."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ENXIO and path.is_fifo():
            raise OSError(errno.ENXIO, "nobody reads the FIFO yet", str(path)) from error
        raise
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "wb", buffering=buffering)


def write_all(path: Path, data: bytes) -> None:
    """As ``Path.write_bytes``, but that a FIFO which nobody reads is an OSError."""
    with open_to_write(path, buffering=-1) as file:
        file.write(data)


def remove_tree(path: str | Path) -> None:
    """A directory and what is in it, as far as the host lets it. Where a signal interrupts it, it
    goes on before what the signal raised does."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


class ScratchDirectory(tempfile.TemporaryDirectory[str]):
    """A temporary directory that is gone at the end, also where a signal comes just then."""

    def cleanup(self) -> None:
        try:
            super().cleanup()
        finally:
            remove_tree(self.name)


@contextmanager
def replaced_when_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at ``path`` when the block ends well, and else goes:
    what was there stays until then. Raises OSError. What is no regular file is written as it is.
    """
    if path.exists() and not path.is_file():
        with open_to_write(path) as there:
            yield there
        return
    target = path.resolve()
    with tempfile.NamedTemporaryFile(
        prefix=f".{target.name[:100]}-", dir=target.parent, delete=False
    ) as file:
        scratch = Path(file.name)
        try:
            yield cast(BinaryIO, file.file)
            file.flush()
            scratch.chmod(_usual_mode() if not target.exists() else target.stat().st_mode & 0o777)
            scratch.replace(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def _usual_mode() -> int:
    """Of a new file; the mask can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def read_text(path: Path, what: str) -> str:
    """Raises ConfigError for a file that cannot be read, and so is no ``what``."""
    try:
        return read_bounded(path).decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", mend="name a readable file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no {what}: {error}", mend="correct it") from error
    except ValueError as error:  # a zero byte
        raise ConfigError(f"{str(path)!r} is no file name", mend="name a file") from error
