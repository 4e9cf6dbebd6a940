"""The AHCI controller and the drives at it, by a driver that knows no more than the
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
from tests.storage.ahci_driver import (
    CI,
    CMD,
    DATA,
    ERROR,
    FLUSH,
    FRAMES,
    HOST_BUS,
    IDENTIFY,
    IDENTIFY_PACKET,
    IE,
    INTERFACE,
    IS,
    LISTS,
    PACKET,
    READ,
    READ_LOG,
    READ_PIO,
    READ_QUEUED,
    READY,
    RECEIVE,
    SACT,
    SCTL,
    SERR,
    SET_FEATURES,
    SIG,
    SSTS,
    START,
    TASK_FILE,
    TFD,
    TRIM,
    WRITE,
    WRITE_FUA,
    WRITE_PIO,
    WRITE_QUEUED,
    AhciDriver,
)
from tests.storage.conftest import DISK_BYTES
from tests.storage.wire import Wire
from tests.virtio.driver import wait_until

from tetrarch import block
from tetrarch.errors import ConfigError, ImageError, StateError
from tetrarch.storage import AtaDrive

MIB = 1 << 20
SIZE = DISK_BYTES
SECTORS = SIZE // 512
RAM = 16 * MIB
BLOCKS = 300

ABORT, NOT_FOUND, UNCORRECTABLE = 1 << 2, 1 << 4, 1 << 6


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    """Blocks that begin with their numbers."""
    path = tmp_path / "disc.iso"
    path.write_bytes(b"".join(struct.pack("<I", one) * 512 for one in range(BLOCKS)))
    return path


def drive(path: Path, options: str = "") -> AtaDrive:
    return AtaDrive("disk0", block.open_disk(block.DiskSpec.parse(f"{path}{options}")))


def cd(path: Path) -> AtaDrive:
    return AtaDrive("cdrom0", block.open_disk(block.CdromSpec(path).disk), cd=True)


@pytest.fixture
def driver(raw: Path) -> Iterator[AhciDriver]:
    driver = AhciDriver([drive(raw)])
    driver.start()
    yield driver
    driver.controller.close()


@pytest.fixture
def disc(iso: Path) -> Iterator[AhciDriver]:
    driver = AhciDriver([cd(iso)])
    driver.start()
    assert driver.packet(0)[0].error == 6 << 4, "a reset is told first"
    driver.restart()
    yield driver
    driver.controller.close()


# Registers and the link


def test_registers_describe_controller_and_ports(raw: Path, iso: Path) -> None:
    driver = AhciDriver([drive(raw), cd(iso)])
    capabilities = driver.get(0)
    assert capabilities & 0x1F == 1
    assert capabilities >> 8 & 0x1F == 31
    assert capabilities & (1 << 30 | 1 << 31) == 1 << 30 | 1 << 31
    assert driver.get(0x0C) == 0b11
    assert driver.get(0x10) == 0x0001_0301
    assert driver.get(4) == 1 << 31
    assert driver.get(0x12, 2) == 1, "a part of a word"
    for port, signature in ((0, 0x101), (1, 0xEB14_0101)):
        driver.port = port
        assert driver.port_get(SSTS) == 0x133
        assert driver.port_get(SIG) == signature
        assert driver.port_get(TFD) == 0x0150
    driver.port = 2
    assert driver.port_get(SSTS) == 0
    driver.set(0x1FFC, 0xFFFF_FFFF)
    assert driver.get(0x1FFC) == 0
    driver.controller.close()


@pytest.mark.parametrize("count", [0, 33])
def test_controller_has_a_drive_and_no_more_than_32(raw: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to 32 drives, not {count}"):
        AhciDriver([drive(raw)] * count)


def test_link_reset_brings_the_device_up_anew(driver: AhciDriver) -> None:
    driver.write(0, b"\1" * 512)
    driver.port_set(CMD, RECEIVE)
    driver.port_set(SCTL, 0x301)
    assert driver.port_get(SSTS) & 0xF == 0
    driver.port_set(SCTL, 0x300)
    assert driver.port_get(SSTS) == 0x133
    assert driver.port_get(SERR) & 1 << 26
    assert driver.port_get(IS) & 1 << 6, "the port has changed"
    driver.port_set(IS, 0xFFFF_FFFF)
    assert driver.port_get(IS) & 1 << 6, "as long as the error register says so"
    driver.port_set(SERR, 1 << 26)
    assert not driver.port_get(IS) & 1 << 6
    assert driver.port_get(TFD) == 0x0150
    frame = driver.vm.read_memory(FRAMES + 0x40, 16)
    assert frame[0] == 0x34
    assert (frame[4], frame[12]) == (1, 1)
    driver.restart()
    assert driver.read(0, 512) == b"\1" * 512


def test_software_reset_by_two_frames(driver: AhciDriver) -> None:
    assert driver.ask(SET_FEATURES, features=0x82).status == READY
    assert not driver.identify()[85] & 1 << 5
    for control in (1 << 2, 0):
        driver.fill(0, 0)
        table = driver.table(0)
        driver.vm.write_memory(table + 1, b"\0")
        driver.vm.write_memory(table + 15, bytes([control]))
        driver.vm.write_memory(FRAMES + 0x40, bytes(20))
        driver.give(0)
        driver.wait()
        sent = driver.vm.read_memory(FRAMES + 0x40, 1)[0] == 0x34
        assert sent == (control == 0)
    assert driver.port_get(TFD) == 0x0150
    assert driver.identify()[85] & 1 << 5, "the write cache is as after power on"


def test_controller_reset_leaves_the_places_in_memory(driver: AhciDriver) -> None:
    driver.set(4, 1 << 31 | 1)
    assert driver.get(4) == 1 << 31
    assert driver.port_get(0) == LISTS
    assert driver.port_get(8) == FRAMES
    assert driver.port_get(IE) == 0
    assert not driver.port_get(CMD) & (START | RECEIVE)
    driver.start()
    assert driver.read(0, 512) == bytes(512)


# Disks


def test_identify_tells_the_disk(driver: AhciDriver) -> None:
    words = driver.identify()
    text = struct.pack(">20H", *words[27:47]).decode().rstrip()
    assert text == "Tetrarch disk"
    assert struct.pack(">10H", *words[10:20]).decode().strip() == "disk0"
    assert words[60] | words[61] << 16 == SECTORS
    assert words[100] | words[101] << 16 == SECTORS
    assert words[83] & 1 << 10
    assert words[76] & 1 << 8
    assert words[75] == 31
    assert words[169] == 1
    assert sum(driver.vm.read_memory(DATA, 512)) & 0xFF == 0
    frame = driver.vm.read_memory(FRAMES + 0x20, 20)
    assert (frame[0], frame[15], frame[16:18]) == (0x5F, READY, b"\0\2"), "a PIO setup"
    ended = driver.ask(IDENTIFY_PACKET, length=512)
    assert (ended.status & ERROR, ended.error) == (ERROR, ABORT)


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
@pytest.mark.parametrize(("write", "read"), [(WRITE, READ), (WRITE_PIO, READ_PIO)])
def test_data_is_written_and_read(tmp_path: Path, name: str, write: int, read: int) -> None:
    path = tmp_path / name
    block.create(path, SIZE)
    driver = AhciDriver([drive(path)])
    driver.start()
    for length in (512, 4096, 65536, MIB):
        data = os.urandom(length)
        assert driver.write(7, data, write).status == READY
        assert driver.ask(FLUSH).status == READY
        assert driver.read(7, length, read) == data
        assert driver.read(6, 512, read) == bytes(512)
    assert driver.read(SECTORS - 1, 512, read) == bytes(512)
    driver.controller.close()


def test_data_in_many_regions_is_put_together(driver: AhciDriver) -> None:
    data = os.urandom(65536)
    driver.write(0, data)
    regions = [(DATA + MIB + 0x400 * one, 0x100) for one in reversed(range(256))]
    driver.fill(3, READ, 0, 128, regions)
    driver.give(3)
    assert driver.wait(3).status == READY
    for index, (address, length) in enumerate(regions):
        assert driver.vm.read_memory(address, length) == data[0x100 * index :][:0x100]


def test_commands_of_28_bits_and_by_cylinder(driver: AhciDriver) -> None:
    sector = 16 * 63 + 63 * 2 + 3
    driver.write(sector, b"\3" * 512)
    driver.vm.write_memory(DATA, bytes(512))
    by_cylinder = 1 << 8 | 4  # cylinder 1, head 2, sector 4
    for lba, device in ((sector, 0xE0), (by_cylinder, 0xA2)):
        assert driver.ask(0xC8, lba, 1, 512, device=device).status == READY
        assert driver.vm.read_memory(DATA, 512) == b"\3" * 512
    ended = driver.ask(0xC8, 1 << 8, 1, 512, device=0xA2)
    assert ended.error == NOT_FOUND, "there is no sector 0"
    driver.restart()
    assert driver.ask(0xC8, 0, 0, 256 * 512, device=0xE0).moved == 256 * 512, "0 are 256"


def test_commands_without_data(driver: AhciDriver) -> None:
    for command, lba, count, features in (
        (0x10, 0, 0, 0),
        (0x40, SECTORS - 1, 1, 0),
        (0x42, SECTORS - 8, 8, 0),
        (0x91, 0, 63, 0),
        (0xC6, 0, 8, 0),
        (0xE1, 0, 0, 0),
        (SET_FEATURES, 0, 0x45, 3),
        (SET_FEATURES, 0, 0, 0xAA),
        (0xE7, 0, 0, 0),
        (0x90, 0, 0, 0),
    ):
        assert driver.ask(command, lba, count, features=features).status == READY, hex(command)
    ended = driver.ask(0xE5)
    assert ended.frame[12] == 0xFF, "it is active"


def test_trimmed_sectors_go_back_to_the_host(driver: AhciDriver, raw: Path) -> None:
    driver.write(0, os.urandom(MIB))
    driver.ask(FLUSH)
    before = block.info(raw)["allocated"]
    ranges = struct.pack("<QQQ", 1024 << 48, 1024 << 48 | 1024, 0).ljust(512, b"\0")
    driver.vm.write_memory(DATA, ranges)
    assert driver.ask(TRIM, 0, 1, 512, features=1).status == READY
    driver.ask(FLUSH)
    assert block.info(raw)["allocated"] <= before - MIB
    driver.vm.write_memory(DATA, bytes(512))
    assert driver.ask(TRIM, 0, 1, 512, features=1).status == READY, "nothing"
    driver.vm.write_memory(DATA, struct.pack("<Q", 8 << 48 | SECTORS - 1))
    assert driver.ask(TRIM, 0, 1, 512, features=1).error == NOT_FOUND


@pytest.mark.parametrize(
    ("command", "lba", "count", "length", "features", "error"),
    [
        (READ, SECTORS, 1, 512, 0, NOT_FOUND),
        (READ, SECTORS - 1, 2, 1024, 0, NOT_FOUND),
        (READ, (1 << 48) - 1, 1, 512, 0, NOT_FOUND),
        (READ, 0, 0, 512, 0, NOT_FOUND),  # 65536 sectors
        (WRITE, SECTORS, 1, 512, 0, NOT_FOUND),
        (WRITE, 0, 2, 512, 0, ABORT),  # room for less
        (READ, 0, 1, 0, 0, ABORT),
        (0x42, SECTORS, 1, 0, 0, NOT_FOUND),
        (TRIM, 0, 9, 9 * 512, 1, ABORT),
        (TRIM, 0, 1, 512, 0, ABORT),
        (TRIM, 0, 1, 0, 1, ABORT),
        (0xC6, 0, 3, 0, 0, ABORT),
        (0x91, 0, 0, 0, 0, ABORT),
        (SET_FEATURES, 0, 0x46, 0, 3, ABORT),
        (SET_FEATURES, 0, 0, 0, 0x99, ABORT),
        (PACKET, 0, 0, 0, 0, ABORT),
        (0xB0, 0, 0, 512, 0, ABORT),
        (0xFF, 0, 0, 0, 0, ABORT),
        (READ_LOG, 0x55, 1, 512, 0, ABORT),
        (READ_LOG, 0x10, 2, 1024, 0, ABORT),
    ],
)
def test_what_cannot_be_is_an_error_of_the_command(
    driver: AhciDriver, command: int, lba: int, count: int, length: int, features: int, error: int
) -> None:
    driver.write(0, b"\1" * 512)
    ended = driver.ask(command, lba, count, length, features=features)
    assert (ended.status, ended.error) == (READY | ERROR, error)
    assert ended.interrupts & TASK_FILE
    assert driver.port_get(CI) == 1, "the command that failed"
    # Nothing goes on before the port was stopped.
    driver.fill(5, FLUSH)
    driver.give(5)
    assert driver.port_get(CI) == 1 | 1 << 5
    driver.restart()
    assert driver.read(0, 512) == b"\1" * 512


def test_readonly_disk_keeps_its_data(raw: Path) -> None:
    driver = AhciDriver([drive(raw, ",readonly")])
    driver.start()
    assert driver.write(0, b"\1" * 512).error == ABORT
    driver.restart()
    assert driver.read(0, 512) == bytes(512)
    driver.controller.close()


def test_file_that_became_shorter_is_an_error_of_the_medium(
    raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = AhciDriver([drive(raw)])
    driver.start()
    os.truncate(raw, SIZE // 2)
    assert driver.ask(READ, SECTORS - 8, 8, 4096).error == UNCORRECTABLE
    driver.restart()
    assert driver.read(0, 512) == bytes(512)
    driver.controller.close()
    assert "disk0: a request failed: the image's file has become shorter" in caplog.text


def test_write_through_finds_writes_durable(tmp_path: Path) -> None:
    """Seen in the file of a qcow2 image, whose metadata are written by a flush alone."""
    path = tmp_path / "disk.qcow2"
    block.create(path, SIZE)
    for number, (feature, command, durable) in enumerate(
        ((0x02, WRITE, False), (0x82, WRITE, True), (0x02, WRITE_FUA, True))
    ):
        driver = AhciDriver([drive(path)])
        driver.start()
        assert driver.ask(SET_FEATURES, features=feature).status == READY
        at = 2048 * (number + 1)
        assert driver.write(at, b"\5" * 512, command).status == READY
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(path.read_bytes())
        block.convert(copy, tmp_path / "copy.img")
        with (tmp_path / "copy.img").open("rb") as disk:
            disk.seek(at * 512)
            assert (disk.read(512) == b"\5" * 512) == durable
        for made in (copy, tmp_path / "copy.img"):
            made.unlink()
        driver.controller.close()


# Queued commands


def test_queued_commands_go_at_once_and_end_in_any_order(driver: AhciDriver) -> None:
    data = os.urandom(32 * 4096)
    driver.vm.write_memory(DATA, data)
    for command, base in ((WRITE_QUEUED, DATA), (READ_QUEUED, DATA + MIB)):
        for slot in range(32):
            regions = [(base + 4096 * slot, 4096)]
            driver.fill(slot, command, 8 * slot, slot << 3, regions, features=8)
        driver.port_set(SACT, 0xFFFF_FFFF)
        driver.port_set(CI, 0xFFFF_FFFF)
        wait_until(lambda: driver.port_get(SACT) == 0, "all of them")
        assert driver.port_get(CI) == 0
        ended = driver.ended()
        assert ended.status == READY
        assert ended.interrupts & 1 << 3
        assert driver.vm.read_memory(FRAMES + 0x58, 1) == b"\xa1"
    assert driver.vm.read_memory(DATA + MIB, len(data)) == data


def test_queued_command_that_fails_is_found_in_the_log(driver: AhciDriver) -> None:
    driver.fill(6, READ_QUEUED, SECTORS, 6 << 3, [(DATA, 512)], features=1)
    driver.give(6, queued=True)
    ended = driver.wait(6)
    assert ended.interrupts & TASK_FILE
    assert driver.port_get(SACT) == 1 << 6
    driver.restart()
    assert driver.ask(READ_LOG, 0x10, 1, 512).status == READY
    page = driver.vm.read_memory(DATA, 512)
    assert (page[0], page[2] & ERROR, page[3]) == (6, ERROR, NOT_FOUND)
    assert sum(page) & 0xFF == 0
    assert driver.ask(READ_LOG, 0, 1, 512).status == READY


@pytest.mark.parametrize("case", ["tag", "inactive"])
def test_queued_command_against_the_rules_is_aborted(driver: AhciDriver, case: str) -> None:
    tag = 5 if case == "tag" else 4
    driver.fill(4, WRITE_QUEUED, 0, tag << 3, [(DATA, 512)], features=1)
    driver.give(4, queued=case == "tag")
    wait_until(lambda: driver.port_get(IS) & TASK_FILE, "the error")
    assert driver.ended(4).error == ABORT
    driver.restart()
    assert driver.read(0, 512) == bytes(512)


def test_command_without_a_queue_waits_for_those_in_it(raw: Path) -> None:
    driver = AhciDriver([drive(raw, ",iops=200")])
    driver.start()
    for slot in range(1, 31):
        driver.fill(slot, READ_QUEUED, 8 * slot, slot << 3, [(DATA, 512)], features=1)
    driver.port_set(SACT, 0x7FFF_FFFE)
    driver.port_set(CI, 0x7FFF_FFFE)
    wait_until(lambda: driver.port_get(CI) == 0, "the device takes them all")
    driver.fill(0, FLUSH)
    driver.give(0)
    assert driver.wait(0).status == READY
    assert driver.port_get(SACT) == 0
    driver.controller.close()


# What no driver does


def test_lists_and_tables_that_are_no_memory_stop_the_port(driver: AhciDriver) -> None:
    def header(flags: int, table: int) -> None:
        driver.vm.write_memory(LISTS, struct.pack("<IIQ", flags, 0, table))

    driver.fill(0, READ, 0, 1, [(DATA, 512)])
    for table in (RAM, RAM - 0x80, (1 << 64) - 0x80):
        header(5 | 1 << 16, table)
        driver.give(0)
        # What is memory has no frame in it.
        assert driver.wait().interrupts & (HOST_BUS if table != RAM - 0x80 else INTERFACE)
        driver.restart()
    for address in (RAM, RAM - 256, 0xFFFF_FF00):
        driver.fill(0, READ, 0, 1, [(address, 512)])
        driver.give(0)
        assert driver.wait().interrupts & HOST_BUS
        driver.restart()
    # A frame that is none, and one that is too short.
    driver.fill(0, READ, 0, 1, [(DATA, 512)])
    driver.vm.write_memory(driver.table(0), b"\x46")
    driver.give(0)
    assert driver.wait().interrupts & INTERFACE
    driver.restart()
    driver.fill(0, READ, 0, 1, [(DATA, 512)], flags=4)
    driver.give(0)
    assert driver.wait().interrupts & HOST_BUS
    driver.port_set(CMD, 0)
    for register in (0, 8):
        driver.set(driver.at(register), (1 << 64) - 0x400, 8)
    driver.port_set(CMD, RECEIVE | START)
    driver.give(0)
    wait_until(lambda: driver.port_get(IS) & HOST_BUS, "the error")
    driver.start()
    assert driver.read(0, 512) == bytes(512)


def test_more_regions_than_there_can_be_are_not_looked_at(driver: AhciDriver) -> None:
    driver.fill(0, READ, 0, 1, [(DATA, 512)])
    driver.vm.write_memory(LISTS, struct.pack("<IIQ", 5 | 0xFFFF << 16, 0, driver.table(0)))
    driver.give(0)
    assert driver.wait().status == READY


def test_stopped_port_forgets_commands_and_leaves_memory_alone(driver: AhciDriver) -> None:
    driver.write(0, bytes(65536))
    for round_ in range(20):
        for slot in range(16):
            regions = [(DATA + 0x1000 * slot, 0x1000)]
            driver.fill(slot, READ_QUEUED, 0, slot << 3, regions, features=8)
        driver.port_set(SACT, 0xFFFF)
        driver.port_set(CI, 0xFFFF)
        driver.restart()
        # Nothing is written into this memory any more.
        mark = bytes([round_ + 1]) * 0x10000
        driver.vm.write_memory(DATA, mark)
        driver.ask(FLUSH)
        assert driver.vm.read_memory(DATA, len(mark)) == mark
    # A port that does not run takes no command.
    driver.port_set(CMD, RECEIVE)
    driver.port_set(CI, 1)
    driver.port_set(SACT, 1)
    assert driver.port_get(CI) == driver.port_get(SACT) == 0


def test_any_words_at_all_do_no_harm(raw: Path, iso: Path) -> None:
    """Headers, tables and registers of noise, near to what there is."""
    driver = AhciDriver([drive(raw), cd(iso)])
    noise = random.Random(os.environ.get("AHCI_SEED", "7"))
    commands = [READ, WRITE, TRIM, IDENTIFY, FLUSH, READ_QUEUED, WRITE_QUEUED, PACKET, 0xC8, 0x90]
    for round_ in range(150):
        driver.start(round_ % 2)
        for slot in range(8):
            regions = [
                (noise.choice([DATA, RAM - 512, RAM, 0xFFFF_FFF0]), noise.choice([1, 512, 4 * MIB]))
                for _ in range(noise.randrange(4))
            ]
            driver.fill(
                slot,
                noise.choice([*commands, noise.randrange(256)]),
                noise.choice([0, SECTORS - 1, noise.getrandbits(48)]),
                noise.choice([0, 1, slot << 3, noise.getrandbits(16)]),
                regions,
                features=noise.choice([0, 1, noise.getrandbits(16)]),
                device=noise.getrandbits(8),
                packet=noise.randbytes(12),
                flags=noise.choice([5, 5, 5, noise.getrandbits(16)]),
            )
        driver.port_set(SACT, noise.getrandbits(32))
        driver.port_set(CI, noise.getrandbits(8))
        for _ in range(4):
            driver.set(4 * noise.randrange(0x90), noise.getrandbits(32))
    driver.set(4, 1)
    driver.start()
    assert driver.write(0, b"\2" * 512).status == READY
    assert driver.read(0, 512) == b"\2" * 512
    driver.controller.close()


# Interrupts


def test_line_is_high_while_a_port_has_an_interrupt_that_is_enabled(driver: AhciDriver) -> None:
    wire = Wire()
    driver.controller.function.intx.connect(wire)
    driver.fill(0, FLUSH)
    driver.give(0)
    wait_until(lambda: driver.port_get(CI) == 0, "the flush")
    wait_until(wire.is_high, "the line")
    assert driver.get(8) == 1
    driver.set(8, 1)
    assert wire.is_high(), "the port still has one"
    assert driver.get(8) == 1
    driver.port_set(IS, 0xFFFF_FFFF)
    driver.set(8, 1)
    assert not wire.is_high()
    driver.port_set(IE, 0)
    assert driver.ask(FLUSH).status == READY
    assert not wire.is_high()
    driver.port_set(IE, 1)
    driver.fill(0, FLUSH)
    driver.give(0)
    wait_until(wire.is_high, "the line")
    driver.set(4, 1 << 31)
    assert not wire.is_high()
    driver.set(4, 1 << 31 | 2)
    assert wire.is_high()
    driver.controller.reset()
    assert not wire.is_high()


def test_without_the_bus_nothing_is_taken_and_memory_is_left_alone(raw: Path) -> None:
    driver = AhciDriver([drive(raw, ",iops=300")])
    driver.start()
    driver.write(0, bytes(65536))
    for slot in range(32):
        regions = [(DATA + 0x1000 * slot, 0x1000)]
        driver.fill(slot, READ_QUEUED, 0, slot << 3, regions, features=8)
    driver.port_set(SACT, 0xFFFF_FFFF)
    driver.port_set(CI, 0xFFFF_FFFF)
    driver.set_bus_master(False)
    frames = driver.vm.read_memory(FRAMES, 0x100)
    mark = b"\5" * 0x2_0000
    driver.vm.write_memory(DATA, mark)
    left = driver.port_get(SACT)
    driver.port_set(CMD, START)
    driver.port_set(CMD, START | RECEIVE)
    assert driver.vm.read_memory(FRAMES, 0x100) == frames
    assert driver.vm.read_memory(DATA, len(mark)) == mark
    assert driver.port_get(SACT) == left
    driver.set_bus_master()
    wait_until(lambda: driver.port_get(SACT) == 0, "those that waited")
    driver.controller.close()


# CD-ROMs


def test_disc_is_read_by_packets(disc: AhciDriver) -> None:
    words = disc.identify(IDENTIFY_PACKET)
    assert words[0] >> 8 == 0x85
    ended, data = disc.packet(0x12, 0, 0, 0, 36, length=36)
    assert ended.status == READY
    assert data[0] == 5
    assert data[8:32] == b"TETRARCHCD-ROM          "
    assert ended.frame[12] & 3 == 3, "the end of a packet command"
    assert disc.packet(0)[0].status == READY
    _, data = disc.packet(0x25, length=8)
    assert struct.unpack(">II", data) == (BLOCKS - 1, 2048)
    _, data = disc.packet(0x28, 0, 0, 0, 0, 7, 0, 0, 3, length=3 * 2048)
    assert data == b"".join(struct.pack("<I", one) * 512 for one in (7, 8, 9))
    _, data = disc.packet(0xA8, 0, 0, 0, 1, 0, 0, 0, 0, 2, length=2 * 2048)
    assert data[:4] == struct.pack("<I", 256)
    _, data = disc.packet(0x28, 0, 0, 0, 0, 7, 0, 0, 3, length=100)
    assert data == (struct.pack("<I", 7) * 25), "as much as there is room for"
    _, data = disc.packet(0x43, 0, 0, 0, 0, 0, 0, 0, 20, length=20)
    assert data[2:6] == bytes([1, 1, 0, 0x14])


def test_packet_that_fails_has_its_reason_in_the_sense_data(disc: AhciDriver) -> None:
    for packet, key, code in (
        ((0x28, 0, 0, 0, 1, 44, 0, 0, 1), 5, 0x21),
        ((0x28, 0, 255, 255, 255, 255, 255, 255, 255), 5, 0x21),
        ((0xAA,), 5, 0x20),
        ((0x2A,), 5, 0x20),
        ((0x12, 1), 5, 0x24),
    ):
        ended, _ = disc.packet(*packet, length=2048)
        assert ended.status & ERROR
        assert ended.error >> 4 == key
        disc.restart()
        _, sense = disc.packet(3, 0, 0, 0, 18, length=18)
        assert (sense[2], sense[12]) == (key, code)
    for command in (IDENTIFY, READ):
        assert disc.ask(command, 0, 1, 512).error == ABORT
        disc.restart()


def test_tray_opens_and_closes(disc: AhciDriver) -> None:
    assert disc.packet(0x1B, 0, 0, 0, 2)[0].status == READY
    assert disc.packet(0)[0].error == 2 << 4
    disc.restart()
    assert disc.packet(0x1B, 0, 0, 0, 3)[0].status == READY
    assert disc.packet(0)[0].error == 6 << 4
    disc.restart()
    assert disc.packet(0)[0].status == READY


def test_disc_that_became_shorter_is_a_medium_error(iso: Path, disc: AhciDriver) -> None:
    os.truncate(iso, 100 * 2048)
    ended, _ = disc.packet(0x28, 0, 0, 0, 0, 200, 0, 0, 1, length=2048)
    assert ended.error == 3 << 4
    disc.restart()
    _, sense = disc.packet(3, 0, 0, 0, 18, length=18)
    assert (sense[2], sense[12]) == (3, 0x11)


# Life


def test_disks_are_let_go_of_at_the_end(driver: AhciDriver, raw: Path) -> None:
    with pytest.raises(ImageError, match="the image is in use"):
        block.open_disk(block.DiskSpec(raw))
    driver.controller.close()
    block.open_disk(block.DiskSpec(raw))
    # Nothing comes of what a guest asks.
    driver.fill(0, READ, 0, 1, [(DATA, 512)])
    driver.give(0)
    assert driver.wait().interrupts & (INTERFACE | TASK_FILE)


def test_saved_controller_goes_on_in_another(raw: Path, iso: Path) -> None:
    driver = AhciDriver([drive(raw), cd(iso)])
    driver.start(1)
    driver.start(0)
    assert driver.ask(SET_FEATURES, features=0x82).status == READY
    assert driver.write(3, b"\3" * 512).status == READY
    state = json.loads(json.dumps(driver.controller.save()))
    driver.controller.close()
    other = AhciDriver([drive(raw), cd(iso)])
    for at in range(LISTS, DATA + MIB, MIB):
        other.vm.write_memory(at, driver.vm.read_memory(at, MIB))
    other.controller.load(state)
    assert other.port_get(0) == LISTS
    assert other.read(3, 512) == b"\3" * 512
    assert not other.identify()[85] & 1 << 5
    other.port = 1
    assert other.packet(0)[0].error == 6 << 4, "what it was to be told"
    other.controller.close()


def test_damaged_states_are_refused(driver: AhciDriver) -> None:
    good = json.loads(json.dumps(driver.controller.save()))
    driver.controller.load(good)
    (port,) = good["ports"]
    damages: list[dict[str, Any]] = [
        {"controller": [1]},
        {"controller": None},
        {"ports": []},
        {"ports": [port, port]},
        {"ports": [port[:-1]]},
        {"ports": [[*port, 0]]},
        {"ports": [["x"]]},
        {"ports": [[-1]]},
    ]
    for changes in damages:
        with pytest.raises(StateError):
            driver.controller.load({**good, **changes})
    with pytest.raises(StateError):
        driver.controller.load({})
    driver.start()
    assert driver.read(0, 512) == bytes(512)
