"""fw_cfg as firmware uses it: by port, by name, by DMA."""

from __future__ import annotations

import struct

import pytest

from tetrarch.devices.fw_cfg import BytesItem, FwCfg, Key

READ, SKIP, SELECT, WRITE, ERROR = 2, 4, 8, 16, 1
COMMAND, BUFFER = 0x1000, 0x2000


class Memory:
    def __init__(self) -> None:
        self.bytes = bytearray(0x10_0000)

    def read_memory(self, address: int, length: int) -> bytes:
        if address + length > len(self.bytes):
            raise LookupError
        return bytes(self.bytes[address : address + length])

    def write_memory(self, address: int, data: bytes) -> None:
        if address + len(data) > len(self.bytes):
            raise LookupError
        self.bytes[address : address + len(data)] = data


class Bench:
    def __init__(self) -> None:
        self.memory = Memory()
        self.device = FwCfg(self.memory, LookupError)
        self.device.core.provide(
            {Key.NB_CPUS: b"\x02\0", 0x12: BytesItem(bytes(range(200)))},
            {"etc/two": b"second", "etc/one": b"first file"},
        )

    def take(self, key: int, length: int) -> bytes:
        self.device.ports.write(0, 2, key)
        return bytes(self.device.ports.read(1, 1) for _ in range(length))

    def dma(self, control: int, length: int, buffer: int = BUFFER, at: int = COMMAND) -> int:
        """The control word after it."""
        self.memory.bytes[COMMAND : COMMAND + 16] = struct.pack(">IIQ", control, length, buffer)
        for offset, half in ((0, at >> 32), (4, at & 0xFFFF_FFFF)):
            self.device.dma.write(offset, 4, int.from_bytes(half.to_bytes(4, "big"), "little"))
        word: int = struct.unpack_from(">I", self.memory.bytes, COMMAND)[0]
        return word


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_signature_and_features(bench: Bench) -> None:
    assert bench.take(Key.SIGNATURE, 4) == b"QEMU"
    assert bench.take(Key.ID, 4) == b"\3\0\0\0"
    assert bytes(bench.device.dma.read(at, 1) for at in range(8)) == b"QEMU CFG"


def test_directory_names_the_files(bench: Bench) -> None:
    directory = bench.take(Key.FILE_DIR, 4 + 2 * 64)
    count, *entries = struct.unpack(">I" + "IHH56s" * 2, directory)
    found = {entries[at + 3].rstrip(b"\0"): entries[at : at + 2] for at in (0, 4)}
    assert count == 2
    assert found.keys() == {b"etc/one", b"etc/two"}
    size, key = found[b"etc/one"]
    assert bench.take(key, size) == b"first file"


def test_behind_the_end_and_of_no_item_are_zeros(bench: Bench) -> None:
    assert bench.take(Key.NB_CPUS, 4) == b"\2\0\0\0"
    assert bench.take(0x77, 2) == b"\0\0"


def test_dma_selects_skips_and_reads(bench: Bench) -> None:
    assert bench.dma(0x12 << 16 | SELECT | SKIP, 10) == 0
    assert bench.dma(READ, 5) == 0
    assert bench.memory.bytes[BUFFER : BUFFER + 6] == bytes([10, 11, 12, 13, 14, 0])
    # What is behind the end is written as zeros.
    bench.memory.bytes[BUFFER : BUFFER + 300] = b"\xff" * 300
    assert bench.dma(READ, 300) == 0
    assert bench.memory.bytes[BUFFER : BUFFER + 300] == bytes(range(15, 200)).ljust(300, b"\0")


def test_dma_takes_the_address_at_once_too(bench: Bench) -> None:
    bench.memory.bytes[COMMAND : COMMAND + 16] = struct.pack(">IIQ", SELECT | READ, 4, BUFFER)
    bench.device.dma.write(0, 8, int.from_bytes(COMMAND.to_bytes(8, "big"), "little"))
    assert bench.memory.bytes[BUFFER : BUFFER + 4] == b"QEMU"


@pytest.mark.parametrize(("length", "buffer"), [(4, 1 << 40), (0xFFFF_FFFF, 0), (4, (1 << 64) - 2)])
def test_dma_outside_of_memory_says_so(bench: Bench, length: int, buffer: int) -> None:
    assert bench.dma(SELECT | READ, length, buffer) == ERROR


def test_items_cannot_be_written(bench: Bench) -> None:
    assert bench.dma(0x12 << 16 | SELECT | WRITE, 4) == ERROR
    assert bench.take(0x12, 2) == b"\0\1"


class Written:
    """An item that takes what is written."""

    size = 8

    def __init__(self) -> None:
        self.data = bytearray(8)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data


def test_file_that_takes_it_is_written_by_dma() -> None:
    bench, file = Bench(), Written()
    bench.device.core.provide({}, {"etc/written": file})
    bench.memory.bytes[BUFFER : BUFFER + 6] = b"abcdef"
    assert bench.dma(Key.FILE_FIRST << 16 | SELECT | SKIP, 2) == 0
    assert bench.dma(WRITE, 6) == 0
    assert bytes(file.data) == b"\0\0abcdef"
    assert bench.dma(WRITE, 1) == ERROR
    assert bench.dma(Key.FILE_FIRST << 16 | SELECT | WRITE, 9) == ERROR
    assert bench.dma(Key.FILE_FIRST << 16 | SELECT | WRITE, 4, 1 << 40) == ERROR
    assert bytes(file.data) == b"\0\0abcdef"


def test_command_that_is_nowhere_is_lost(bench: Bench) -> None:
    bench.dma(SELECT | READ, 4, at=1 << 50)
    assert bench.memory.bytes[BUFFER : BUFFER + 4] == bytes(4)


def test_loaded_device_goes_on_within_an_item(bench: Bench) -> None:
    bench.take(0x12, 7)
    other = Bench()
    other.device.load(bench.device.save())
    assert other.device.ports.read(1, 1) == 7
