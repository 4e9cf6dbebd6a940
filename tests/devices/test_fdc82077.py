"""The floppy disk controller and its DMA, by a driver's mock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrarch._native import GuestMemoryError
from tetrarch.devices.dma8237 import Dma8237
from tetrarch.devices.fdc82077 import FORMATS, Fdc82077, FloppyDrive

SIZE = 1440 << 10
FORMAT = FORMATS[SIZE]
AT = 0x2_3000
#: Each sector begins with its number.
PATTERN = b"".join(
    sector.to_bytes(2, "little") + bytes(range(2, 256)) * 2 + b"\0\1"
    for sector in range(SIZE // 512)
)
#: Of MODE: single transfers on channel 2, to memory or from it.
TO_MEMORY, FROM_MEMORY = 0x46, 0x4A


class Memory:
    """The first MiB."""

    def __init__(self) -> None:
        self.bytes = bytearray(1 << 20)

    def read_memory(self, address: int, length: int) -> bytes:
        self._check(address, length)
        return bytes(self.bytes[address : address + length])

    def write_memory(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self.bytes[address : address + len(data)] = data

    def _check(self, address: int, length: int) -> None:
        if address + length > len(self.bytes):
            raise GuestMemoryError("no RAM")


class Image:
    def __init__(self) -> None:
        self.bytes = bytearray(PATTERN)
        self.fails = False

    def read(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._check(offset, len(data))
        self.bytes[offset : offset + len(data)] = data

    def _check(self, offset: int, length: int) -> None:
        if self.fails or offset < 0 or offset + length > SIZE:
            raise OSError("no sector")


class Bench:
    def __init__(self, *, readonly: bool = False) -> None:
        self.memory, self.image, self.levels = Memory(), Image(), [False]
        self.dma = Dma8237(self.memory)
        drives = [FloppyDrive(self.image, FORMAT, readonly)]
        self.fdc = Fdc82077(self.levels.append, drives, self.dma)
        self.fdc.write(0, 1, 0x0C)
        for _ in range(4):
            self.command(0x08)
        self.fdc.dir.write(0, 1, 0)  # 500 kbit/s
        self.fdc.write(0, 1, 0x1C)

    @property
    def irq(self) -> bool:
        return self.levels[-1]

    @property
    def status(self) -> int:
        return self.fdc.read(2, 1)

    def command(self, *values: int) -> list[int]:
        """Its bytes, each when the controller wants it; and its answer."""
        for value in values:
            assert self.status & 0xC0 == 0x80
            self.fdc.write(3, 1, value)
        result = []
        while self.status & 0x40:
            assert self.status & 0x90 == 0x90
            result.append(self.fdc.read(3, 1))
        assert self.status == 0x80
        return result

    def set_up(self, mode: int, length: int, at: int = AT) -> None:
        self.dma.write(0xA, 1, 6)
        self.dma.write(0xC, 1, 0)
        self.dma.write(0xB, 1, mode)
        for port, word in ((4, at & 0xFFFF), (5, length - 1)):
            self.dma.write(port, 1, word & 0xFF)
            self.dma.write(port, 1, word >> 8)
        self.dma.page(2).write(0, 1, at >> 16)
        self.dma.write(0xA, 1, 2)

    def move(self, track: int) -> None:
        self.command(0x0F, 0, track)
        assert self.irq
        assert self.command(0x08) == [0x20, track]
        assert not self.irq


@pytest.fixture
def bench() -> Bench:
    return Bench()


def sectors(image: Image, first: int, count: int) -> bytes:
    return bytes(image.bytes[first * 512 : (first + count) * 512])


def test_reset_is_told_of_four_drives_by_one_interrupt() -> None:
    bench = Bench()
    bench.fdc.write(0, 1, 0x08)
    assert bench.status == 0
    bench.fdc.write(0, 1, 0x0C)
    assert bench.irq
    assert [bench.command(0x08) for _ in range(5)] == [
        *([0xC0 | drive, 0] for drive in range(4)),
        [0x80],
    ]
    assert not bench.irq


def test_what_a_driver_asks_to_know_the_chip(bench: Bench) -> None:
    assert bench.command(0x10) == [0x90]
    assert bench.command(0x03, 0xDF, 0x02) == []
    assert bench.command(0x13, 0, 0x57, 0) == []
    assert bench.command(0x94) == [0x10]
    assert bench.command(0x0E) == [0, 0, 0, 0, 0xDF, 0x02, 0, 0x80, 0x57, 0]
    bench.fdc.write(0, 1, 0)
    bench.fdc.write(0, 1, 0x0C)
    assert bench.command(0x0E)[-2] == 0x57, "locked"
    assert bench.command(0x14) == [0]
    # PARTID is of the 82078.
    assert bench.command(0x18) == [0x80]


def test_both_sides_of_a_track_are_read_at_once(bench: Bench) -> None:
    bench.move(3)
    bench.set_up(TO_MEMORY, 36 * 512)
    assert bench.command(0xE6, 0, 3, 0, 1, 2, 18, 27, 0xFF) == [0, 0, 0, 4, 0, 1, 2]
    assert bytes(bench.memory.bytes[AT:][: 36 * 512]) == sectors(bench.image, 3 * 36, 36)
    assert bench.dma.read(8, 1) == 4, "terminal count"
    assert bench.dma.read(8, 1) == 0


def test_transfer_that_ends_within_a_track_tells_the_next_sector(bench: Bench) -> None:
    bench.set_up(TO_MEMORY, 512)
    assert bench.command(0xE6, 4, 0, 1, 17, 2, 18, 27, 0xFF) == [4, 0, 0, 0, 1, 18, 2]
    assert bytes(bench.memory.bytes[AT:][:513]) == sectors(bench.image, 18 + 16, 1) + b"\0"
    bench.set_up(TO_MEMORY, 512)
    # On to the other side: the head is in what comes next.
    assert bench.command(0xE6, 0, 0, 0, 18, 2, 18, 27, 0xFF)[3:] == [0, 1, 1, 2]


def test_track_that_ends_before_the_transfer_is_an_error(bench: Bench) -> None:
    bench.set_up(TO_MEMORY, 36 * 512)
    # Without MT there is one side.
    assert bench.command(0x46, 0, 0, 0, 1, 2, 18, 27, 0xFF) == [0x40, 0x80, 0, 1, 0, 1, 2]
    assert bytes(bench.memory.bytes[AT:][: 19 * 512]) == sectors(bench.image, 0, 18) + bytes(512)


def test_what_is_written_is_in_the_image(bench: Bench) -> None:
    bench.move(79)
    data = bytes(reversed(range(256))) * 4
    bench.memory.bytes[AT : AT + 1024] = data
    bench.set_up(FROM_MEMORY, 1024)
    assert bench.command(0xC5, 4, 79, 1, 17, 2, 18, 27, 0xFF) == [0, 0, 0, 80, 0, 1, 2]
    assert sectors(bench.image, 79 * 36 + 18 + 16, 2) == data


def test_half_a_sector_is_filled_up(bench: Bench) -> None:
    bench.memory.bytes[AT : AT + 100] = b"x" * 100
    bench.set_up(FROM_MEMORY, 100)
    bench.command(0xC5, 0, 0, 0, 5, 2, 18, 27, 0xFF)
    assert sectors(bench.image, 4, 1) == b"x" * 100 + bytes(412)


def test_track_is_formatted(bench: Bench) -> None:
    bench.move(2)
    before = bytes(bench.image.bytes)
    # One of them is another track's: no place for it.
    marks = [(2 if sector != 7 else 9, 1, sector, 2) for sector in range(1, 19)]
    bench.memory.bytes[AT : AT + 72] = bytes(byte for mark in marks for byte in mark)
    bench.set_up(FROM_MEMORY, 72)
    assert bench.command(0x4D, 4, 2, 18, 80, 0xF6)[:3] == [4, 0, 0]
    first = 2 * 36 + 18
    for sector in range(18):
        kept = before[(first + sector) * 512 :][:512]
        wanted = kept if sector == 6 else b"\xf6" * 512
        assert sectors(bench.image, first + sector, 1) == wanted


def test_closed_tab(bench: Bench) -> None:
    bench = Bench(readonly=True)
    before = bytes(bench.image.bytes)
    bench.set_up(FROM_MEMORY, 512)
    assert bench.command(0xC5, 0, 0, 0, 1, 2, 18, 27, 0xFF)[:3] == [0x40, 0x02, 0]
    assert bench.command(0x4D, 0, 2, 18, 80, 0xF6)[:3] == [0x40, 0x02, 0]
    assert bench.command(0x04, 0) == [0x78]
    assert bytes(bench.image.bytes) == before


@pytest.mark.parametrize(
    ("words", "st1", "st2"),
    [
        ((0xE6, 0, 5, 0, 1, 2, 18), 0x04, 0x10),  # another track than the head's
        ((0xE6, 0, 0xFF, 0, 1, 2, 18), 0x04, 0x02),
        ((0xE6, 0, 0, 1, 1, 2, 18), 0x04, 0),  # the other side than the head's
        ((0xE6, 0, 0, 0, 19, 2, 36), 0x04, 0),
        ((0xE6, 0, 0, 0, 0, 2, 18), 0x04, 0),
        ((0xE6, 0, 0, 0, 1, 3, 18), 0x04, 0),  # sectors of 1024 bytes
        ((0xA6, 0, 0, 0, 1, 2, 18), 0x01, 0),  # FM
        ((0xE6, 1, 0, 0, 1, 2, 18), 0x01, 0),  # no drive
    ],
)
def test_sector_that_is_not_there(bench: Bench, words: tuple[int, ...], st1: int, st2: int) -> None:
    bench.set_up(TO_MEMORY, 512)
    st0, *found = bench.command(*words, 27, 0xFF)[:3]
    assert (st0 & 0xC0, *found) == (0x40, st1, st2)


def test_wrong_rate_and_a_track_beyond_the_disk_find_no_mark(bench: Bench) -> None:
    assert bench.command(0x4A, 4) == [4, 0, 0, 0, 1, 1, 2]
    bench.move(80)
    assert bench.command(0x4A, 0)[:2] == [0x40, 0x01]
    bench.move(0)
    bench.fdc.dir.write(0, 1, 2)
    assert bench.command(0x4A, 0)[:2] == [0x40, 0x01]


def test_transfer_without_dma_is_an_overrun_and_a_host_that_fails_a_bad_sector(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    assert bench.command(0xE6, 0, 0, 0, 1, 2, 18, 27, 0xFF)[:2] == [0x40, 0x10]
    bench.set_up(TO_MEMORY, 512)
    bench.image.fails = True
    assert bench.command(0xE6, 0, 0, 0, 1, 2, 18, 27, 0xFF)[:3] == [0x40, 0x20, 0x20]
    assert "a floppy disk's sector is lost: no sector" in caplog.text


def test_disk_counts_as_changed_until_its_heads_move(bench: Bench) -> None:
    assert bench.fdc.dir.read(0, 1) == 0x80
    bench.command(0x07, 0)
    assert bench.command(0x08) == [0x20, 0]
    assert bench.fdc.dir.read(0, 1) == 0
    # One that is not there: no heads, no track 0.
    bench.command(0x07, 1)
    assert bench.command(0x08) == [0x71, 0]


def test_address_wraps_in_its_page_and_goes_down_if_asked(bench: Bench) -> None:
    bench.set_up(TO_MEMORY, 512, at=0x2_FF00)
    bench.command(0xE6, 0, 0, 0, 1, 2, 18, 27, 0xFF)
    data = sectors(bench.image, 0, 1)
    assert bytes(bench.memory.bytes[0x2_FF00:0x3_0000]) == data[:256]
    assert bytes(bench.memory.bytes[0x2_0000:0x2_0100]) == data[256:]
    bench.set_up(TO_MEMORY | 0x20, 512, at=AT + 511)
    bench.command(0xE6, 0, 0, 0, 1, 2, 18, 27, 0xFF)
    assert bytes(bench.memory.bytes[AT : AT + 512]) == data[::-1]


def test_where_no_ram_is_the_bus_floats(bench: Bench) -> None:
    bench.set_up(TO_MEMORY, 512, at=0x20_0000)
    assert bench.command(0xE6, 0, 0, 0, 1, 2, 18, 27, 0xFF)[0] == 0
    bench.set_up(FROM_MEMORY, 512, at=0x20_0000)
    assert bench.command(0xC5, 0, 0, 0, 1, 2, 18, 27, 0xFF)[0] == 0
    assert sectors(bench.image, 0, 1) == b"\xff" * 512


def test_saved_in_the_middle_of_a_command_it_goes_on(bench: Bench) -> None:
    bench.move(3)
    bench.set_up(TO_MEMORY, 512)
    for value in (0xE6, 0, 3, 0, 1):
        bench.fdc.write(3, 1, value)
    other = Bench()
    other.fdc.load(bench.fdc.save())
    other.dma.load(bench.dma.save())
    for value in (2, 18, 27, 0xFF):
        other.fdc.write(3, 1, value)
    assert other.irq
    assert bytes(other.memory.bytes[AT : AT + 512]) == sectors(other.image, 3 * 36, 1)


def accesses() -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """(port, width, value); a port of 32 and more is one of the DMA controller's."""
    values = st.one_of(
        st.integers(0, 255), st.sampled_from([0xE6, 0xC5, 0x4D, 0x0F, 0x8F, 0xCF, 0x08, 0x07, 2])
    )
    ports = st.one_of(st.sampled_from([3, 3, 3, 0, 2, 5]), st.integers(32, 51))
    return st.lists(st.tuples(ports, st.sampled_from([1, 1, 1, 2, 4]), values), max_size=120)


