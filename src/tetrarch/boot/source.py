"""Files to boot from: opened, measured and read with errors in the user's words."""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final

from tetrarch.boot.layout import (
    LOW_RAM_MAX,
    PAGE_SIZE,
    GuestMemory,
    align_down,
    align_up,
    mib_up,
    total_ram,
)
from tetrarch.errors import BootError

__all__ = [
    "Source",
    "copy_to_guest",
    "enough_memory",
    "load_initrd",
    "place_initrd",
    "too_little_memory",
    "unpacked_size",
    "warn_of_little_memory",
    "zero_guest",
]

#: Large enough to make the per-call cost vanish, small enough to stay in cache and out of swap.
CHUNK: Final = 1 << 20

log = logging.getLogger(__name__)

GZIP_MAGIC: Final = b"\x1f\x8b"
CPIO_MAGIC: Final = b"0707"
#: A file that says to be packed by more has lost its end: initrds are packed to a third or so.
PACKED_MOST: Final = 100
#: What a kernel takes for itself before the first program runs, beside its image.
WORKING_MEMORY: Final = 4 << 20
MEMORY_STEP: Final = 4 << 20


class Source:
    """A seekable file of known size; reads are bounded and never short.

    Read, not mapped: a mapped file that shrinks while it is used would kill the process
    with SIGBUS.
    """

    def __init__(self, file: BinaryIO, size: int, what: str, path: str) -> None:
        self._file = file
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
            self._file.seek(offset)
            data = self._file.read(length)
        except OSError as error:
            cause = f"cannot be read: {error.strerror or error}"
            raise self.error(
                cause, mend="look into the host's kernel log, or get it again"
            ) from error
        if len(data) != length:
            raise self.error("got shorter while it was read", mend="try again when it is complete")
        return data

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
            with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
                yield cls(file, info.st_size, what, name)
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


def place_initrd(vm: GuestMemory, source: Source, floor: int, ceiling: int) -> int:
    """The highest page-aligned address in [floor, ceiling) where the initrd fits.

    High, because the kernel unpacks and relocates itself upwards from its load address.
    """
    # A page is left above: Linux reads a little past the end of a damaged one (lib/inflate,
    # nofill), and past the end of RAM there is nothing.
    address = align_down(ceiling - source.size, PAGE_SIZE) - PAGE_SIZE
    if address >= align_up(floor, PAGE_SIZE):
        return address
    size = mib_up(source.size)
    needed = align_up(floor, PAGE_SIZE) + align_up(source.size, PAGE_SIZE) + PAGE_SIZE
    if needed > LOW_RAM_MAX:
        raise source.error(
            f"is {size} MiB, and with any memory size kernel and initrd must fit below "
            f"{mib_up(LOW_RAM_MAX)} MiB",
            mend="use a smaller initrd",
        )
    if needed <= total_ram(vm):
        raise source.error(
            f"is {size} MiB, but this kernel takes an initrd only below address {ceiling:#x}",
            mend="use a smaller initrd or a newer kernel",
        )
    raise source.error(
        f"is {size} MiB and does not fit beside the kernel into {mib_up(total_ram(vm))} MiB of "
        "memory",
        mend=f"give the machine {enough_memory(floor, source)} of memory",
    )


def unpacked_size(source: Source) -> tuple[int, int]:
    """Of an initrd: what it unpacks to at least and at most, as far as it shows."""
    start = source.read(0, min(source.size, 4))
    if start.startswith(GZIP_MAGIC) and source.size >= 18:
        # The last four bytes are the size of the whole (RFC 1952, 2.3.1).
        size = int.from_bytes(source.read(source.size - 4, 4), "little")
        if size <= PACKED_MOST * source.size:
            return size, size
    # Other formats pack to a quarter at most of what initrds hold; what is not packed may have
    # something packed behind it.
    return source.size if start == CPIO_MAGIC else 0, 4 * source.size


def _beside_kernel(initrd: Source, unpacked: int) -> int:
    # In memory twice while it is unpacked.
    return initrd.size + unpacked + WORKING_MEMORY


def enough_memory(kernel_end: int, initrd: Source | None) -> str:
    """What a Linux guest needs to come up, by the ends of its files: as an option's value."""
    rest = WORKING_MEMORY if initrd is None else _beside_kernel(initrd, unpacked_size(initrd)[1])
    return f"{align_up(kernel_end + rest, MEMORY_STEP) >> 20}M"


def warn_of_little_memory(vm: GuestMemory, kernel_end: int, initrd: Source) -> None:
    """Says if the guest will hardly come up. It is started all the same: a kernel may do with
    less than Linux takes."""
    unpacked = unpacked_size(initrd)[0]
    if unpacked and total_ram(vm) < kernel_end + _beside_kernel(initrd, unpacked):
        log.warning(
            "initrd %s: unpacks to %d MiB, for which the guest's %d MiB of memory are hardly "
            "enough; give the machine %s",
            initrd.path,
            mib_up(unpacked),
            mib_up(total_ram(vm)),
            enough_memory(kernel_end, initrd),
        )


def too_little_memory(
    vm: GuestMemory, kernel: Source, kernel_end: int, initrd: str | os.PathLike[str] | None
) -> BootError:
    from tetrarch.boot.initrd import open_initrd

    with contextlib.ExitStack() as stack:
        source = None if initrd is None else stack.enter_context(open_initrd(initrd))
        return kernel.error(
            f"needs more than the {mib_up(total_ram(vm))} MiB of memory that the machine has",
            mend=f"give it {enough_memory(kernel_end, source)}",
        )


def load_initrd(
    vm: GuestMemory, path: str | os.PathLike[str] | None, floor: int, ceiling: int
) -> tuple[int, int]:
    """Writes the initrd; (address, size), or (0, 0) without one."""
    if path is None:
        return 0, 0
    from tetrarch.boot.initrd import open_initrd

    with open_initrd(path) as source:
        address = place_initrd(vm, source, floor, ceiling)
        copy_to_guest(vm, address, source, 0, source.size)
        warn_of_little_memory(vm, floor, source)
        return address, source.size
