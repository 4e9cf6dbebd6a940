"""An initrd in guest memory: where it goes, and how much memory it takes to come up with it."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from typing import Final

from tetrarch.boot.initrd import open_initrd
from tetrarch.boot.layout import (
    LOW_RAM_MAX,
    PAGE_SIZE,
    GuestMemory,
    align_down,
    align_up,
    mib_up,
    total_ram,
)
from tetrarch.boot.source import Source, copy_to_guest
from tetrarch.errors import BootError

__all__ = ["load_initrd", "place_initrd", "too_little_memory"]

log = logging.getLogger(__name__)

GZIP_MAGIC: Final = b"\x1f\x8b"
CPIO_MAGIC: Final = b"0707"
#: A file that says to be packed by more has lost its end: initrds are packed to a third or so.
PACKED_MOST: Final = 100
#: What a kernel takes for itself before the first program runs, beside its image.
WORKING_MEMORY: Final = 4 << 20
MEMORY_STEP: Final = 4 << 20


def place_initrd(vm: GuestMemory, source: Source, floor: int, ceiling: int) -> int:
    """The highest page-aligned address in [floor, ceiling) where the initrd fits. Raises BootError.

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
        mend=f"give the machine {_enough_memory(floor, source)} of memory",
    )


def _unpacked_size(source: Source) -> tuple[int, int]:
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


def _enough_memory(kernel_end: int, initrd: Source | None) -> str:
    """What a Linux guest needs to come up, by the ends of its files: as an option's value."""
    rest = WORKING_MEMORY if initrd is None else _beside_kernel(initrd, _unpacked_size(initrd)[1])
    return f"{align_up(kernel_end + rest, MEMORY_STEP) >> 20}M"


def _warn_of_little_memory(vm: GuestMemory, kernel_end: int, initrd: Source) -> None:
    """Says if the guest will hardly come up. It is started all the same: a kernel may do with
    less than Linux takes."""
    unpacked = _unpacked_size(initrd)[0]
    if unpacked and total_ram(vm) < kernel_end + _beside_kernel(initrd, unpacked):
        log.warning(
            "initrd %s: unpacks to %d MiB, for which the guest's %d MiB of memory are hardly "
            "enough; give the machine %s",
            initrd.path,
            mib_up(unpacked),
            mib_up(total_ram(vm)),
            _enough_memory(kernel_end, initrd),
        )


def too_little_memory(
    vm: GuestMemory,
    kernel: Source,
    kernel_end: int,
    initrd: str | os.PathLike[str] | None,
    first: Source | None = None,
) -> BootError:
    with ExitStack() as stack:
        there = initrd is not None or first is not None
        source = stack.enter_context(open_initrd(initrd, first)) if there else None
        return kernel.error(
            f"needs more than the {mib_up(total_ram(vm))} MiB of memory that the machine has",
            mend=f"give it {_enough_memory(kernel_end, source)}",
        )


def load_initrd(
    vm: GuestMemory,
    path: str | os.PathLike[str] | None,
    floor: int,
    ceiling: int,
    first: Source | None = None,
) -> tuple[int, int]:
    """Writes the initrd; (address, size), or (0, 0) without one. ``first`` comes before it."""
    if path is None and first is None:
        return 0, 0
    with open_initrd(path, first) as source:
        address = place_initrd(vm, source, floor, ceiling)
        copy_to_guest(vm, address, source, 0, source.size)
        _warn_of_little_memory(vm, floor, source)
        return address, source.size
