"""The NVMe controller, by a driver that knows no more than the specification."""

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
from tests.storage.nvme_driver import (
    ABORT,
    CREATE_CQ,
    CREATE_SQ,
    DATA,
    DELETE_CQ,
    DELETE_SQ,
    EVENT,
    FLUSH,
    GET_FEATURES,
    GET_LOG,
    IDENTIFY,
    LISTS,
    MANAGE,
    PAGE,
    QUEUES,
    READ,
    SET_FEATURES,
    WRITE,
    ZEROES,
    NvmeDriver,
)
from tests.storage.wire import Wire
from tests.virtio.driver import wait_until

from tetrarch import block
from tetrarch.errors import ImageError, StateError
from tetrarch.storage.nvme import ENABLE, FATAL, SHUT_DOWN

MIB = 1 << 20
SIZE = DISK_BYTES
BLOCKS = SIZE // 512
RAM = 16 * MIB

# Ends of commands.
OPCODE, FIELD, TRANSFER, NAMESPACE, SEQUENCE, OFFSET = 0x01, 0x02, 0x04, 0x0B, 0x0C, 0x13
PROTECTED, RANGE = 0x20, 0x80
NO_CQ, NO_QUEUE, QUEUE_SIZE, TOO_MANY, VECTOR, NO_PAGE, DELETION, NOT_SAVED = (
    *(0x100, 0x101, 0x102, 0x105),
    *(0x108, 0x109, 0x10C, 0x10D),
)


def opened(path: Path, options: str = "", queues: int = 2) -> NvmeDriver:
    return NvmeDriver(block.open_disk(block.DiskSpec.parse(f"{path}{options}")), queues)


@pytest.fixture
def driver(raw: Path) -> Iterator[NvmeDriver]:
    driver = opened(raw)
    driver.start(2)
    yield driver
    driver.controller.close()


def test_registers_describe_the_controller(raw: Path) -> None:
    driver = opened(raw)
    assert driver.get(0, 8) == driver.get(0) | driver.get(4) << 32
    assert driver.get(0, 8) & 0xFFFF == 1023
    assert driver.get(0, 8) >> 37 & 0xFF == 1, "the NVM command set"
    assert driver.get(8) == 0x0001_0400
    assert driver.get(10, 2) == 1, "a part of a word"
    assert driver.status == 0
    driver.enable()
    driver.set(0x14, 0)
    assert driver.status == 0
    assert driver.get(0x28, 8) == QUEUES, "a reset leaves the places of the admin queues"


