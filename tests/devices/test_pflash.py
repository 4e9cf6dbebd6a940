"""A flash chip by its commands, and what of it is kept."""

from __future__ import annotations

import pytest

from tetrarch.devices.pflash import BLOCK_BYTES, PFlash
from tetrarch.errors import StateError

SIZE = 4 * BLOCK_BYTES
READY, ERASE_ERROR, PROGRAM_ERROR = 0x80, 0x20, 0x10


class Bench:
    def __init__(self) -> None:
        self.kept = bytearray(range(256)) * (SIZE // 256)
        self.flash = PFlash(bytes(self.kept), self.keep)

    def keep(self, offset: int, data: bytes) -> None:
        self.kept[offset : offset + len(data)] = data

    def put(self, offset: int, *values: int) -> None:
        for value in values:
            self.flash.write(offset, 1, value)

    def array(self, offset: int, length: int) -> bytes:
        self.put(0, 0xFF)
        return bytes(self.flash.read(offset + index, 1) for index in range(length))


def test_array_is_read_by_any_width() -> None:
    flash = Bench().flash
    assert flash.read(2, 1) == 2
    assert flash.read(4, 4) == 0x07060504
    assert flash.read(8, 8) == 0x0F0E0D0C0B0A0908
    # What of an access lies behind the chip reads as ones.
    assert flash.read(SIZE - 2, 4) == 0xFFFF_FFFE


@pytest.mark.parametrize("command", [0x10, 0x40])
def test_programming_only_clears_bits(command: int) -> None:
    bench = Bench()
    bench.put(0x33, command, 0xF0)
    assert bench.flash.read(0, 1) == READY
    assert bench.array(0x32, 3) == b"\x32\x30\x34"
    assert bench.kept[0x33] == 0x30


def test_erasing_sets_all_of_one_block() -> None:
    bench = Bench()
    bench.put(BLOCK_BYTES + 77, 0x20, 0xD0)
    assert bench.flash.read(0, 1) == READY
    assert bench.array(BLOCK_BYTES - 1, 1) == b"\xff"  # as it was: 255
    assert bench.array(BLOCK_BYTES - 2, 1) == b"\xfe"
    assert bench.array(BLOCK_BYTES, BLOCK_BYTES) == b"\xff" * BLOCK_BYTES
    assert bench.array(2 * BLOCK_BYTES, 1) == b"\0"
    assert bytes(bench.kept[BLOCK_BYTES : 2 * BLOCK_BYTES]) == b"\xff" * BLOCK_BYTES


def test_erasing_without_its_confirmation_is_an_error() -> None:
    bench = Bench()
    before = bytes(bench.kept)
    bench.put(0, 0x20, 0x70)
    assert bench.flash.read(0, 1) == READY | ERASE_ERROR | PROGRAM_ERROR
    assert bytes(bench.kept) == before
    bench.put(0, 0x50, 0x70)
    assert bench.flash.read(0, 1) & (ERASE_ERROR | PROGRAM_ERROR) == 0


def test_status_that_was_cleared_shows_the_array() -> None:
    """By this and a status of 0 OVMF knows that flash is there, no ROM and no RAM."""
    bench = Bench()
    bench.put(0x10, 0x50)
    assert bench.flash.read(0x10, 1) == 0x10
    bench.put(0x10, 0x70)
    assert bench.flash.read(0x10, 1) == 0


def test_chip_tells_what_it_is() -> None:
    bench = Bench()
    bench.put(0, 0x98)
    query = bytes(bench.flash.read(offset, 1) for offset in range(0x10, 0x31))
    assert query[:3] == b"QRY"
    assert query[3:5] == b"\1\0"  # Intel's command set
    assert 1 << query[0x27 - 0x10] == SIZE
    assert query[0x2C - 0x10] == 1
    assert int.from_bytes(query[0x2D - 0x10 : 0x2F - 0x10], "little") + 1 == SIZE // BLOCK_BYTES
    assert int.from_bytes(query[0x2F - 0x10 : 0x31 - 0x10], "little") * 256 == BLOCK_BYTES
    bench.put(0, 0x90)
    assert [bench.flash.read(offset, 1) for offset in range(3)] == [0x89, 0x18, 0]


def test_reset_shows_the_array_and_keeps_it() -> None:
    bench = Bench()
    bench.put(0x41, 0x40, 0, 0x20)
    bench.flash.reset()
    assert bench.flash.read(0x41, 1) == 0
    bench.put(0, 0xD0)  # confirms nothing
    assert bench.flash.read(0x42, 1) == 0x42


def test_saved_chip_has_its_content() -> None:
    one, other = Bench(), Bench()
    one.put(0x41, 0x40, 0)
    one.put(0, 0x20)
    other.put(BLOCK_BYTES, 0x20, 0xD0)
    other.flash.load(one.flash.save())
    assert other.kept == one.kept
    assert other.flash.read(0, 1) == READY
    other.put(0, 0xD0)  # the erase that was begun before
    assert other.array(0, 2) == b"\xff\xff"


@pytest.mark.parametrize("content", [None, "", "no base64", "eJwDAAAAAAE="])
def test_damaged_content_is_refused(content: object) -> None:
    bench = Bench()
    before = bytes(bench.kept)
    with pytest.raises(StateError, match=f"no content of {SIZE} bytes"):
        bench.flash.load(bench.flash.save() | {"content": content})
    assert bytes(bench.kept) == before
