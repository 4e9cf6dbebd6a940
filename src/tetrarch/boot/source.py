"""Files to boot from: opened, measured and read with errors in the user's words."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from tetrarch.boot.layout import GuestMemory
from tetrarch.errors import BootError

__all__ = ["Source", "copy_to_guest", "zero_guest"]

#: Large enough to make the per-call cost vanish, small enough to stay in cache and out of swap.
CHUNK: Final = 1 << 20


class Source:
    """A file of known size; reads are bounded and never short.

    Read, not mapped: a mapped file that shrinks while it is used would kill the process
    with SIGBUS. Read at a place: a confined vCPU has no call to go to one.
    """

    def __init__(
        self,
        read_at: Callable[[int, int], bytes],
        size: int,
        what: str,
        path: str,
        start: int = 0,
    ) -> None:
        """``read_at`` takes offset and length; what of the file there is begins at ``start``."""
        self._read_at = read_at
        self._start = start
        self.size = size
        self.what = what
        self.path = path

    def error(self, cause: str, mend: str) -> BootError:
        return BootError(f"{self.what} {self.path}: {cause}", mend=mend)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.error(
                f"is cut short: {offset + length} bytes are needed, it has {self.size}",
                mend="get the file again",
            )
        try:
            data = self._read_at(self._start + offset, length)
        except OSError as error:
            cause = f"cannot be read: {error.strerror or error}"
            raise self.error(
                cause, mend="look into the host's kernel log, or get it again"
            ) from error
        if len(data) != length:
            raise self.error("got shorter while it was read", mend="try again when it is complete")
        return data

    def part(self, offset: int, size: int, what: str) -> "Source":
        """Some of it, which is within it, as one of its own."""
        return Source(self._read_at, size, what, self.path, self._start + offset)

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike[str], what: str) -> "Iterator[Source]":
        name = os.fspath(path)
        try:
            # O_NONBLOCK: a FIFO without a writer must give an error, not wait for ever.
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise BootError(*_why_not_open(f"{what} {name}", error)) from error
        try:
            info = os.fstat(fd)
            if stat.S_ISDIR(info.st_mode):
                raise BootError(f"{what} {name}: is a directory", mend="name the file in it")
            if not stat.S_ISREG(info.st_mode):
                raise BootError(
                    f"{what} {name}: is not a regular file", mend="copy it to one first"
                )
            if info.st_size == 0:
                raise BootError(f"{what} {name}: is empty", mend="get the file again")
            yield cls(lambda at, length: os.pread(fd, length, at), info.st_size, what, name)
        finally:
            os.close(fd)


def _why_not_open(what: str, error: OSError | ValueError) -> tuple[str, str]:
    """Cause and mend."""
    if isinstance(error, FileNotFoundError):
        return f"{what}: no such file", "check the path"
    if isinstance(error, PermissionError):
        return f"{what}: no permission to read it", (
            "make it readable (Debian's kernels in /boot are readable, some initrds only by root)"
        )
    if not isinstance(error, OSError):
        return f"{what}: {error}", "name another file"
    if error.errno == errno.EMFILE:
        return f"{what}: {error.strerror}", "raise the limit: ulimit -n"
    return f"{what}: {error.strerror}", "name another file"


def copy_to_guest(vm: GuestMemory, address: int, source: Source, offset: int, length: int) -> None:
    done = 0
    while done < length:
        chunk = source.read(offset + done, min(CHUNK, length - done))
        vm.write_memory(address + done, chunk)
        done += len(chunk)


def zero_guest(vm: GuestMemory, address: int, length: int) -> None:
    zeros = bytes(min(CHUNK, length))
    done = 0
    while done < length:
        step = min(CHUNK, length - done)
        vm.write_memory(address + done, zeros[:step])
        done += step