@settings(max_examples=300, deadline=None)
@given(accesses())
def test_noise_is_borne(noise: list[tuple[int, int, int]]) -> None:
    bench = Bench()
    bench.image.bytes = bytearray(SIZE)
    for port, size, value in noise:
        if port >= 48:
            bench.dma.page(port - 48).write(0, size, value)
        elif port >= 32:
            bench.dma.write(port - 32, size, value)
            bench.dma.read(port - 32, size)
        elif port == 5:
            bench.fdc.dir.write(0, size, value)
            bench.fdc.dir.read(0, size)
        else:
            bench.fdc.write(port, size, value)
            bench.fdc.read(port, size)
    # Whatever it was, a reset leaves a controller that works.
    bench.fdc.write(0, 1, 0)
    bench.fdc.write(0, 1, 0x1C)
    bench.fdc.load(bench.fdc.save())
    for _ in range(4):
        bench.command(0x08)
    bench.fdc.dir.write(0, 1, 0)
    bench.command(0x07, 0)
    bench.command(0x08)
    bench.set_up(TO_MEMORY, 512)
    bench.dma.write(8, 1, 0)
    assert bench.command(0xE6, 0, 0, 0, 1, 2, 18, 27, 0xFF)[:3] == [0, 0, 0]


def test_ports_that_are_no_bytes_float(bench: Bench) -> None:
    assert bench.dma.read(0, 2) == 0xFFFF
    assert bench.fdc.read(1, 1) == 0
