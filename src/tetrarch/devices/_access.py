"""Byte-wide registers behind accesses of any width."""

from collections.abc import Callable
from typing import Final

__all__ = ["MAX_ACCESS", "all_ones", "read_bytes", "write_bytes"]

#: The widest access a CPU makes to a device.
MAX_ACCESS: Final = 8


def all_ones(size: int) -> int:
    """What a bus reads where nothing answers."""
    return (1 << 8 * min(max(size, 0), MAX_ACCESS)) - 1


def read_bytes(read: Callable[[int], int], offset: int, size: int) -> int:
    """A wide read as an ISA bus makes it of an 8-bit device: byte by byte, upwards."""
    value = 0
    for index in range(min(size, MAX_ACCESS)):
        value |= (read(offset + index) & 0xFF) << 8 * index
    return value


def write_bytes(write: Callable[[int, int], None], offset: int, size: int, value: int) -> None:
    for index in range(min(size, MAX_ACCESS)):
        write(offset + index, value >> 8 * index & 0xFF)
