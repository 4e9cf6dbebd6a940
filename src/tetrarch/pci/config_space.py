"""Configuration space: 256 bytes, of which a driver may write some (PCI Local Bus 3.0, 6.1)."""

from __future__ import annotations

from typing import Final

__all__ = ["CONFIG_BYTES", "ConfigSpace"]

CONFIG_BYTES: Final = 256


class ConfigSpace:
    """Registers as bytes, each with the bits that a driver can write, and those that it clears
    by writing ones."""

    def __init__(self) -> None:
        self._data = bytearray(CONFIG_BYTES)
        self._writable = bytearray(CONFIG_BYTES)
        self._clears = bytearray(CONFIG_BYTES)
        self._reset = bytes(CONFIG_BYTES)

    def define(
        self, offset: int, size: int, value: int, writable: int = 0, clears: int = 0
    ) -> None:
        """A register as it is after a reset."""
        place = slice(offset, offset + size)
        self._data[place] = value.to_bytes(size, "little")
        self._writable[place] = writable.to_bytes(size, "little")
        self._clears[place] = clears.to_bytes(size, "little")
        self._reset = bytes(self._data)

    def get(self, offset: int, size: int) -> int:
        return int.from_bytes(self._data[offset : offset + size], "little")

    def set(self, offset: int, size: int, value: int) -> None:
        """For the device, which may set what it likes."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """For the driver."""
        for index in range(offset, min(offset + size, CONFIG_BYTES)):
            byte, value = value & 0xFF, value >> 8
            writable = self._writable[index]
            kept = self._data[index] & ~writable & ~(byte & self._clears[index])
            self._data[index] = kept & 0xFF | byte & writable

    def reset(self) -> None:
        self._data[:] = self._reset

    def save(self) -> bytes:
        return bytes(self._data)

    def load(self, saved: bytes | bytearray) -> None:
        """Takes what a driver can have left there."""
        for index in range(CONFIG_BYTES):
            moves = self._writable[index] | self._clears[index]
            self._data[index] = self._reset[index] & ~moves | saved[index] & moves
