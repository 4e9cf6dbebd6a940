"""The IDE controller and the drives at it, by a driver that knows no more than the
specifications."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.storage.conftest import DISK_BYTES
from tests.storage.ide_driver import (
    ABORT,
    ACTIVE,
    BUSY,
    DATA,
    DATA_REQUEST,
    ERROR,
    FAILED,
    FLUSH,
    IDENTIFY,
    IDENTIFY_PACKET,
    INTERRUPT,
    NOT_FOUND,
    PACKET,
    READ,
    READ_DMA,
    READ_DMA_WIDE,
    READ_MULTIPLE,
    READ_WIDE,
    READY,
    SET_FEATURES,
    SET_MULTIPLE,
    START,
    TABLE,
    TO_MEMORY,
    TRIM,
    UNCORRECTABLE,
    WRITE,
    WRITE_DMA,
    WRITE_MULTIPLE,
    WRITE_WIDE,
    IdeDriver,
)
from tests.virtio.driver import wait_until

from tetrarch import block
from tetrarch._native import IdeChannels
from tetrarch.errors import ConfigError, ImageError, StateError
from tetrarch.storage import AtaDrive

MIB = 1 << 20
SIZE = DISK_BYTES
SECTORS = SIZE // 512
RAM = 16 * MIB
BLOCKS = 300


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    """Blocks that begin with their numbers."""
    path = tmp_path / "disc.iso"
    path.write_bytes(b"".join(struct.pack("<I", one) * 512 for one in range(BLOCKS)))
    return path


def drive(path: Path, options: str = "", name: str = "disk0") -> AtaDrive:
    return AtaDrive(name, block.open_disk(block.DiskSpec.parse(f"{path}{options}")))


def cd(path: Path) -> AtaDrive:
    return AtaDrive("cdrom0", block.open_disk(block.CdromSpec(path).disk), cd=True)


@pytest.fixture
def driver(raw: Path) -> Iterator[IdeDriver]:
    driver = IdeDriver([drive(raw)])
    yield driver
    driver.controller.close()


@pytest.fixture
def disc(iso: Path) -> Iterator[IdeDriver]:
    driver = IdeDriver([None, None, cd(iso)])
    driver.use(1, 0)
    assert driver.packet_in(0)[0] & ERROR
    assert driver.get(1) == 6 << 4, "a reset is told first"
    yield driver
    driver.controller.close()


def test_devices_say_what_they_are_by_their_signatures(raw: Path, iso: Path) -> None:
    driver = IdeDriver([drive(raw), cd(iso)])
    for number, signature in ((0, [1, 1, 0, 0]), (1, [1, 1, 0x14, 0xEB])):
        driver.use(0, number)
        assert [driver.get(offset) for offset in (2, 3, 4, 5)] == signature
        assert driver.status == (0 if number else READY)
    driver.control.write(0, 1, 1 << 2)
    assert driver.status == BUSY
    driver.control.write(0, 1, 0)
    driver.use(0, 1)
    assert [driver.get(offset) for offset in (1, 4, 5)] == [1, 0x14, 0xEB]
    driver.command(IDENTIFY)
    assert driver.wait() & ERROR
    assert [driver.get(offset) for offset in (1, 4, 5)] == [ABORT, 0x14, 0xEB]
    # Nobody is at the other channel.
    driver.use(1, 0)
    assert [driver.get(offset) for offset in range(1, 8)] == [0] * 7
    driver.command(IDENTIFY)
    assert driver.status == 0
    driver.controller.close()


def test_identify_tells_the_drives(raw: Path, iso: Path) -> None:
    driver = IdeDriver([drive(raw), cd(iso)])
    words = driver.identify()
    assert struct.pack(">20H", *words[27:47]).decode().rstrip() == "Tetrarch disk"
    assert words[60] | words[61] << 16 == SECTORS
    assert words[75:78] == (0, 0, 0), "no queues, and nothing serial"
    assert words[93]
    driver.use(0, 1)
    words = driver.identify(IDENTIFY_PACKET)
    assert words[0] >> 8 == 0x85
    driver.controller.close()


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
def test_data_is_moved_by_words(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    block.create(path, SIZE)
    driver = IdeDriver([drive(path)])
    for sectors in (1, 3, 200):
        data = os.urandom(512 * sectors)
        driver.command(WRITE, 7, sectors)
        assert driver.data_out(data) == READY
        driver.command(FLUSH)
        assert driver.wait() == READY
        driver.command(READ_WIDE, 7, sectors, wide=True)
        assert driver.data_in(512 * sectors) == data
    driver.command(READ, SECTORS - 1, 1)
    assert driver.data_in(512) == bytes(512)
    driver.controller.close()


def test_words_of_32_bits_are_two(driver: IdeDriver) -> None:
    data = os.urandom(512)
    driver.command(WRITE_WIDE, 5, 1, wide=True)
    assert driver.wait() & DATA_REQUEST
    driver.write_words(data, 4)
    assert driver.wait() == READY
    driver.command(READ, 5, 1)
    driver.wait()
    assert driver.read_words(256, 4) == data


def test_blocks_of_several_sectors(driver: IdeDriver) -> None:
    data = os.urandom(512 * 150)
    for multiple in (16, 4):
        driver.command(SET_MULTIPLE, 0, multiple)
        assert driver.wait() == READY
        driver.command(WRITE_MULTIPLE, 9, 150)
        assert driver.data_out(data, 512 * multiple) == READY
        driver.command(READ_MULTIPLE, 9, 150)
        assert driver.data_in(len(data), 512 * multiple) == data
    driver.command(SET_MULTIPLE, 0, 0)
    assert driver.wait() == READY
    driver.command(READ_MULTIPLE, 9, 1)
    assert driver.wait() & ERROR
    assert driver.get(1) == ABORT


def test_data_is_moved_by_the_bus_master(driver: IdeDriver) -> None:
    for length in (512, 65536, 3 * 65536 + 512):
        data = os.urandom(length)
        assert driver.write_dma(11, data) == READY
        assert driver.read_dma(11, length) == data
    # Regions in any pieces, and the start before the command.
    regions = [(DATA + MIB + 0x1000 * one, 100) for one in range(5)] + [(DATA + 2 * MIB, 12)]
    driver.regions(regions)
    driver.master(0, TO_MEMORY | START)
    driver.command(READ_DMA, 11, 1)
    assert driver.wait() == READY
    assert driver.master(2) & (ACTIVE | INTERRUPT) == INTERRUPT
    driver.master(0, 0)
    moved = b"".join(driver.vm.read_memory(address, length) for address, length in regions)
    assert moved == driver.read_dma(11, 512)


def test_four_drives_are_four_disks(tmp_path: Path) -> None:
    drives: list[AtaDrive | None] = []
    for number in range(4):
        path = tmp_path / f"{number}.img"
        block.create(path, SIZE)
        drives.append(drive(path, name=f"disk{number}"))
    driver = IdeDriver(drives)
    for number in range(4):
        driver.use(number // 2, number % 2)
        assert driver.write_dma(0, bytes([number + 1]) * 512) == READY
    for number in range(4):
        driver.use(number // 2, number % 2)
        assert driver.read_dma(0, 512) == bytes([number + 1]) * 512
        words = driver.identify()
        assert struct.pack(">10H", *words[10:20]).decode().strip() == f"disk{number}"
    driver.controller.close()
    with pytest.raises(ConfigError, match="an IDE controller has 4 drives, not 5"):
        IdeDriver([*drives, None])


def test_trimmed_sectors_go_back_to_the_host(driver: IdeDriver, raw: Path) -> None:
    driver.write_dma(0, os.urandom(MIB))
    driver.command(FLUSH)
    driver.wait()
    before = block.info(raw)["allocated"]

    def trim(*ranges: int) -> int:
        data = struct.pack(f"<{len(ranges)}Q", *ranges).ljust(512, b"\0")
        driver.vm.write_memory(DATA, data)
        return driver.dma(
            lambda: driver.command(TRIM, 0, 1, 1, wide=True), to_memory=False, length=512
        )

    assert trim(2048 << 48) == READY
    driver.command(FLUSH)
    driver.wait()
    assert block.info(raw)["allocated"] <= before - MIB
    assert trim(0) == READY
    assert trim(8 << 48 | SECTORS) & ERROR
    assert driver.get(1) == NOT_FOUND


@pytest.mark.parametrize(
    ("command", "lba", "count", "features", "error"),
    [
        (READ, SECTORS, 1, 0, NOT_FOUND),
        (READ, SECTORS - 1, 2, 0, NOT_FOUND),
        (WRITE, SECTORS, 1, 0, NOT_FOUND),
        (READ_DMA, SECTORS, 1, 0, NOT_FOUND),
        (WRITE_DMA, SECTORS, 1, 0, NOT_FOUND),
        (SET_FEATURES, 0, 0x46, 3, ABORT),
        (TRIM, 0, 9, 1, ABORT),
        (PACKET, 0, 0, 0, ABORT),
        (IDENTIFY_PACKET, 0, 0, 0, ABORT),
        (0x60, 0, 0, 1, ABORT),  # it has no queue
        (0x08, 0, 0, 0, ABORT),
        (0xFF, 0, 0, 0, ABORT),
    ],
)
def test_what_cannot_be_is_an_error_of_the_command(
    driver: IdeDriver, command: int, lba: int, count: int, features: int, error: int
) -> None:
    driver.command(command, lba, count, features)
    assert driver.wait() == READY | ERROR
    assert driver.get(1) == error
    assert driver.read_dma(0, 512) == bytes(512)


def test_regions_that_cannot_be_are_an_error_of_the_bus_master(driver: IdeDriver) -> None:
    cases: list[tuple[list[tuple[int, int]], int]] = [
        ([(RAM, 512)], TO_MEMORY),
        ([(0xFFFF_FFF0, 512)], TO_MEMORY),
        ([(DATA, 256)], TO_MEMORY),  # less than there is
        ([(DATA, 512)], 0),  # the wrong way
    ]
    for regions, way in cases:
        driver.regions(regions)
        driver.master(2, FAILED | INTERRUPT)
        driver.command(READ_DMA, 0, 1)
        driver.master(0, way | START)
        assert driver.wait() & ERROR
        assert driver.master(2) & (FAILED | ACTIVE) == FAILED
        driver.master(0, 0)
    # Entries of two bytes without an end, and a table that is no memory.
    for table in (TABLE, RAM - 4, 0xFFFF_FFFC):
        driver.vm.write_memory(TABLE, struct.pack("<II", DATA, 2) * 4096)
        driver.master(4, table, 4)
        driver.command(READ_DMA_WIDE, 0, 256, wide=True)
        driver.master(0, TO_MEMORY | START)
        assert driver.wait() & ERROR
        driver.master(0, 0)
    assert driver.read_dma(0, 512) == bytes(512)


def test_stopped_bus_master_leaves_memory_alone(driver: IdeDriver) -> None:
    for round_ in range(20):
        driver.regions([(DATA, 0)])
        driver.master(0, TO_MEMORY)
        driver.command(READ_DMA_WIDE, 0, 128, wide=True)
        driver.master(0, TO_MEMORY | START)
        if round_ % 2:
            driver.master(0, 0)
        else:
            driver.control.write(0, 1, 1 << 2)
            driver.control.write(0, 1, 0)
            driver.master(0, 0)
        mark = bytes([round_ + 1]) * 65536
        driver.vm.write_memory(DATA, mark)
        driver.wait()
        driver.command(FLUSH)
        driver.wait()
        assert driver.vm.read_memory(DATA, len(mark)) == mark
    assert driver.read_dma(0, 512) == bytes(512)


def test_bus_master_without_the_bus_waits(driver: IdeDriver) -> None:
    data = os.urandom(65536)
    driver.write_dma(0, data)
    driver.regions([(DATA, 0)])
    driver.master(0, TO_MEMORY)
    for early in (True, False):
        driver.set_bus_master(early)
        driver.command(READ_DMA_WIDE, 0, 128, wide=True)
        driver.master(0, TO_MEMORY | START)
        driver.set_bus_master(False)
        mark = b"\5" * 65536
        driver.vm.write_memory(DATA, mark)
        if early:
            assert driver.wait() == READY, "it is over"
        else:
            assert driver.status == READY | DATA_REQUEST
        assert driver.vm.read_memory(DATA, 65536) == mark
        driver.set_bus_master()
        assert driver.wait() == READY
        assert (driver.vm.read_memory(DATA, 65536) == data) != early
        driver.master(0, TO_MEMORY)


def test_data_register_out_of_turn_is_nothing(driver: IdeDriver) -> None:
    assert driver.ports.read(0, 2) == 0
    driver.write_words(b"\1" * 512)
    driver.command(READ, 0, 1)
    driver.wait()
    driver.write_words(b"\1" * 512)
    assert driver.data_in(512) == bytes(512)
    assert driver.read_words(4) == bytes(8)
    driver.command(WRITE, 0, 1)
    driver.wait()
    assert driver.read_words(256) == bytes(512)
    assert driver.data_out(b"\2" * 512) == READY
    assert driver.read_dma(0, 512) == b"\2" * 512
    # A command in the middle of another's data.
    driver.command(READ, 0, 2)
    driver.wait()
    driver.read_words(7)
    assert driver.identify()[60] == SECTORS


def test_readonly_disk_keeps_its_data(raw: Path) -> None:
    driver = IdeDriver([drive(raw, ",readonly")])
    driver.command(WRITE, 0, 1)
    assert driver.wait() & ERROR
    assert driver.read_dma(0, 512) == bytes(512)
    driver.controller.close()


def test_file_that_became_shorter_is_an_error_of_the_medium(driver: IdeDriver, raw: Path) -> None:
    os.truncate(raw, SIZE // 2)
    driver.command(READ, SECTORS - 8, 8)
    assert driver.wait() & ERROR
    assert driver.get(1) == UNCORRECTABLE
    status = driver.dma(lambda: driver.command(READ_DMA, SECTORS - 8, 8), True, 4096)
    assert status & ERROR
    assert driver.read_dma(0, 512) == bytes(512)


def test_line_is_high_until_the_status_is_read(raw: Path) -> None:
    levels: dict[int, bool] = {}

    class Wire:
        def __init__(self, gsi: int) -> None:
            self.gsi = gsi

        def set(self, level: bool) -> None:
            levels[self.gsi] = level

    driver = IdeDriver([drive(raw)])
    channels = IdeChannels(
        driver.vm,
        "other",
        [{"name": "d", "disk": driver.controller.drives[0].disk, "serial": "d", "cd": False}],
        (Wire(14), Wire(15)),
    )
    driver.ports, driver.control = channels.task_ports(0), channels.control_port(0)
    driver.command(FLUSH)
    wait_until(lambda: levels.get(14), "the line")
    seen = [driver.status, levels[14]]
    driver.control.write(0, 1, 1 << 1)
    seen.append(levels[14])
    driver.control.write(0, 1, 0)
    seen.append(levels[14])
    assert seen == [READY, True, False, True], "masked, and left by the alternate status"
    assert driver.get(7) == READY
    assert levels == {14: False}
    channels.close()
    driver.controller.close()


# CD-ROMs


def test_disc_is_read_by_packets(disc: IdeDriver) -> None:
    status, data = disc.packet_in(0x12, 0, 0, 0, 36)
    assert status == READY
    assert data[8:16] == b"TETRARCH"
    _, data = disc.packet_in(0x25)
    assert struct.unpack(">II", data) == (BLOCKS - 1, 2048)
    expected = b"".join(struct.pack("<I", one) * 512 for one in range(7, 107))
    for limit in (0xFFFE, 2048, 100, 8, 0):
        count = 100 if limit in (0xFFFE, 2048) else 1
        packet = (0x28, 0, 0, 0, 0, 7, 0, 0, count)
        if limit:
            _, data = disc.packet_in(*packet, limit=limit)
        else:
            disc.packet(*packet, limit=0)
            data = b""
            while disc.wait() & DATA_REQUEST:
                data += disc.read_words((disc.get(4) | disc.get(5) << 8) // 2)
        assert data == expected[: 2048 * count], limit


def test_disc_is_read_by_the_bus_master(disc: IdeDriver) -> None:
    for count in (1, 50):
        length = 2048 * count
        status = disc.dma(
            lambda: disc.packet(0x28, 0, 0, 0, 0, 9, 0, 0, 50, dma=True), True, length
        )
        assert status == READY
        assert disc.get(2) & 3 == 3
        data = disc.vm.read_memory(DATA, length)
        assert data == b"".join(struct.pack("<I", one) * 512 for one in range(9, 9 + count))
    status = disc.dma(lambda: disc.packet(0x12, 0, 0, 0, 36, dma=True), True, 36)
    assert status == READY
    assert disc.vm.read_memory(DATA + 8, 8) == b"TETRARCH"


def test_packet_that_fails_has_its_reason_in_the_sense_data(disc: IdeDriver) -> None:
    for packet, key, code in (
        ((0x28, 0, 0, 0, 1, 44, 0, 0, 1), 5, 0x21),
        ((0xAA,), 5, 0x20),
        ((0x12, 1), 5, 0x24),
    ):
        status, _ = disc.packet_in(*packet)
        assert status & ERROR
        assert disc.get(1) >> 4 == key
        _, sense = disc.packet_in(3, 0, 0, 0, 18)
        assert (sense[2], sense[12]) == (key, code)
    disc.command(READ, 0, 1)
    assert disc.wait() & ERROR
    disc.command(0x08)
    assert [disc.get(offset) for offset in (1, 4, 5)] == [1, 0x14, 0xEB]


def test_any_words_at_all_do_no_harm(raw: Path, iso: Path) -> None:
    """Registers of noise, near to what there is."""
    driver = IdeDriver([drive(raw), cd(iso)])
    noise = random.Random(os.environ.get("IDE_SEED", "7"))
    commands = [READ, WRITE, READ_DMA, WRITE_DMA, READ_MULTIPLE, TRIM, IDENTIFY, PACKET, FLUSH, 8]
    for _ in range(3000):
        match noise.randrange(8):
            case 0:
                driver.use(0, noise.randrange(2))
            case 1:
                driver.command(
                    noise.choice([*commands, noise.randrange(256)]),
                    noise.choice([0, SECTORS - 1, noise.getrandbits(28)]),
                    noise.getrandbits(8),
                    noise.getrandbits(2),
                )
            case 2:
                driver.masters.write(
                    noise.randrange(16), noise.choice([1, 2, 4]), noise.getrandbits(32)
                )
            case 3:
                driver.regions([(noise.choice([DATA, RAM - 16, RAM]), noise.getrandbits(16))])
            case 4:
                driver.ports.write(
                    noise.randrange(8), noise.choice([1, 2, 4]), noise.getrandbits(32)
                )
            case 5:
                driver.control.write(0, 1, noise.choice([0, 0, 2, noise.getrandbits(8)]))
            case 6:
                driver.write_words(noise.randbytes(noise.choice([12, 512, 30])))
            case _:
                for offset in range(8):
                    driver.ports.read(offset, noise.choice([1, 2, 4]))
    driver.controller.reset()
    driver.set_bus_master()
    driver.use(0, 0)
    assert driver.write_dma(0, b"\2" * 512) == READY
    assert driver.read_dma(0, 512) == b"\2" * 512
    driver.controller.close()


# Life


def test_disks_are_let_go_of_at_the_end(driver: IdeDriver, raw: Path) -> None:
    with pytest.raises(ImageError, match="the image is in use"):
        block.open_disk(block.DiskSpec(raw))
    driver.controller.close()
    block.open_disk(block.DiskSpec(raw))
    driver.command(READ, 0, 1)
    assert driver.wait() & ERROR


@pytest.mark.parametrize("words", [0, 100])
def test_saved_controller_goes_on_in_the_middle_of_a_block(
    raw: Path, iso: Path, words: int
) -> None:
    driver = IdeDriver([drive(raw), cd(iso)])
    data = os.urandom(2048)
    assert driver.write_dma(3, data) == READY
    driver.command(SET_FEATURES, features=0x82)
    driver.wait()
    driver.command(READ, 3, 4)
    driver.wait()
    begun = driver.read_words(words)
    state = json.loads(json.dumps(driver.controller.save()))
    driver.controller.close()
    other = IdeDriver([drive(raw), cd(iso)])
    other.controller.load(state)
    rest = other.read_words(256 - words) + other.data_in(3 * 512)
    assert begun + rest == data
    assert not other.identify()[85] & 1 << 5
    # A packet that was begun.
    other.use(0, 1)
    other.command(PACKET, 0xFFFE << 8)
    other.wait()
    other.write_words(bytes([3, 0, 0, 0]))
    state = json.loads(json.dumps(other.controller.save()))
    other.controller.load(state)
    other.write_words(bytes([18, 0, 0, 0, 0, 0, 0, 0]))
    other.wait()
    assert other.read_words(9)[2] == 6
    other.controller.close()


def test_damaged_states_are_refused(driver: IdeDriver) -> None:
    driver.command(READ, 0, 1)
    driver.wait()
    good = json.loads(json.dumps(driver.controller.save()))
    saved = good["channels"]
    first, second = saved["channels"]

    def changed(index: int, value: int) -> dict[str, Any]:
        row = [*first]
        row[index] = value
        return {"channels": [row, second]}

    work = len(first) - 12
    damages: list[dict[str, Any]] = [
        {"channels": []},
        {"channels": [first]},
        {"channels": [first[:-1], second]},
        {"channels": [["x"], second]},
        {"buffers": [[], []]},
        {"drives": [[], [], [], []]},
        {"drives": saved["drives"][:-1]},
        changed(work, 1),
        changed(work, 9),
        changed(work + 1, 2),
        changed(work + 8, 1 << 40),
        changed(work + 9, 513),
        changed(work + 10, 513),
        changed(work + 11, 1 << 60),
    ]
    for damage in damages:
        with pytest.raises(StateError):
            driver.controller.load({**good, "channels": {**saved, **damage}})
    with pytest.raises(StateError):
        driver.controller.load({})
    assert driver.read_dma(0, 512) == bytes(512)
    driver.controller.load(good)
    assert driver.read_words(256) == bytes(512)
