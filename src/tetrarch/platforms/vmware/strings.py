"""The strings of the backdoor's high bandwidth: guest memory at linear addresses, read and written
with the rights of the program that calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tetrarch._native import GuestCall

__all__ = ["fetch", "store"]

_PAGE: Final = 4096


def fetch(call: GuestCall, linear: int, length: int) -> bytes:
    """Raises GuestFault, as an instruction of the program's would."""
    pieces = list(_pieces(call, linear, length, write=False))
    return b"".join(call.vm.read_memory(at, size) for at, size in pieces)


def store(call: GuestCall, linear: int, data: bytes) -> None:
    """Writes all, or nothing and raises GuestFault."""
    done = 0
    for at, size in list(_pieces(call, linear, len(data), write=True)):
        call.vm.write_memory(at, data[done : done + size])
        done += size


def _pieces(call: GuestCall, linear: int, length: int, *, write: bool) -> Iterator[tuple[int, int]]:
    """Guest physical addresses, and how many bytes lie there."""
    while length:
        size = min(length, _PAGE - linear % _PAGE)
        yield call.access(linear, write), size
        linear, length = linear + size & 0xFFFF_FFFF_FFFF_FFFF, length - size