def test_configuration_that_cannot_be_is_a_fatal_status_until_a_reset(raw: Path) -> None:
    driver = opened(raw)
    for registers in (
        {0x24: 0, 0x28: QUEUES, 0x30: QUEUES},  # queues of one entry
        {0x24: 0x1F_001F, 0x28: RAM - PAGE // 2, 0x30: QUEUES, 0x14: 0x80},  # pages of 8 KiB
        {0x24: 0x1F_001F, 0x28: RAM, 0x30: QUEUES},
        {0x24: 0xFFF_0FFF, 0x28: RAM - PAGE, 0x30: QUEUES},
        {0x24: 0x1F_001F, 0x28: QUEUES, 0x30: (1 << 64) - PAGE},
    ):
        for offset, value in registers.items():
            driver.set(offset, value, 8 if offset in (0x28, 0x30) else 4)
        driver.set(0x14, driver.get(0x14) | ENABLE)
        assert driver.status == FATAL
        driver.doorbells.write(0, 4, 1)
        driver.set(0x14, 0)
        assert driver.status == 0
    driver.start()
    assert driver.read(0, 512) == bytes(512)


def test_identify_tells_the_controller_and_its_namespace(driver: NvmeDriver) -> None:
    controller = driver.identify(1)
    assert controller[4:24] == b"disk0".ljust(20)
    assert controller[24:64].strip() == b"Tetrarch NVMe disk"
    assert struct.unpack_from("<I", controller, 516) == (1,)
    assert controller[768:].startswith(b"nqn.2014-08.org.nvmexpress:uuid:")
    namespace = driver.identify(0, namespace=1)
    assert struct.unpack_from("<QQQ", namespace) == (BLOCKS,) * 3
    assert namespace[130] == 9
    assert namespace[99] == 0
    assert struct.unpack_from("<II", driver.identify(2)) == (1, 0)
    assert struct.unpack_from("<I", driver.identify(2, namespace=1)) == (0,)
    names = driver.identify(3, namespace=1)
    assert names[:2] == b"\x03\x10"
    assert any(names[4:20])
    assert names[20:] == bytes(PAGE - 20)
    for cns, namespace_id, status in (
        (0, 2, NAMESPACE),
        (2, 0xFFFF_FFFF, NAMESPACE),
        (3, 7, NAMESPACE),
        (0x55, 0, FIELD),
    ):
        assert driver.admin(IDENTIFY, DATA, cns, namespace=namespace_id).status == status


def test_data_is_written_and_read_by_pages_and_lists(image: Path) -> None:
    driver = opened(image)
    driver.start(1)
    for length in (512, PAGE, 2 * PAGE, 3 * PAGE + 512, 512 * 1024):
        data = os.urandom(length)
        assert driver.write(7, data).status == 0
        assert driver.ask(1, FLUSH).status == 0
        assert driver.read(7, length) == data, length
        assert driver.read(6, 512) == bytes(512)
    # At an odd place of a page.
    driver.vm.write_memory(DATA + 512 + 4, b"\7" * PAGE)
    prps = (DATA + 516, DATA + PAGE)
    assert driver.ask(1, WRITE, prps, (64, 0, 7)).status == 0
    assert driver.read(64, PAGE) == b"\7" * PAGE
    assert driver.read(BLOCKS - 1, 512) == bytes(512)
    driver.controller.close()


def test_lists_that_go_on_are_followed_and_those_in_a_circle_end(driver: NvmeDriver) -> None:
    data = os.urandom(4 * PAGE)
    driver.vm.write_memory(DATA, data)
    # At the end of a page there is room for the way to the next list alone.
    end = LISTS + PAGE - 8
    driver.vm.write_memory(end, struct.pack("<Q", LISTS + 4 * PAGE))
    pages = [DATA + PAGE * page for page in (1, 2, 3)]
    driver.vm.write_memory(LISTS + 4 * PAGE, struct.pack("<3Q", *pages))
    assert driver.ask(1, WRITE, (DATA, end), (0, 0, 31)).status == 0
    assert driver.read(0, 4 * PAGE) == data
    driver.vm.write_memory(LISTS, struct.pack("<Q", LISTS) * 512)
    assert driver.ask(1, WRITE, (LISTS, LISTS), (0, 0, 1023)).status == 0


@pytest.mark.parametrize(
    ("opcode", "prps", "words", "options", "status"),
    [
        (READ, (DATA, 0), (BLOCKS, 0, 0), {}, RANGE),
        (READ, (DATA, 0), (BLOCKS - 1, 0, 1), {}, RANGE),
        (READ, (DATA, 0), (0xFFFF_FFFF, 0xFFFF_FFFF, 0), {}, RANGE),
        (READ, (DATA, 0), (0, 0x0080_0000, 0), {}, RANGE),
        (WRITE, (DATA, 0), (BLOCKS, 0, 0), {}, RANGE),
        (WRITE, (DATA, DATA), (0, 0, 1024), {}, FIELD),
        (WRITE, (DATA, DATA), (0, 0, 0xFFFF), {}, RANGE),
        (WRITE, (DATA + 1, 0), (0, 0, 0), {}, OFFSET),
        (WRITE, (DATA, DATA + 8), (0, 0, 15), {}, OFFSET),
        (WRITE, (DATA, DATA + 4), (0, 0, 63), {}, OFFSET),
        (WRITE, (DATA, LISTS + 8), (0, 0, 63), {}, OFFSET),  # its entries are 1 and on
        (WRITE, (RAM, 0), (0, 0, 0), {}, TRANSFER),
        (READ, (RAM, 0), (0, 0, 0), {}, TRANSFER),
        (READ, (DATA, RAM), (0, 0, 15), {}, TRANSFER),
        (READ, (DATA, RAM), (0, 0, 63), {}, TRANSFER),
        (READ, (0xFFFF_FFFF_FFFF_FFFC, 0), (0, 0, 63), {}, TRANSFER),
        (READ, (DATA, 0xFFFF_FFFF_FFFF_F000), (0, 0, 63), {}, TRANSFER),
        (READ, (DATA, 0), (0, 0, 0), {"flags": 0x40}, FIELD),  # by SGL
        (READ, (DATA, 0), (0, 0, 0), {"flags": 0x01}, FIELD),  # fused
        (READ, (DATA, 0), (0, 0, 0), {"namespace": 0}, NAMESPACE),
        (READ, (DATA, 0), (0, 0, 0), {"namespace": 2}, NAMESPACE),
        (READ, (DATA, 0), (0, 0, 0), {"namespace": 0xFFFF_FFFF}, NAMESPACE),
        (FLUSH, (0, 0), (), {"namespace": 2}, NAMESPACE),
        (ZEROES, (0, 0), (BLOCKS - 1, 0, 1), {}, RANGE),
        (MANAGE, (RAM, 0), (0, 4), {}, TRANSFER),
        (MANAGE, (DATA, 0), (0, 4), {}, RANGE),
        (5, (DATA, 0), (0, 0, 0), {}, OPCODE),
        (0xFF, (DATA, 0), (0, 0, 0), {}, OPCODE),
    ],
)
def test_what_cannot_be_is_an_error_of_the_command_alone(
    driver: NvmeDriver,
    opcode: int,
    prps: tuple[int, int],
    words: tuple[int, ...],
    options: dict[str, Any],
    status: int,
) -> None:
    driver.write(0, b"\1" * 512)
    driver.vm.write_memory(DATA, struct.pack("<IIQ", 0, 1, BLOCKS))
    driver.vm.write_memory(LISTS, struct.pack("<512Q", *range(512)))
    assert driver.ask(1, opcode, prps, words, **options).status == status
    assert driver.status == 1
    assert driver.read(0, 512) == b"\1" * 512


def test_deallocated_and_zeroed_blocks_read_as_zeroes(driver: NvmeDriver) -> None:
    driver.write(0, b"\1" * 262144)
    assert driver.ask(1, ZEROES, (0, 0), (8, 0, 7)).status == 0
    assert driver.ask(1, ZEROES, (0, 0), (128, 0, 127 | 1 << 25)).status == 0
    ranges = struct.pack("<IIQIIQIIQ", 0, 64, 256, 0, 0, 5, 0, 16, 32)
    driver.vm.write_memory(DATA, ranges)
    assert driver.ask(1, MANAGE, (DATA, 0), (2, 4)).status == 0
    kept = driver.read(0, 262144)
    zeroed = {*range(8, 16), *range(128, 256)}
    for index in range(256):
        if index not in range(32, 48):  # what is deallocated reads as anything
            expected = b"\0" if index in zeroed else b"\1"
            assert kept[index * 512 : index * 512 + 512] == expected * 512, index
    # Other attributes are hints that nothing follows from.
    driver.vm.write_memory(DATA, ranges)
    assert driver.ask(1, MANAGE, (DATA, 0), (2, 3)).status == 0


def test_deallocated_space_goes_back_to_the_host(driver: NvmeDriver, raw: Path) -> None:
    driver.write(0, os.urandom(512 * 1024))
    driver.ask(1, FLUSH)
    before = block.info(raw)["allocated"]
    driver.vm.write_memory(DATA, struct.pack("<IIQ", 0, 1024, 0))
    assert driver.ask(1, MANAGE, (DATA, 0), (0, 4)).status == 0
    driver.ask(1, FLUSH)
    assert block.info(raw)["allocated"] <= before - 512 * 1024


def test_readonly_disk_is_a_protected_namespace(raw: Path) -> None:
    driver = opened(raw, ",readonly")
    driver.start()
    assert driver.identify(0, namespace=1)[99] == 1
    assert driver.write(0, b"\1" * 512).status == PROTECTED
    assert driver.ask(1, ZEROES, (0, 0), (0, 0, 0)).status == PROTECTED
    assert driver.ask(1, FLUSH).status == 0
    assert driver.read(0, 512) == bytes(512)
    driver.controller.close()


def test_file_that_became_shorter_is_a_read_error_and_a_line_of_the_log(
    raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = opened(raw)
    driver.start()
    os.truncate(raw, SIZE // 2)
    assert driver.transfer(READ, BLOCKS - 8, 4096).status == 0x281
    assert driver.read(0, 512) == bytes(512)
    entry = driver.log_page(1, 64)
    count, queue, _, status = struct.unpack_from("<QHHH", entry)
    assert (count, queue, status >> 1 & 0x7FF) == (1, 1, 0x281)
    assert struct.unpack_from("<Q", entry, 16) == (BLOCKS - 8,)
    driver.controller.close()
    assert "disk0: a request failed: the image's file has become shorter" in caplog.text


def test_write_through_finds_writes_durable(tmp_path: Path) -> None:
    """Seen in the file of a qcow2 image, whose metadata are written by a flush alone."""
    path = tmp_path / "disk.qcow2"
    block.create(path, SIZE)
    for number, (cache, flags, durable) in enumerate(
        ((1, 0, False), (0, 0, True), (1, 1 << 30, True))
    ):
        driver = opened(path)
        driver.start()
        assert driver.admin(GET_FEATURES, 0, 6).result == 1
        assert driver.admin(SET_FEATURES, 0, 6, cache).status == 0
        assert driver.admin(GET_FEATURES, 0, 6).result == cache
        at = 2048 * (number + 1)
        assert driver.write(at, b"\5" * 512, flags=flags).status == 0
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(path.read_bytes())
        block.convert(copy, tmp_path / "copy.img")
        with (tmp_path / "copy.img").open("rb") as disk:
            disk.seek(at * 512)
            assert (disk.read(512) == b"\5" * 512) == durable
        for made in (copy, tmp_path / "copy.img"):
            made.unlink()
        driver.controller.close()


# Queues


def test_pairs_are_served_alike_and_many_commands_at_once(driver: NvmeDriver) -> None:
    for queue in (1, 2):
        assert driver.write(8 * queue, bytes([queue]) * 4096, queue=queue).status == 0
    for queue in (1, 2):
        commands = [
            driver.offer(queue, READ, (DATA + PAGE * one, 0), (8 * (one % 4), 0, 7), ring=False)
            for one in range(31)
        ]
        driver.ring(queue)
        done = driver.drain(queue, 31)
        assert {one.command for one in done} == set(commands)
        assert {one.status for one in done} == {0}
        assert driver.vm.read_memory(DATA + PAGE, PAGE) == b"\1" * PAGE
        assert driver.vm.read_memory(DATA + 2 * PAGE, PAGE) == b"\2" * PAGE


def test_full_completion_queue_waits_for_its_driver(driver: NvmeDriver) -> None:
    assert driver.admin(DELETE_SQ, 0, 2).status == 0
    assert driver.admin(DELETE_CQ, 0, 2).status == 0
    driver.add_pair(2, entries=4)
    for _ in range(3):
        driver.offer(2, FLUSH)
    first = [driver.wait(2, take=False) for _ in range(3)]
    for _ in range(3):
        driver.offer(2, FLUSH)
    # They cannot end: not taken, though there would be an entry to write over.
    assert driver.ask(1, FLUSH).status == 0
    assert driver.poll(2, take=False) is None
    driver.take(2)
    assert {one.head for one in first} <= {0, 1, 2, 3}
    assert len(driver.drain(2, 3)) == 3


def test_queues_are_made_and_deleted_by_their_rules(driver: NvmeDriver) -> None:
    free = QUEUES + 0x10_0000
    ask = driver.admin
    for opcode, prp, words, status in (
        (CREATE_CQ, free, (0x1F_0001, 3), NO_QUEUE),  # there is one
        (CREATE_CQ, free, (0x1F_0000, 3), NO_QUEUE),  # the admin queues'
        (CREATE_CQ, free, (0x1F_0003, 3), NO_QUEUE),  # more than the controller has
        (CREATE_CQ, free, (0x1F_FFFF, 3), NO_QUEUE),
        (CREATE_SQ, free, (0x1F_0001, 1 << 16 | 1), NO_QUEUE),
        (DELETE_CQ, 0, (0,), NO_QUEUE),
        (DELETE_SQ, 0, (0,), NO_QUEUE),
        (DELETE_SQ, 0, (3,), NO_QUEUE),
        (DELETE_CQ, 0, (1,), DELETION),  # commands still end there
    ):
        assert ask(opcode, prp, *words).status == status, (opcode, words)
    assert ask(DELETE_SQ, 0, 2).status == 0
    for words, status in (
        ((0x1F_0002, 0 << 16 | 1), NO_CQ),
        ((0x1F_0002, 9 << 16 | 1), NO_CQ),
        ((0x0000_0002, 2 << 16 | 1), QUEUE_SIZE),
        ((0x0400_0002, 2 << 16 | 1), QUEUE_SIZE),
        ((0x1F_0002, 2 << 16), FIELD),  # in pieces
    ):
        assert ask(CREATE_SQ, free, *words).status == status, words
    assert ask(CREATE_SQ, free + 64, 0x1F_0002, 2 << 16 | 1).status == OFFSET
    assert ask(CREATE_SQ, RAM, 0x1F_0002, 2 << 16 | 1).status == FIELD
    assert ask(DELETE_CQ, 0, 2).status == 0
    assert ask(CREATE_CQ, free, 0x1F_0002, 3 << 16 | 3).status == VECTOR
    assert ask(CREATE_CQ, RAM - PAGE, 0x3FF_0002, 3).status == FIELD
    driver.add_pair(2)
    assert driver.read(0, 512, queue=2) == bytes(512)


def test_queue_is_deleted_when_its_commands_have_ended(raw: Path) -> None:
    driver = opened(raw, ",iops=200")
    driver.start()
    offered = [driver.offer(1, READ, (DATA, 0), (0, 0, 0), ring=False) for _ in range(30)]
    driver.ring(1)
    assert driver.admin(DELETE_SQ, 0, 1).status == 0
    # What was taken has ended before.
    done = []
    while (one := driver.poll(1)) is not None:
        done.append(one.command)
    assert set(done) <= set(offered)
    driver.doorbells.write(8, 4, 5)
    assert driver.admin(DELETE_CQ, 0, 1).status == 0
    assert driver.poll(1) is None
    driver.controller.close()


def test_doorbells_of_nonsense_are_told_and_do_no_harm(driver: NvmeDriver) -> None:
    driver.admin(SET_FEATURES, 0, 0x0B, 0)
    waiting = driver.offer(0, EVENT)
    driver.doorbells.write(8, 4, 32)  # one more than there are
    told = driver.wait(0)
    assert (told.command, told.result) == (waiting, 0x01_01_00)
    # No more of them before the log page is read.
    waiting = driver.offer(0, EVENT)
    driver.doorbells.write(8 * 3, 4, 0)
    driver.doorbells.write(0xFF0, 4, 0)
    assert driver.admin(ABORT, 0, 0).result == 1
    driver.log_page(1, 64)
    assert driver.wait(0).command == waiting
    driver.ring(1)
    assert driver.read(0, 512) == bytes(512)
    for offset, size in ((1, 4), (8, 8), (8, 2), (0xFFC, 4), (0, 1)):
        driver.doorbells.write(offset, size, 0xFFFF_FFFF)
    driver.ring(1)
    # A head beyond the queue: its commands wait for a better one.
    driver.doorbells.write(12, 4, 77)
    driver.offer(1, FLUSH)
    assert driver.read(0, 512, queue=2) == bytes(512)
    assert driver.poll(1) is None
    driver.take(1)
    driver.wait(1)


def test_events_wait_for_requests_of_which_there_are_four(driver: NvmeDriver) -> None:
    commands = [driver.offer(0, EVENT) for _ in range(4)]
    assert driver.admin(EVENT).status == TOO_MANY
    driver.admin(SET_FEATURES, 0, 0x0B, 1 << 8)
    driver.controller.resize(2 * SIZE)
    told = driver.wait(0)
    assert (told.command, told.result, told.status) == (commands[0], 0x04_00_02, 0)
    driver.controller.resize(SIZE)
    assert driver.log_page(4, 8, keep=True) == struct.pack("<II", 1, 0)
    assert driver.admin(ABORT, 0, commands[1]).result == 1
    assert driver.log_page(4, 8) == struct.pack("<II", 1, 0)
    assert driver.wait(0).command == commands[1], "the second came when the first was looked at"
    assert driver.log_page(4, 4096)[:4] == bytes(4)


def test_resized_disk_has_its_new_blocks(driver: NvmeDriver, raw: Path) -> None:
    driver.controller.resize(2 * SIZE)
    assert struct.unpack_from("<Q", driver.identify(0, namespace=1)) == (2 * BLOCKS,)
    assert driver.write(2 * BLOCKS - 1, b"\1" * 512).status == 0
    assert block.info(raw)["size"] == 2 * SIZE


# Features and logs


def test_features_are_set_and_read(driver: NvmeDriver) -> None:
    ask = driver.admin
    assert ask(GET_FEATURES, 0, 7).result == 1 << 16 | 1
    assert ask(SET_FEATURES, 0, 7, 0x30003).status == SEQUENCE, "there are queues already"
    assert ask(GET_FEATURES, 0, 0x307).result == 1 << 2, "changeable"
    for feature, value in ((1, 0x0102_0304), (4, 350), (5, 9), (8, 0x0203), (10, 1), (11, 0x100)):
        default = ask(GET_FEATURES, 0, feature | 1 << 8).result
        assert ask(SET_FEATURES, 0, feature, value).status == 0
        assert ask(GET_FEATURES, 0, feature).result == value
        assert ask(GET_FEATURES, 0, feature | 1 << 8).result == default
    assert ask(GET_FEATURES, 0, 9, 2).result == 1 << 16 | 2
    for opcode, word, argument, status in (
        (GET_FEATURES, 0x03, 0, FIELD),
        (GET_FEATURES, 0xFF, 0, FIELD),
        (GET_FEATURES, 0x701, 0, FIELD),
        (GET_FEATURES, 9, 3, FIELD),
        (SET_FEATURES, 0x55, 0, FIELD),
        (SET_FEATURES, 2, 1, FIELD),
        (SET_FEATURES, 0x8000_0001, 0, NOT_SAVED),
        (SET_FEATURES, 9, 0xFFFF, FIELD),
    ):
        assert ask(opcode, 0, word, argument).status == status, (opcode, word)
    fresh = NvmeDriver(driver.controller.disk, 2, driver.vm)
    fresh.enable()
    assert fresh.admin(SET_FEATURES, 0, 7, 0x3_0000).result == 1 << 16
    assert fresh.admin(SET_FEATURES, 0, 7, 0xFFFF).status == FIELD


def test_log_pages_are_read_whole_and_in_parts(driver: NvmeDriver) -> None:
    driver.write(0, bytes(4096))
    driver.read(0, 4096)
    health = driver.log_page(2, 512)
    assert struct.unpack_from("<H", health, 1) == (300,)
    assert struct.unpack_from("<Q", health, 64) == (1,)
    assert struct.unpack_from("<Q", health, 80) == (1,)
    assert driver.log_page(2, 448, offset=64) == health[64:]
    assert driver.log_page(3, 512)[0] == 1
    # Beyond its end there are zeroes.
    assert driver.log_page(2, 1024)[512:] == bytes(512)
    for words, namespace, status in (
        ((0x7F_0077,), 0, NO_PAGE),
        ((0x7F_0002, 0, 513), 0, FIELD),
        ((0x7F_0002, 0, 0, 0xFFFF_FFFF), 0, FIELD),
        ((0xFFFF_0002, 0xFFFF), 0, FIELD),
        ((0x7F_0002,), 9, FIELD),
    ):
        assert driver.admin(GET_LOG, DATA, *words, namespace=namespace).status == status
    assert driver.admin(GET_LOG, RAM, 0x7F_0002).status == TRANSFER
    assert driver.admin(0x7F).status == OPCODE


# Interrupts


def test_line_is_high_while_completions_wait_and_masked_by_its_register(
    driver: NvmeDriver,
) -> None:
    wire = Wire()
    driver.controller.function.intx.connect(wire)
    assert not wire.is_high()
    driver.offer(1, FLUSH)
    done = driver.wait(1, take=False)
    wait_until(wire.is_high, "the line")
    assert done.status == 0
    driver.set(0x0C, 1)
    assert not wire.is_high()
    assert driver.get(0x0C) == driver.get(0x10) == 1
    driver.set(0x10, 1)
    assert wire.is_high()
    driver.take(1)
    assert not wire.is_high()
    # A queue without interrupts leaves the line alone.
    assert driver.admin(DELETE_SQ, 0, 2).status == 0
    assert driver.admin(DELETE_CQ, 0, 2).status == 0
    pair = driver.pairs[2]
    driver.vm.write_memory(pair.completions, bytes(PAGE))
    assert driver.admin(CREATE_CQ, pair.completions, 0x1F_0002, 1).status == 0
    assert driver.admin(CREATE_SQ, pair.submissions, 0x1F_0002, 2 << 16 | 1).status == 0
    pair.tail = pair.head = 0
    pair.phase = 1
    driver.offer(2, FLUSH)
    driver.wait(2, take=False)
    driver.admin(ABORT)
    assert not wire.is_high()
    driver.set(0x14, 0)
    assert not wire.is_high()


# The bus


def test_without_the_bus_nothing_is_taken_and_memory_is_left_alone(raw: Path) -> None:
    driver = opened(raw, ",iops=300")
    driver.start()
    driver.write(0, bytes(PAGE))
    offered = [
        driver.offer(1, READ, (DATA + PAGE * one, 0), (0, 0, 7), ring=False) for one in range(30)
    ]
    driver.ring(1)
    driver.set_bus_master(False)
    # What was taken is over; what was not, waits.
    done = []
    while (one := driver.poll(1)) is not None:
        done.append(one.command)
    mark = b"\5" * (30 * PAGE)
    driver.vm.write_memory(DATA, mark)
    waiting = driver.offer(0, EVENT)
    driver.doorbells.write(0xFF0, 4, 0)
    driver.set(0x14, driver.get(0x14) | 1 << 14)
    wait_until(lambda: driver.status & 0xC == SHUT_DOWN, "the shutdown, which is no access")
    assert driver.vm.read_memory(DATA, len(mark)) == mark
    assert driver.poll(0) is driver.poll(1) is None
    driver.set_bus_master()
    while len(done) < 30:
        done.append(driver.wait(1).command)
    assert sorted(done) == offered
    told = driver.wait(0)
    assert (told.command, told.result & 0xFF) == (waiting, 0)
    driver.controller.close()


# Life


def test_shutdown_flushes_and_says_when(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    block.create(path, SIZE)
    driver = opened(path)
    driver.start()
    assert driver.write(0, b"\6" * 512).status == 0
    driver.set(0x14, driver.get(0x14) | 1 << 14)
    wait_until(lambda: driver.status & 0xC == SHUT_DOWN, "the shutdown")
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(path.read_bytes())
    block.convert(copy, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes()[:512] == b"\6" * 512
    driver.set(0x14, 0)
    assert driver.status == 0
    driver.start()
    assert driver.read(0, 512) == b"\6" * 512
    driver.controller.close()


def test_reset_ends_what_is_in_flight(driver: NvmeDriver) -> None:
    for round_ in range(20):
        for index in range(16):
            driver.offer(1, READ, (DATA + PAGE * index, 0), (0, 0, 7), ring=False)
        driver.ring(1)
        driver.set(0x14, 0)
        # Nothing is written into this memory any more.
        mark = bytes([round_ + 1]) * (16 * PAGE)
        driver.vm.write_memory(DATA, mark)
        driver.start()
        assert driver.vm.read_memory(DATA, PAGE) == mark[:PAGE]
    assert driver.read(0, 512) == bytes(512)


def test_disk_is_let_go_of_at_the_end(driver: NvmeDriver, raw: Path) -> None:
    with pytest.raises(ImageError, match="the image is in use"):
        block.open_disk(block.DiskSpec(raw))
    driver.controller.close()
    block.open_disk(block.DiskSpec(raw))
    # A guest cannot start it again.
    driver.set(0x14, 0)
    driver.set(0x14, 0x46_0001)
    assert driver.status == FATAL


def test_saved_controller_goes_on_in_another(driver: NvmeDriver, raw: Path) -> None:
    driver.admin(SET_FEATURES, 0, 0x0B, 1 << 8)
    waiting = driver.offer(0, EVENT)
    for _ in range(9):
        driver.ask(1, FLUSH)
    assert driver.write(3, b"\3" * 512).status == 0
    # Offered, and not rung: the other is rung for it.
    driver.offer(1, READ, (DATA, 0), (3, 0, 0), ring=False)
    state = json.loads(json.dumps(driver.controller.save()))
    driver.controller.close()
    other = NvmeDriver(block.open_disk(block.DiskSpec(raw)), 2)
    for at in range(QUEUES, DATA + MIB, MIB):
        other.vm.write_memory(at, driver.vm.read_memory(at, MIB))
    other.controller.load(state)
    other.pairs = driver.pairs
    assert other.status == 1
    other.ring(1)
    assert other.wait(1).status == 0
    assert other.vm.read_memory(DATA, 512) == b"\3" * 512
    assert other.admin(GET_FEATURES, 0, 0x0B).result == 1 << 8
    other.controller.resize(2 * SIZE)
    assert other.wait(0).command == waiting
    other.controller.close()


def test_damaged_states_are_refused(driver: NvmeDriver, raw: Path) -> None:
    good = json.loads(json.dumps(driver.controller.save()))
    driver.controller.close()
    other = NvmeDriver(block.open_disk(block.DiskSpec(raw)), 2)
    other.controller.load(good)
    rows = good["queues"]
    for name, row in (
        ("submissions", rows["submissions"][:-1]),
        ("submissions", []),
        ("submissions", [0, QUEUES, 32, 7, 0, 0]),
        ("submissions", [0, RAM, 32, 0, 0, 0]),
        ("submissions", [0, QUEUES, 32, 0, 32, 0]),
        ("submissions", [0, QUEUES, 1 << 40, 0, 0, 0]),
        ("submissions", [99, QUEUES, 32, 0, 0, 0]),
        ("completions", rows["completions"][:-1]),
        ("completions", [0, QUEUES, 32, 0, 1, 0, 1, 99]),
        ("completions", []),
        ("features", []),
        ("events", [1]),
        ("requests", [1] * 5),
        ("requests", ["x"]),
        ("requests", [-1]),
        ("requests", None),
    ):
        with pytest.raises(StateError):
            other.controller.load({**good, "queues": {**rows, name: row}})
        assert other.status == 0
    with pytest.raises(StateError):
        other.controller.load({})
    other.controller.close()


def test_any_words_at_all_do_no_harm(driver: NvmeDriver) -> None:
    """Entries of noise, with opcodes and numbers that are near to what there is."""
    noise = random.Random(os.environ.get("NVME_SEED", "7"))
    for round_ in range(60):
        for queue in (0, 1, 2):
            pair = driver.pairs[queue]
            for _ in range(20):
                entry = bytearray(noise.randbytes(64))
                entry[0] = noise.choice([*range(16), 0x7F, entry[0]])
                entry[1] = noise.choice([0, 0, 0, entry[1]])
                if noise.random() < 0.8:
                    entry[4:8] = struct.pack("<I", noise.choice([0, 1, 0xFFFF_FFFF]))
                for at in (24, 32):
                    near = noise.choice([0, DATA, LISTS, RAM - 8, RAM]) + noise.choice([0, 0, 8, 4])
                    entry[at : at + 8] = struct.pack("<Q", near)
                small = struct.pack("<HHHHII", *(noise.randrange(4) for _ in range(6)))
                if noise.random() < 0.7:
                    entry[40:56] = small
                driver.vm.write_memory(pair.submissions + 64 * pair.tail, bytes(entry))
                pair.tail = (pair.tail + 1) % pair.entries
            driver.doorbells.write(8 * queue, 4, pair.tail)
            driver.doorbells.write(8 * queue + 4, 4, noise.randrange(40))
        if round_ % 10 == 9:
            driver.set(0x14, 0)
            driver.start(2)
    driver.set(0x14, 0)
    driver.start(2)
    assert driver.write(0, b"\2" * 512).status == 0
    assert driver.read(0, 512) == b"\2" * 512
