"""The PVSCSI controller, by a driver that knows no more than VMware's header."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.storage.conftest import DISK_BYTES
from tests.storage.iso import make_iso
from tests.storage.pvscsi_driver import (
    BUS_RESET,
    CHECK,
    COMPLETIONS,
    DATA,
    DATA_RUN,
    FROM_GUEST,
    INTR_MASK,
    INTR_STATUS,
    INVALID,
    KICK_OTHER,
    LIST,
    LISTS,
    MESSAGES,
    NO_DATA,
    NO_TARGET,
    OK,
    PAGE,
    REQUESTS,
    SENSE,
    STATE,
    TO_GUEST,
    PvscsiDriver,
)
from tests.storage.wire import Wire
from tests.virtio.driver import wait_until

from tetrarch import block
from tetrarch.errors import ConfigError, ImageError, StateError
from tetrarch.storage import ScsiDrive
from tetrarch.storage.pvscsi import (
    ABORT_CMD,
    ADAPTER_RESET,
    CONFIG,
    FAILED,
    ISSUE_SCSI,
    RESET_BUS,
    RESET_DEVICE,
    RINGS,
    SETUP_MSG_RING,
    SETUP_REQCALLTHRESHOLD,
    SETUP_RINGS,
)

MIB = 1 << 20
SIZE = DISK_BYTES
BLOCKS = SIZE // 512
RAM = 16 * MIB

# Why commands fail: key, code and qualifier.
NO_COMMAND, RANGE, FIELD, NO_UNIT = (5, 0x20, 0), (5, 0x21, 0), (5, 0x24, 0), (5, 0x25, 0)
PARAMETER, LIST_LENGTH = (5, 0x26, 0), (5, 0x1A, 0)
RESET, CAPACITY, PROTECTED, STOPPED = (6, 0x29, 0), (6, 0x2A, 9), (7, 0x27, 0), (2, 4, 2)


def drive(path: Path, options: str = "", *, name: str = "disk0", cd: bool = False) -> ScsiDrive:
    spec = block.DiskSpec.parse(f"{path}{options}")
    return ScsiDrive(name, block.open_disk(spec), cd=cd)


def started(*drives: ScsiDrive, pages: int = 1) -> PvscsiDriver:
    driver = PvscsiDriver(drives)
    driver.start(pages)
    for target in range(len(drives)):
        driver.ready(target)
    return driver


@pytest.fixture
def driver(raw: Path) -> Iterator[PvscsiDriver]:
    driver = started(drive(raw))
    yield driver
    driver.controller.close()


def cdb(code: int, first: int = 0, count: int = 0, flags: int = 0) -> bytes:
    """A command for blocks, of the length of its group."""
    match code >> 5:
        case 0:
            return struct.pack(">IBB", code << 24 | first, count & 0xFF, 0)
        case 1 | 2:
            return struct.pack(">BBIBHB", code, flags, first, 0, count, 0)
        case 5:
            return struct.pack(">BBIIBB", code, flags, first, count, 0, 0)
    return struct.pack(">BBQIBB", code, flags, first, count, 0, 0)


# Commands of the controller


def test_commands_say_how_much_they_take_and_others_are_refused(raw: Path) -> None:
    driver = PvscsiDriver([drive(raw)])
    for number, words in (
        (SETUP_RINGS, 132),
        (SETUP_MSG_RING, 34),
        (SETUP_REQCALLTHRESHOLD, 1),
        (CONFIG, 6),
        (ISSUE_SCSI, 4),
        (RESET_DEVICE, 3),
        (ABORT_CMD, 4),
        (ADAPTER_RESET, 0),
        (RESET_BUS, 0),
        (0, FAILED),
        (9, FAILED),  # DEVICE_UNPLUG: drivers ask before
        (11, FAILED),
        (0xFFFF_FFFF, FAILED),
    ):
        assert driver.command(number) == words, number
        driver.commands.write(4, 2, 7)  # a part of a register is none
    driver.command(0, *range(500))
    assert driver.status == FAILED
    # A command begun anew forgets its data.
    driver.command(SETUP_REQCALLTHRESHOLD)
    driver.command(ABORT_CMD, 1, 2)
    assert driver.command(ABORT_CMD, 1, 0, 0) == 4
    assert driver.command(ABORT_CMD, 1, 0, 0, 0) == 0
    assert driver.command(SETUP_MSG_RING, 1, 0, *[0] * 32) == FAILED, "there are no rings"
    assert driver.command(SETUP_REQCALLTHRESHOLD, 1) == FAILED
    driver.controller.close()


def test_rings_that_cannot_be_are_refused(raw: Path) -> None:
    driver = PvscsiDriver([drive(raw)])
    for requests, completions, state, numbers in (
        (0, 1, STATE, ()),
        (1, 0, STATE, ()),
        (3, 1, STATE, ()),
        (1, 33, STATE, ()),
        (64, 1, STATE, ()),
        (0xFFFF_FFFF, 0xFFFF_FFFF, STATE, ()),
        (1, 1, RAM, ()),
        (1, 1, (1 << 64) - PAGE, ()),
        (1, 1, STATE, (RAM // PAGE,)),
        (1, 1, STATE, ((1 << 64) - 1,)),
        (1, 1, STATE, (1 << 52,)),
        (2, 2, STATE, (1, RAM // PAGE)),
    ):
        assert driver.set_up_rings(requests, completions, state, numbers) == FAILED
        driver.kick()
    assert driver.set_up_rings(32, 32) == 0
    assert (driver.state(8), driver.state(20)) == (10, 12)
    for pages in (0, 3, 17, 32, 0xFFFF_FFFF):
        assert driver.command(SETUP_MSG_RING, pages, 0, *[1, 0] * 16) == FAILED
    assert driver.command(SETUP_MSG_RING, 1, 0, RAM // PAGE, *[0] * 31) == FAILED
    assert driver.set_up_messages(16) == 34
    assert driver.state(136) == 9
    driver.set_bus_master(False)
    assert driver.set_up_rings() == FAILED, "without the bus"
    driver.controller.close()


def test_configuration_tells_how_many_targets_there_can_be(driver: PvscsiDriver) -> None:
    ask = driver.command
    assert ask(CONFIG, DATA, 0, 0, 0x2120, 0x1958, 0) == 0
    page = driver.vm.read_memory(DATA, 480)
    number, words, host, scsi = struct.unpack_from("<IHHH", page)
    assert (number, words, host, scsi) == (0x1958, 120, 0, 0)
    assert page[24:40].decode("utf-16-le") == "Tetrarch"
    assert struct.unpack_from("<I", page, 472) == (16,)
    assert ask(CONFIG, DATA, 0, 0, 0x2122, 0x1959, 0) == FAILED
    assert ask(CONFIG, DATA, 0, 0, 0x2121, 0x1958, 0) == FAILED
    assert ask(CONFIG, RAM - 4, 0, 0, 0x2120, 0x1958, 0) == FAILED
    assert ask(CONFIG, 0xFFFF_FFFF, 0xFFFF_FFFF, 0, 0x2120, 0x1958, 0) == FAILED


def test_request_outside_of_the_rings_has_its_own_completion(driver: PvscsiDriver) -> None:
    assert driver.write(5, b"\5" * 512).good
    driver.vm.write_memory(DATA, bytes(512))
    context, entry = driver.entry(cdb(0x28, 5, 1), 512)
    driver.vm.write_memory(LISTS, entry)
    assert driver.command(ISSUE_SCSI, LISTS, 0, LISTS + 0x1000, 0) == 0
    completion = driver.vm.read_memory(LISTS + 0x1000, 32)
    assert struct.unpack("<QQIHHQ", completion) == (context, 512, 0, OK, 0, 0)
    assert driver.vm.read_memory(DATA, 512) == b"\5" * 512
    assert driver.poll() is None
    assert driver.command(ISSUE_SCSI, RAM - 64, 0, LISTS, 0) == FAILED
    assert driver.command(ISSUE_SCSI, LISTS, 0, RAM - 8, 0) == 0, "nobody hears of its end"
    assert driver.read(5, 512) == b"\5" * 512


def test_request_outside_of_the_rings_waits_for_no_place_in_them(raw: Path) -> None:
    driver = started(drive(raw, ",iops=20"))
    for _ in range(30):
        _, entry = driver.entry(cdb(0x28, 0, 1), 512)
        driver.put(entry)
    driver.kick()
    wait_until(lambda: driver.state(4) == driver.state(0), "all to be taken")
    taken = driver.state(16)
    driver.set_state(16, taken - 128)  # no place for an answer
    assert driver.command(RESET_DEVICE, 0, 0, 0) == 0
    context, entry = driver.entry(bytes(6), flags=NO_DATA)
    driver.vm.write_memory(LISTS, entry)
    assert driver.command(ISSUE_SCSI, LISTS, 0, LISTS + 0x1000, 0) == 0
    completion = driver.vm.read_memory(LISTS + 0x1000, 32)
    assert struct.unpack("<QQIHHQ", completion) == (context, 0, 18, OK, CHECK, 0)
    driver.set_state(16, taken)
    driver.kick()
    for _ in range(30):
        driver.wait()
    driver.controller.close()


def test_requests_are_taken_again_where_the_driver_asks_to_be_spared_kicks(
    driver: PvscsiDriver,
) -> None:
    assert driver.state(24) == 0
    assert driver.command(SETUP_REQCALLTHRESHOLD, 7) == 1
    assert driver.state(24) == 1
    assert driver.read(0, 512) == bytes(512)
    assert driver.state(4) == driver.state(0), "what was taken is told"
    assert driver.command(SETUP_REQCALLTHRESHOLD, 0) == 0
    assert driver.state(24) == 0


# Commands of a disk


def test_disk_says_what_it_is(driver: PvscsiDriver) -> None:
    standard = driver.data(b"\x12\0\0\0\xff\0")
    assert standard[:8] == bytes([0, 0, 6, 0x12, 31, 0, 0, 2])
    assert standard[8:] == b"TETRARCHDISK            1.0 "
    assert driver.data(b"\x12\1\0\0\xff\0")[4:] == bytes([0, 0x80, 0x83, 0xB0, 0xB1, 0xB2])
    assert driver.data(b"\x12\1\x80\0\xff\0")[4:] == b"disk0"
    assert driver.data(b"\x12\1\x83\0\xff\0")[4:] == b"\2\1\0\x0dTETRARCHdisk0"
    limits = driver.data(b"\x12\1\xb0\0\xff\0")
    assert struct.unpack_from(">H", limits, 2) == (60,)
    assert limits[4] == 1
    assert struct.unpack_from(">HI", limits, 6) == (8, 0xFFFF)
    assert struct.unpack_from(">IIII", limits, 20) == (0xFFFF_FFFF, 256, 8, 1 << 31)
    assert struct.unpack_from(">Q", limits, 36) == (0x1_0000,)
    assert driver.data(b"\x12\1\xb1\0\xff\0")[4:6] == b"\0\1"
    assert driver.data(b"\x12\1\xb2\0\xff\0")[4:] == b"\0\xe0\2\0"
    assert driver.data(b"\x25" + bytes(9)) == struct.pack(">II", BLOCKS - 1, 512)
    capacity = driver.data(b"\x9e\x10" + bytes(8) + struct.pack(">I", 32) + bytes(2))
    assert struct.unpack_from(">QIBBB", capacity) == (BLOCKS - 1, 512, 0, 3, 0x80)
    caching = driver.data(b"\x1a\x08\x08\0\xff\0")
    assert (caching[2], caching[4], caching[6] & 4) == (0x10, 8, 4)
    # Requests pass each other.
    assert driver.data(b"\x1a\x08\x0a\0\xff\0")[4:] == b"\x0a\x0a\0\x10" + bytes(8)
    assert driver.data(b"\x1a\x08\x4a\0\xff\0")[4:] == b"\x0a\x0a" + bytes(10)
    assert driver.data(b"\xa0" + bytes(5) + struct.pack(">I", 16) + bytes(2)) == (
        bytes([0, 0, 0, 8]) + bytes(12)
    )
    # The driver's room is the other limit.
    assert driver.data(b"\x12\0\0\0\xff\0", 7) == standard[:7]


def test_data_of_each_kind_of_transfer_goes_both_ways(image: Path) -> None:
    driver = started(drive(image), pages=2)
    data = bytes(random.Random(1).randbytes(256 * 512))
    driver.vm.write_memory(DATA, data)
    for code, first in ((0x0A, 3), (0x2A, 1000), (0xAA, 2000), (0x8A, 3000)):
        count = 0 if code == 0x0A else 256
        assert driver.ask(cdb(code, first, count), len(data), flags=FROM_GUEST).good
    for code, first in ((0x08, 3), (0x28, 1000), (0xA8, 2000), (0x88, 3000)):
        count = 0 if code == 0x08 else 256
        assert driver.data(cdb(code, first, count), len(data)) == data
    assert driver.data(cdb(0x28, 5, 0)) == b""
    # With force unit access, and more room than is wanted.
    assert driver.write(9, b"\7" * 1024, fua=True).good
    assert driver.data(cdb(0x28, 9, 2)) == b"\7" * 1024
    assert driver.ask(cdb(0x35), flags=NO_DATA).good
    assert driver.ask(cdb(0x91), flags=NO_DATA).good
    driver.controller.close()
    copy = image.with_name("flat.img")
    block.convert(image, copy)
    with copy.open("rb") as file:
        file.seek(1000 * 512)
        assert file.read(len(data)) == data


def test_lists_of_segments_are_followed(driver: PvscsiDriver) -> None:
    data = random.Random(2).randbytes(64 * 512)
    driver.write(0, data)
    # Of odd lengths, at odd places, the second part of the list in another page.
    places, left, at = [], len(data), DATA
    sizes = random.Random(3)
    while left:
        size = min(left, sizes.randrange(1, 700))
        places.append((at, size))
        at += size + sizes.randrange(3) * 37
        left -= size
    driver.vm.write_memory(DATA, bytes(at - DATA))
    half = len(places) // 2
    start = LISTS + PAGE - 16 * (half + 1)
    driver.put_list(places[:half], start)
    driver.vm.write_memory(LISTS + PAGE - 16, struct.pack("<QII", LISTS + 2 * PAGE, 0, 1))
    driver.put_list(places[half:], LISTS + 2 * PAGE)
    done = driver.ask(cdb(0x28, 0, 64), len(data), address=start, flags=TO_GUEST | LIST)
    assert done.good
    assert done.length == len(data)
    found = b"".join(driver.vm.read_memory(place, size) for place, size in places)
    assert found == data
    done = driver.ask(cdb(0x2A, 100, 64), len(data), address=start, flags=FROM_GUEST | LIST)
    assert done.good
    assert driver.read(100, len(data)) == data


def test_what_a_disk_refuses_it_says_why(driver: PvscsiDriver) -> None:
    for command, sense in (
        (cdb(0x28, BLOCKS - 1, 2), RANGE),
        (cdb(0x88, (1 << 64) - 1, 1), RANGE),
        (cdb(0x88, 0, 0xFFFF_FFFF), FIELD),
        (cdb(0x28, 0, 1, 0x20), FIELD),
        (cdb(0x2A, BLOCKS, 1), RANGE),
        (cdb(0x35, BLOCKS, 1), RANGE),
        (cdb(0x93, 0, 0, 1), FIELD),
        (cdb(0x93, 0, 0x1_0001, 1), FIELD),
        (b"\x12\0\x80\0\xff\0", FIELD),
        (b"\x12\1\xc0\0\xff\0", FIELD),
        (b"\x1a\0\xc8\0\xff\0", (5, 0x39, 0)),
        (b"\xa0" + bytes(5) + struct.pack(">I", 15) + bytes(2), FIELD),
        (b"\xff" + bytes(15), NO_COMMAND),
        (b"\x9e\x12" + bytes(14), FIELD),
        (cdb(0x2F, 0, 1, 2), FIELD),
        (cdb(0x8F, 0, 1, 4), FIELD),
        # A block with its own number in each place.
        (cdb(0x93, 0, 1, 2), FIELD),
        (cdb(0x41, 0, 1, 4), FIELD),
    ):
        done = driver.ask(command, 512, flags=0)
        assert (done.host, done.scsi, done.sense) == (OK, CHECK, sense), command
        assert done.length == 0
    # Sense data goes where there is room for it.
    refused = b"\xff" + bytes(15)
    assert driver.ask(refused, sense=(0, 0)).sense is None
    assert driver.ask(refused, sense=(RAM - 2, 96)).sense is None
    driver.vm.write_memory(SENSE + 96, b"\xee" * 96)
    assert driver.ask(refused, sense=(SENSE + 96, 4)).scsi == CHECK
    assert driver.vm.read_memory(SENSE + 96, 5) == b"\x70\0\5\0\xee"


def test_readonly_disk_is_protected(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    block.create(path, SIZE)
    driver = started(drive(path, ",readonly"))
    assert driver.data(b"\x1a\x08\x08\0\xff\0")[2] == 0x90
    for command in (cdb(0x2A, 0, 1), cdb(0x0A, 0, 1), cdb(0x93, 0, 1, 1)):
        assert driver.ask(command, 512, flags=FROM_GUEST).sense == PROTECTED
    assert driver.read(0, 512) == bytes(512)
    driver.controller.close()


def test_ranges_are_unmapped(driver: PvscsiDriver, raw: Path) -> None:
    assert driver.write(0, b"\1" * MIB).good
    allocated = block.info(raw)["allocated"]
    ranges = struct.pack(">QII", 0, 1024, 0) + struct.pack(">QII", 1536, 512, 0)
    header = struct.pack(">HHI", 6 + len(ranges), len(ranges), 0)

    def unmap(data: bytes, length: int | None = None) -> tuple[int, int, int] | None:
        driver.vm.write_memory(DATA, data)
        length = len(data) if length is None else length
        command = struct.pack(">B6xHx", 0x42, length)
        return driver.ask(command, len(data), flags=FROM_GUEST).sense

    assert unmap(header + ranges) is None
    assert driver.read(0, 512) == bytes(512)
    assert driver.read(1024, 512) == b"\1" * 512
    assert block.info(raw)["allocated"] < allocated - MIB // 2
    assert unmap(b"", 0) is None
    assert unmap(header[:4]) == LIST_LENGTH
    assert unmap(header + struct.pack(">QII", BLOCKS - 1, 2, 0)) == RANGE
    assert unmap(struct.pack(">HHI", 0xFFFF, 0xFFFF, 0) + bytes(16 * 300)) == PARAMETER
    driver.vm.write_memory(DATA, header + ranges)
    short = driver.ask(struct.pack(">B6xHx", 0x42, 40), 39, flags=FROM_GUEST)
    assert (short.host, short.length) == (DATA_RUN, 0)
    assert driver.ask(struct.pack(">BB5xHx", 0x42, 1, 40), 40).sense == FIELD


def test_one_block_is_written_to_many_places(driver: PvscsiDriver) -> None:
    block_of_noise = random.Random(4).randbytes(512)
    driver.vm.write_memory(DATA, block_of_noise)
    # More than one request of the host's takes.
    assert driver.ask(cdb(0x93, 7, 5000), 512, flags=FROM_GUEST).good
    assert driver.read(6, 512) == bytes(512)
    for first in (7, 1030, 5006):
        assert driver.read(first, 512) == block_of_noise
    assert driver.read(5007, 512) == bytes(512)
    # Of zeroes, and with no data at all.
    driver.vm.write_memory(DATA, bytes(512))
    assert driver.ask(cdb(0x41, 7, 10, 8), 512, flags=FROM_GUEST).good
    assert driver.ask(cdb(0x93, 100, 10, 1), flags=NO_DATA).good
    for first, zero in ((7, True), (16, True), (17, False), (99, False), (100, True), (110, False)):
        assert (driver.read(first, 512) == bytes(512)) == zero, first
    assert driver.ask(cdb(0x41, 7, 10), 511, flags=FROM_GUEST).host == DATA_RUN


def test_stopped_disk_waits_to_be_started(driver: PvscsiDriver) -> None:
    assert driver.ask(b"\x1b\0\0\0\0\0", flags=NO_DATA).good
    assert driver.ask(bytes(6), flags=NO_DATA).sense == STOPPED
    assert driver.ask(cdb(0x28, 0, 1), 512).sense == STOPPED
    assert driver.ask(b"\x1b\0\0\0\1\0", flags=NO_DATA).good
    assert driver.read(0, 512) == bytes(512)
    assert driver.data(b"\3\0\0\0\x12\0") == b"\x70" + bytes(6) + b"\x0a" + bytes(10)


def test_resized_disk_is_told_and_has_its_new_blocks(driver: PvscsiDriver) -> None:
    disk = driver.controller.drives[0].disk
    disk.resize(2 * SIZE)
    driver.controller.rings.resized(0)
    assert driver.ask(bytes(6), flags=NO_DATA).sense == CAPACITY
    assert driver.data(b"\x25" + bytes(9)) == struct.pack(">II", 2 * BLOCKS - 1, 512)
    assert driver.write(2 * BLOCKS - 1, b"\1" * 512).good


# Targets and their rings


def test_targets_are_told_apart_and_others_are_not_there(raw: Path, tmp_path: Path) -> None:
    disc = make_iso(tmp_path / "disc.iso", "FILE.TXT", b"on the disc")
    second = tmp_path / "second.qcow2"
    block.create(second, SIZE // 2)
    driver = started(
        drive(raw), drive(second, name="disk1"), drive(disc, ",readonly", name="cd", cd=True)
    )
    assert driver.write(1, b"\1" * 512).good
    assert driver.write(1, b"\2" * 512, target=1).good
    assert driver.read(1, 512) == b"\1" * 512
    assert driver.read(1, 512, target=1) == b"\2" * 512
    inquiry = driver.data(b"\x12\0\0\0\x24\0", target=2)
    assert (inquiry[0], inquiry[1], inquiry[16:22]) == (5, 0x80, b"CD-ROM")
    sectors, size = struct.unpack(">II", driver.data(b"\x25" + bytes(9), target=2))
    assert size == 2048
    assert driver.data(cdb(0x28, 16, 1), 2048, target=2)[1:6] == b"CD001"
    assert driver.ask(cdb(0x28, sectors + 1, 1), 2048, target=2).sense == RANGE
    assert driver.ask(cdb(0x2A, 0, 1), 2048, flags=FROM_GUEST, target=2).sense == NO_COMMAND
    for target, bus in ((3, 0), (15, 0), (16, 0), (255, 0), (0, 1)):
        assert driver.ask(bytes(6), flags=NO_DATA, target=target, bus=bus).host == NO_TARGET
    # Of a target there is unit 0.
    assert driver.ask(bytes(6), flags=NO_DATA, lun=1).sense == NO_UNIT
    assert driver.data(b"\x12\0\0\0\x24\0", lun=3)[0] == 0x7F
    assert driver.data(b"\3\0\0\0\x12\0", lun=1)[12] == 0x25
    driver.controller.close()


def test_requests_of_nonsense_end_with_a_status_of_the_adapters(driver: PvscsiDriver) -> None:
    read, write = cdb(0x28, 0, 8), cdb(0x2A, 0, 8)
    driver.put_list([(DATA, 512)] * 8)
    driver.vm.write_memory(LISTS + 0x2000, struct.pack("<QII", LISTS + 0x2000, 4096, 1))
    for command, room, address, flags, host in (
        (read, 4095, DATA, TO_GUEST, DATA_RUN),
        (read, 4096, DATA, TO_GUEST | NO_DATA, DATA_RUN),
        (read, 4096, RAM - 4095, TO_GUEST, INVALID),
        (read, 4096, (1 << 64) - 1, TO_GUEST, INVALID),
        (read, (1 << 64) - 1, (1 << 64) - 4096, TO_GUEST, INVALID),
        (read, 4096, DATA, FROM_GUEST, INVALID),
        (write, 4096, DATA, TO_GUEST, INVALID),
        (write, 4096, RAM, FROM_GUEST, INVALID),
        (read, 4096, LISTS + 0x2000, TO_GUEST | LIST, INVALID),
        (read, 4096, RAM - 8, TO_GUEST | LIST, INVALID),
        (read, 4096, LISTS + PAGE - 8, TO_GUEST | LIST, INVALID),
        (read, 4096, DATA, TO_GUEST | 2, INVALID),  # a long command, somewhere else
        (read, 4096, LISTS, TO_GUEST | LIST, OK),
    ):
        done = driver.ask(command, room, address=address, flags=flags)
        assert (done.host, done.scsi, done.sense) == (host, 0, None), (command, room, address)
        assert done.length == (4096 if host == OK else 0)
    _, entry = driver.entry(read, 4096)
    driver.put(entry[:56] + b"\x11" + entry[57:])  # of 17 bytes
    driver.kick()
    assert driver.wait().host == INVALID


def test_full_completion_ring_waits_for_its_driver(raw: Path) -> None:
    driver = PvscsiDriver([drive(raw)])
    driver.start()
    assert driver.set_up_rings(32, 1) == 0
    contexts = []
    for _ in range(200):
        context, entry = driver.entry(b"\x12\0\0\0\x24\0", 36)
        contexts.append(context)
        driver.put(entry)
    driver.kick()
    wait_until(lambda: driver.state(12) == 128, "the ring to be full")
    assert driver.state(4) == 128, "no more are taken than can be answered"
    done = [driver.wait().context for _ in range(128)]
    # Who has taken interrupts has taken completions.
    driver.registers.write(INTR_STATUS - RINGS, 4, 1)
    done += [driver.wait().context for _ in range(72)]
    assert done == contexts
    driver.controller.close()


def test_indices_of_nonsense_do_no_harm(driver: PvscsiDriver) -> None:
    before = driver.state(0)
    for index in (before + 33, before - 1, before + 0x8000_0000):
        driver.set_state(0, index)
        driver.kick()
        driver.kick(KICK_OTHER)
    assert driver.command(RESET_BUS) == 0
    assert (driver.state(4), driver.poll()) == (before, None)
    driver.set_state(0, before)
    taken = driver.state(16)
    driver.set_state(16, taken + 5)  # more than were written
    _, entry = driver.entry(bytes(6), flags=NO_DATA)
    driver.put(entry)
    driver.kick()
    assert driver.command(ABORT_CMD, 1, 0, 0, 0) == 0
    assert driver.state(12) == taken
    driver.set_state(16, taken)
    driver.kick()
    assert driver.wait().sense == RESET


def test_many_requests_are_in_flight(image: Path) -> None:
    driver = started(drive(image), pages=8)
    noise = random.Random(5)
    model = bytearray(SIZE)
    for _ in range(6):
        contexts = {}
        for slot in range(200):
            first = slot * 64 + noise.randrange(32)
            data = noise.randbytes(512 * noise.randrange(1, 9))
            at = DATA + 0x1000 * slot
            driver.vm.write_memory(at, data)
            model[512 * first : 512 * first + len(data)] = data
            command = cdb(0x2A, first, len(data) // 512)
            context, entry = driver.entry(command, len(data), address=at, flags=FROM_GUEST)
            contexts[context] = len(data)
            driver.put(entry)
            if noise.random() < 0.3:
                driver.kick()
        driver.kick()
        for _ in range(200):
            done = driver.wait()
            assert done.good
            assert done.length == contexts.pop(done.context)
        assert not contexts
    for first in range(0, SIZE // 512, 1024):
        assert driver.read(first, 512 * 1024) == model[512 * first : 512 * (first + 1024)]
    driver.controller.close()


# Resets


def test_reset_of_targets_ends_what_is_in_flight(raw: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.img"
    block.create(second, SIZE)
    driver = started(drive(raw, ",iops=100"), drive(second, name="disk1"))
    contexts = []
    for _ in range(20):
        context, entry = driver.entry(cdb(0x28, 0, 8), 4096)
        contexts.append(context)
        driver.put(entry)
    # What lies in the ring is of before.
    assert driver.command(RESET_DEVICE, 0, 0, 0) == 0
    done = []
    while (one := driver.poll()) is not None:
        done.append(one)
    assert sorted(one.context for one in done) == contexts
    assert {one.host for one in done} <= {OK, BUS_RESET}
    mark = b"\5" * 4096
    driver.vm.write_memory(DATA, mark)
    assert driver.ask(bytes(6), flags=NO_DATA).sense == RESET
    assert driver.ask(bytes(6), flags=NO_DATA, target=1).good, "it is another"
    assert driver.vm.read_memory(DATA, 4096) == mark
    assert driver.command(RESET_BUS) == 0
    assert driver.ask(bytes(6), flags=NO_DATA, target=1).sense == RESET
    for words in ((2, 0, 0), (16, 0, 0), (0xFFFF_FFFF, 0, 0), (0, 0x100, 0)):
        assert driver.command(RESET_DEVICE, *words) == FAILED
    driver.controller.close()


def test_reset_of_the_adapter_leaves_memory_alone(driver: PvscsiDriver) -> None:
    for round_ in range(20):
        for index in range(16):
            _, entry = driver.entry(cdb(0x28, 7, 8), 4096, address=DATA + PAGE * index)
            driver.put(entry)
        driver.kick()
        assert driver.command(ADAPTER_RESET) == 0
        # Nothing is written into this memory any more.
        mark = bytes([round_ + 1]) * (16 * PAGE)
        driver.vm.write_memory(DATA, mark)
        driver.kick()
        driver.start()
        driver.ready()
        assert driver.vm.read_memory(DATA, len(mark)) == mark
    assert driver.read(0, 512) == bytes(512)


def test_aborted_request_ends(raw: Path) -> None:
    driver = started(drive(raw, ",iops=50"))
    contexts = []
    for _ in range(12):
        context, entry = driver.entry(cdb(0x28, 0, 1), 512)
        contexts.append(context)
        driver.put(entry)
    for context in contexts:
        assert driver.command(ABORT_CMD, context, 0, 0, 0) == 0
    assert sorted(driver.wait().context for _ in contexts) == contexts
    driver.controller.close()


# Interrupts


def test_line_is_high_until_its_cause_is_taken_and_masked_by_its_register(
    driver: PvscsiDriver,
) -> None:
    wire = Wire()
    driver.controller.function.intx.connect(wire)

    def status() -> int:
        return driver.registers.read(INTR_STATUS - RINGS, 4)

    assert status() == 1
    assert not wire.is_high(), "masked"
    driver.registers.write(INTR_MASK - RINGS, 4, 0xF)
    assert wire.is_high()
    driver.registers.write(INTR_STATUS - RINGS, 4, 1)
    assert (status(), wire.is_high()) == (0, False)
    assert driver.read(0, 512) == bytes(512)
    wait_until(wire.is_high, "the line")
    assert status() == 1
    driver.command(ADAPTER_RESET)
    assert (status(), wire.is_high()) == (0, False)
    assert driver.registers.read(INTR_MASK - RINGS, 4) == 0xF


# Targets that come and go


def test_driver_hears_of_targets_that_come_and_go(driver: PvscsiDriver, tmp_path: Path) -> None:
    path = tmp_path / "late.img"
    block.create(path, SIZE)
    controller = driver.controller
    assert driver.set_up_messages() == 34
    assert controller.attach(drive(path, name="late"), 5) == 5
    wait_until(lambda: driver.state(128) == 1, "the message")
    message = driver.vm.read_memory(MESSAGES, 128)
    assert message == struct.pack("<III", 0, 0, 5) + bytes(116)
    assert driver.registers.read(INTR_STATUS - RINGS, 4) & 4
    driver.set_state(132, 1)
    driver.ready(5)
    assert driver.write(1, b"\5" * 512, target=5).good
    with pytest.raises(TimeoutError, match="has not given target 5 of pvscsi up"):
        controller.detach(5, timeout=0.1)
    assert driver.state(128) == 2
    assert driver.vm.read_memory(MESSAGES + 128, 128) == struct.pack("<III", 1, 0, 5) + bytes(116)
    assert driver.read(1, 512, target=5) == b"\5" * 512, "it is there until then"
    driver.set_state(132, 2)
    hears = threading.Timer(0.1, driver.set_state, (132, 3))
    hears.start()
    controller.detach(5)
    hears.join()
    with pytest.raises(LookupError, match="pvscsi has no target 5"):
        controller.detach(5)
    assert driver.ask(bytes(6), flags=NO_DATA, target=5).host == NO_TARGET
    block.open_disk(block.DiskSpec(path)).close()
    # Of more than there is room for, some wait.
    for _ in range(40):
        controller.rings.ask_to_leave(7)
    driver.kick()
    wait_until(lambda: driver.state(128) == 35, "a full ring")
    assert not controller.rings.has_left(7)
    driver.set_state(132, 35)
    driver.kick()
    wait_until(lambda: driver.state(128) == 43, "the rest")
    driver.set_state(132, 43)
    assert controller.rings.has_left(7)


def test_target_that_is_to_go_is_told_anew_in_another_ring(
    driver: PvscsiDriver, tmp_path: Path
) -> None:
    path = tmp_path / "late.img"
    block.create(path, SIZE)
    rings = driver.controller.rings
    assert driver.set_up_messages() == 34
    rings.ask_to_leave(0)
    wait_until(lambda: driver.state(128) == 1, "the message")
    driver.vm.write_memory(MESSAGES, bytes(128))
    assert driver.set_up_messages() == 34
    wait_until(lambda: driver.state(128) == 1, "the message anew")
    assert driver.vm.read_memory(MESSAGES, 12) == struct.pack("<III", 1, 0, 0)
    assert not rings.has_left(0)
    driver.set_state(132, 1)
    assert rings.has_left(0)
    # What was heard is not told again, and no message of another stands for it.
    assert driver.set_up_messages() == 34
    assert rings.has_left(0)
    driver.controller.attach(drive(path, name="late"), 5)
    wait_until(lambda: driver.state(128) == 1, "the only message")
    assert driver.vm.read_memory(MESSAGES, 12) == struct.pack("<III", 0, 0, 5)


def test_who_waits_for_a_drive_to_go_takes_no_other(driver: PvscsiDriver, tmp_path: Path) -> None:
    controller = driver.controller
    for name in ("late", "other"):
        block.create(tmp_path / f"{name}.img", SIZE)
    other = drive(tmp_path / "other.img", name="other")
    assert driver.set_up_messages() == 34
    controller.attach(drive(tmp_path / "late.img", name="late"), 5)
    ends: list[str] = []

    def swap() -> None:
        try:
            controller.detach(5)
            controller.attach(other, 5)
            ends.append("swapped")
        except LookupError as error:
            ends.append(str(error))

    both = [threading.Thread(target=swap) for _ in range(2)]
    for one in both:
        one.start()
    wait_until(lambda: driver.state(128) == 3, "both to have asked")
    driver.set_state(132, 3)
    for one in both:
        one.join()
    assert sorted(ends) == ["pvscsi has no target 5", "swapped"]
    assert controller.drives[5] is other
    driver.ready(5)


def test_places_are_the_first_that_are_free(raw: Path, tmp_path: Path) -> None:
    controller = PvscsiDriver([drive(raw)]).controller
    path = tmp_path / "more.img"
    block.create(path, SIZE)
    for target in range(1, 16):
        assert controller.attach(drive(path, ",readonly", name=f"more{target}")) == target
    extra = drive(path, ",readonly", name="extra")
    with pytest.raises(ConfigError, match="pvscsi is full"):
        controller.attach(extra)
    controller.detach(4)
    for taken in (0, 16, 99):
        with pytest.raises(ConfigError, match=f"no free target {taken}"):
            controller.attach(extra, taken)
    assert controller.attach(extra) == 4
    controller.close()


# The bus


def test_without_the_bus_nothing_is_taken_and_memory_is_left_alone(raw: Path) -> None:
    driver = started(drive(raw, ",iops=300"))
    driver.write(0, bytes(PAGE))
    contexts = []
    for one in range(30):
        context, entry = driver.entry(cdb(0x28, 0, 8), PAGE, address=DATA + PAGE * one)
        contexts.append(context)
        driver.put(entry)
    driver.kick()
    driver.set_bus_master(False)
    # What was taken is over; what was not, waits.
    done = []
    while (one_done := driver.poll()) is not None:
        done.append(one_done.context)
    mark = b"\5" * (30 * PAGE)
    state = driver.vm.read_memory(STATE, PAGE)
    driver.vm.write_memory(DATA, mark)
    driver.kick()
    for words in ((RESET_BUS,), (CONFIG, DATA, 0, 0, 0x2120, 0x1958, 0), (ABORT_CMD, 1, 0, 0, 0)):
        driver.command(*words)
    driver.controller.rings.ask_to_leave(0)
    assert driver.vm.read_memory(DATA, len(mark)) == mark
    assert driver.vm.read_memory(STATE, PAGE) == state
    driver.set_bus_master()
    while len(done) < 30:
        done.append(driver.wait().context)
    assert sorted(done) == contexts
    driver.controller.close()


# Life


def test_disk_is_let_go_of_at_the_end(driver: PvscsiDriver, raw: Path) -> None:
    with pytest.raises(ImageError, match="the image is in use"):
        block.open_disk(block.DiskSpec(raw))
    driver.controller.close()
    block.open_disk(block.DiskSpec(raw)).close()
    done = driver.ask(cdb(0x28, 0, 1), 512)
    assert not done.good


def test_saved_controller_goes_on_in_another(driver: PvscsiDriver, raw: Path) -> None:
    assert driver.set_up_messages() == 34
    driver.registers.write(INTR_MASK - RINGS, 4, 5)
    assert driver.write(3, b"\3" * 512).good
    driver.command(SETUP_REQCALLTHRESHOLD)
    # Offered, and not rung: the other is rung for it.
    context, entry = driver.entry(cdb(0x28, 3, 1), 512)
    driver.put(entry)
    state = json.loads(json.dumps(driver.controller.save()))
    driver.controller.close()
    other = PvscsiDriver([drive(raw)])
    for at in range(STATE, DATA + MIB, MIB):
        other.vm.write_memory(at, driver.vm.read_memory(at, MIB))
    other.controller.load(state)
    done = other.wait()
    assert done.good
    assert done.context == context
    assert other.vm.read_memory(DATA, 512) == b"\3" * 512
    assert other.registers.read(INTR_MASK - RINGS, 4) == 5
    # The command that was begun is ended there.
    other.commands.write(4, 4, 1)
    assert other.status == 1
    assert other.state(24) == 1
    other.controller.rings.ask_to_leave(0)
    wait_until(lambda: other.state(128) == 1, "the message")
    assert json.loads(json.dumps(other.controller.save()))["rings"]["leaving"][0] == 1
    other.controller.close()


def test_damaged_states_are_refused(driver: PvscsiDriver, raw: Path) -> None:
    good = json.loads(json.dumps(driver.controller.save()))
    driver.controller.close()
    other = PvscsiDriver([drive(raw)])
    other.controller.load(good)
    rings = good["rings"]
    for name, row in (
        ("positions", [1, 2]),
        ("positions", [1 << 32, 0, 0]),
        ("positions", [-1, 0, 0]),
        ("positions", None),
        ("state", RAM // PAGE),
        ("state", 1 << 63),
        ("requests", []),
        ("requests", [1, 2, 3]),
        ("completions", [RAM // PAGE]),
        ("completions", list(range(64))),
        ("messages", [RAM // PAGE]),
        ("answers", [1]),
        ("news", [1]),
        ("news", [0, 16]),
        ("news", ["x", 0]),
        ("leaving", []),
        ("leaving", [1 << 40] * 16),
        ("targets", []),
        ("targets", [[]] * 16),
        ("targets", [[0, 0]] * 16),
        ("interrupts", [0]),
    ):
        with pytest.raises(StateError):
            other.controller.load({**good, "rings": {**rings, name: row}})
    with pytest.raises(StateError):
        other.controller.load({})
    words = {**good["registers"], "command": ABORT_CMD, "words": [1] * 100}
    other.controller.load({**good, "registers": words})
    other.start()
    other.ready()
    assert other.read(0, 512) == bytes(512)
    other.controller.close()


def test_any_words_at_all_do_no_harm(driver: PvscsiDriver) -> None:
    """Requests of noise, with commands and numbers that are near to what there is."""
    noise = random.Random(os.environ.get("PVSCSI_SEED", "7"))
    codes = [0, 3, 8, 10, 0x12, 0x1A, 0x1B, 0x25, 0x28, 0x2A, 0x2F, 0x35, 0x41, 0x42, 0x5A]
    codes += [0x88, 0x8A, 0x8F, 0x91, 0x93, 0x9E, 0xA0, 0xA8, 0xAA]
    for round_ in range(60):
        for _ in range(32):
            entry = bytearray(noise.randbytes(128))
            for at in (8, 24):
                near = noise.choice([0, DATA, LISTS, RAM - 8, RAM, REQUESTS, COMPLETIONS])
                entry[at : at + 8] = struct.pack("<Q", near + noise.choice([0, 0, 8, 4]))
            if noise.random() < 0.8:
                entry[16:24] = struct.pack("<Q", noise.randrange(1 << 14))
                entry[36:40] = struct.pack("<I", noise.randrange(32))
            command = struct.pack(">BB8H", noise.choice(codes), 0, *[noise.randrange(9)] * 8)[:16]
            entry[40:57] = command + b"\x10"
            entry[57:68] = bytes(11)
            if noise.random() < 0.1:
                entry[57:68] = noise.randbytes(11)
            driver.put(bytes(entry))
        driver.kick()
        if noise.random() < 0.3:
            driver.command(noise.randrange(12), *(noise.randrange(5) for _ in range(140)))
        driver.set_state(16, driver.state(12) - noise.choice([0, 0, 1, 200]))
        if round_ % 10 == 9:
            driver.start()
    driver.start()
    driver.ready()
    assert driver.write(0, b"\2" * 512).good
    assert driver.read(0, 512) == b"\2" * 512
