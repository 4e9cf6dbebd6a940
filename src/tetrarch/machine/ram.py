"""Guest RAM without its zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVm

__all__ = ["CHUNK_BYTES", "chunks", "runs"]

CHUNK_BYTES: Final = 1 << 20
_PAGE: Final = 4096


def chunks(vm: EngineVm, base: int, length: int) -> Iterator[tuple[int, bytes]]:
    """Guest memory in pieces that can be copied: (address, bytes)."""
    for address in range(base, base + length, CHUNK_BYTES):
        yield address, vm.read_memory(address, min(CHUNK_BYTES, base + length - address))


def runs(vm: EngineVm, base: int, length: int) -> Iterator[tuple[int, memoryview]]:
    """Pages that are not zero, of a piece at most together: (address, bytes)."""
    zeros = memoryview(bytes(CHUNK_BYTES))
    for address, piece in chunks(vm, base, length):
        data = memoryview(piece)
        if data != zeros[: len(data)]:
            for start, end in _runs(data, zeros[:_PAGE]):
                yield address + start, data[start:end]


def _runs(data: memoryview, zeros: memoryview) -> Iterator[tuple[int, int]]:
    """Where pages that are not zero follow each other."""
    start: int | None = None
    for page in range(0, len(data), _PAGE):
        empty = data[page : page + _PAGE] == zeros[: len(data) - page]
        if empty and start is not None:
            yield start, page
            start = None
        elif not empty and start is None:
            start = page
    if start is not None:
        yield start, len(data)
