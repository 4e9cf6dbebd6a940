"""VMXNET3 (Linux, drivers/net/vmxnet3): registers, commands, rings, and drivers that err."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.cards.frames import MAC, MESSAGE, OTHER, TO_NETWORK, sum16, tcp, to_guest
from tests.cards.vmxnet3_driver import (
    ALLMULTI,
    BCAST,
    CSUM,
    IMR,
    LISTS,
    LRO,
    MCAST,
    PROMISC,
    RSS,
    RX,
    RXCSUM,
    RXPROD2,
    RXVLAN,
    SENT,
    SHARED,
    TABLE,
    TSO,
    TX,
    TX_DONE,
    UCAST,
    Vmxnet3Driver,
)
from tests.net.card import Program

from tetrarch._native import Vm
from tetrarch.cards.vmxnet3 import (
    ACTIVATE_DEV,
    DSAL,
    ECR,
    GET_CONF_INTR,
    GET_DID_HI,
    GET_DID_LO,
    GET_LINK,
    GET_PERM_MAC_HI,
    GET_PERM_MAC_LO,
    GET_QUEUE_STATUS,
    GET_STATS,
    ICR,
    LINK_UP,
    MACH,
    MACL,
    MSIX,
    QUIESCE_DEV,
    RESET_DEV,
    UPDATE_FEATURE,
    UPDATE_IML,
    UPDATE_MAC_FILTERS,
    UPDATE_PMCFG,
    UPDATE_RSSIDT,
    UPDATE_RX_MODE,
    UPDATE_VLAN_FILTERS,
    UVRS,
    VRRS,
)
from tetrarch.errors import StateError

# What a completion knows of a frame.
TUC, UDP, TCP, IPC, V6, V4, FRG = (1 << bit for bit in range(7))
NO_END, NOT_SUPPORTED, SMALL = 0x8000_0000, 0x8000_0003, 0x8000_0004
RX_ERROR, TX_ERROR, LINK = 1, 2, 4


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as one:
        yield one


@pytest.fixture
def driver(program: Program) -> Iterator[Vmxnet3Driver]:
    one = Vmxnet3Driver(program.network())
    yield one
    one.card.close()


# Registers and commands


def test_registers_say_what_there_is(driver: Vmxnet3Driver) -> None:
    config = driver.card.function.config
    assert (config.get(0, 2), config.get(2, 2), config.get(9, 3)) == (0x15AD, 0x07B0, 0x020000)
    assert (driver.read(VRRS), driver.read(UVRS)) == (3, 1)
    for value in (2, 0, 3, 4, 0xFFFF_FFFF):
        driver.write(VRRS, value)
        assert driver.card.state.revision == 2
    driver.write(VRRS, 1)
    assert driver.card.state.revision == 1
    driver.write(UVRS, 1)
    low, high = int.from_bytes(MAC[:4], "little"), int.from_bytes(MAC[4:], "little")
    assert (driver.read(MACL), driver.read(MACH)) == (low, high)
    for command, answer in [
        (GET_LINK, LINK_UP),
        (GET_PERM_MAC_LO, low),
        (GET_PERM_MAC_HI, high),
        (GET_DID_LO, 0x07B0),
        (GET_DID_HI, 1),
        (GET_CONF_INTR, 0),
        # Of a card that is not active they do nothing, as those that there are not.
        *((command, 0) for command in (GET_QUEUE_STATUS, GET_STATS, QUIESCE_DEV, RESET_DEV)),
        *((command, 0) for command in (UPDATE_RX_MODE, UPDATE_MAC_FILTERS, UPDATE_VLAN_FILTERS)),
        *((command, 0) for command in (UPDATE_RSSIDT, UPDATE_IML, UPDATE_PMCFG, UPDATE_FEATURE)),
        *((command, 0) for command in (0, 0xCAFE_FFFF, 0xF00D_FFFF, 0xFFFF_FFFF)),
    ]:
        assert driver.command(command) == answer, hex(command)
    assert driver.commands.read(MACL + 1, 1) == MAC[1]
    driver.commands.write(MACL, 2, 0xFFFF)
    driver.commands.write(0xFF8, 4, 0xFFFF)
    assert (driver.read(MACL), driver.read(0xFF8)) == (low, 0)


def test_address_is_the_drivers_until_a_reset(driver: Vmxnet3Driver, program: Program) -> None:
    driver.write(MACL, 0x3322_1152)
    driver.write(MACH, 0xABCD_5544)
    own = bytes.fromhex("521122334455")
    assert driver.card.mac == own
    driver.start()
    driver.give()
    driver.give()
    driver.tell()
    program.send(to_guest(b"not mine"))
    program.send(to_guest(b"mine", own))
    assert driver.wait().frame == to_guest(b"mine", own)
    driver.command(RESET_DEV)
    assert driver.card.mac == MAC
    assert driver.command(GET_PERM_MAC_LO) == int.from_bytes(MAC[:4], "little")


def test_interrupts_mask_themselves_and_wait_while_masked(driver: Vmxnet3Driver) -> None:
    def raised() -> bool:
        return driver.card.function.intx.level

    driver.start()
    assert driver.rings.read(IMR, 4) == 1
    driver.send(TO_NETWORK)
    assert not raised()
    driver.rings.write(IMR, 4, 0)
    assert raised()
    assert driver.rings.read(IMR, 4) == 1
    # Reading says the cause, and ends it.
    assert (driver.read(ICR), raised(), driver.read(ICR)) == (1, False, 0)
    driver.send(TO_NETWORK)
    assert not raised()
    driver.rings.write(IMR, 4, 0)
    assert raised()
    driver.command(QUIESCE_DEV)
    assert not raised()
    assert driver.rings.read(IMR, 4) == 1
    # Those that a driver masks itself.
    driver.start(auto_mask=0)
    driver.rings.write(IMR, 4, 0)
    driver.send(TO_NETWORK)
    driver.wait_until(raised)
    assert (driver.rings.read(IMR, 4), driver.read(ICR)) == (0, 1)
    # Others there are not.
    for offset in (IMR + 4, IMR + 8 * 25, 0x5F8, 0xFF8):
        driver.rings.write(offset, 4, 0)
        assert driver.rings.read(offset, 4) == 0


def test_messages_go_by_the_number_of_the_interrupt(driver: Vmxnet3Driver) -> None:
    function = driver.card.function
    msix = function.bars[MSIX].parts[0].device
    at = next(at for at in range(0x40, 0x100, 4) if function.config.get(at, 1) == 0x11)
    assert function.config.get(at + 2, 2) & 0x7FF == 24
    function.write_config(at + 2, 2, 0x8000)
    driver.start()
    for interrupt in range(3):
        driver.rings.write(IMR + 8 * interrupt, 4, 0)
    driver.send(TO_NETWORK)
    # Its vector is masked: it is pending in its table.
    driver.wait_until(lambda: msix.read(0x800, 4) == 1)
    assert driver.read(ICR) == 0
    assert [driver.rings.read(IMR + 8 * one, 4) for one in range(3)] == [1, 0, 0]


def test_link_that_goes_is_an_event(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start()
    driver.rings.write(IMR + 16, 4, 0)
    program.socket.close()
    driver.wait_until(lambda: driver.read(ICR) == 4)
    assert (driver.peek(SHARED + 696), driver.read(ECR)) == ((LINK,), LINK)
    assert driver.command(GET_LINK) == 0
    driver.write(ECR, LINK)
    assert (driver.peek(SHARED + 696), driver.read(ECR)) == ((0,), 0)


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (SHARED, (0,)),
        (SHARED + 40, (TABLE + 64, 0)),
        (SHARED + 40, (0, 0)),
        (SHARED + 40, (0xFF_FF80, 0)),
        (SHARED + 40, (TABLE, 1)),
        (SHARED + 52, (511,)),
        (SHARED + 56, (59,)),
        (SHARED + 56, (9001,)),
        (SHARED + 60, (0x0100_0000,)),
        (SHARED + 60, (0x0001_0000,)),
        (SHARED + 60, (0x0109_0000,)),
        (SHARED + 60, (0x1101_0000,)),
        (SHARED + 60, (0xFFFF_0000,)),
        (TABLE + 16, (TX + 256, 0)),
        (TABLE + 16, (0xFFFF_FE00, 0xFFFF_FFFF)),
        (TABLE + 16, (0x100_0000, 0)),
        (TABLE + 32, (TX_DONE + 16, 0)),
        (TABLE + 56, (0,)),
        (TABLE + 56, (33,)),
        (TABLE + 56, (4128,)),
        (TABLE + 56, (0xFFFF_FFE0,)),
        (TABLE + 64, (0,)),
        (TABLE + 256 + 16, (RX[0] + 1, 0)),
        (TABLE + 256 + 24, (0xF000_0000, 0)),
        (TABLE + 256 + 56, (31,)),
        (TABLE + 256 + 60, (16,)),
        (TABLE + 256 + 64, (8224,)),
    ],
)
def test_what_cannot_be_is_not_activated(
    driver: Vmxnet3Driver, at: int, words: tuple[int, ...]
) -> None:
    driver.set_up()
    driver.poke(SHARED + 52, 8192)
    driver.poke(at, *words)
    assert driver.activate() == 1
    assert not driver.card.rings.active
    driver.ring()
    driver.start()
    driver.send(TO_NETWORK)


def test_wild_addresses_of_what_is_shared_are_refused(driver: Vmxnet3Driver) -> None:
    driver.set_up()
    for address in (0, 4, SHARED + 4, 0xFF_FF00, 0x1000_0000, 1 << 63, (1 << 64) - 8):
        assert driver.activate(address) == 1, hex(address)
    driver.set_bus_master(on=False)
    assert driver.activate() == 1
    driver.set_bus_master()
    driver.start()
    driver.write(DSAL, 0)
    assert driver.card.rings.active
    assert driver.command(ACTIVATE_DEV) == 1
    assert not driver.card.rings.active


# From the guest


def test_frames_go_out_in_their_order_and_in_pieces(
    driver: Vmxnet3Driver, program: Program
) -> None:
    driver.start()
    for number in range(100):
        frame = TO_NETWORK + bytes([number])
        driver.send(frame, split=number % 50)
        assert program.receive() == frame
    # Those of before are ended with the last, if their driver asks for no more.
    frames = [TO_NETWORK + bytes([number]) * 10 for number in range(5)]
    for number, frame in enumerate(frames):
        driver.vm.write_memory(SENT + 0x1000 * number, frame)
        last = driver.offer([(SENT + 0x1000 * number, len(frame))], complete=number == 4)
    driver.ring()
    assert driver.wait_sent() == last
    assert driver.sent() is None
    assert [program.receive() for _ in frames] == frames


def test_frames_wait_for_a_network_that_is_full(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start(size=1024)
    driver.vm.write_memory(SENT, TO_NETWORK.ljust(9000, b"\x55"))
    for _ in range(1000):
        driver.offer([(SENT, 9000)])
    driver.ring()
    # As many as the socket holds.
    driver.wait_until(lambda: driver.card.stats()["sent"] > 10)
    assert driver.card.stats()["sent"] < 1000
    for _ in range(1000):
        assert len(program.receive()) == 9000
    assert [driver.wait_sent() for _ in range(1000)] == list(range(1000))
    assert not [name for name in driver.card.stats() if "dropped" in name]


def test_frame_waits_anew_where_one_before_it_was_dropped(
    driver: Vmxnet3Driver, program: Program
) -> None:
    asked = TABLE + 256
    driver.start(scatter=1)
    program.send(to_guest(bytes(9000)))
    driver.wait_until(lambda: driver.peek(asked) == (1,))
    # A buffer that will not do: nothing waits any more, though the driver is still asked.
    driver.give(200)
    driver.tell()
    driver.wait_until(lambda: driver.card.stats().get("received_dropped_no_room") == 1)
    program.send(to_guest(b"next"))
    driver.wait_until(lambda: driver.card.stats()["received"] == 2)
    driver.give()
    driver.rings.write(IMR + 8, 4, 0)
    assert driver.wait().frame == to_guest(b"next")


def test_length_of_0_is_the_longest(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start()
    frame = TO_NETWORK[:14] + bytes(range(256)) * 64
    driver.vm.write_memory(SENT, frame)
    driver.offer([(SENT, 0), (SENT + 0x4000, 14)])
    driver.ring()
    driver.wait_sent()
    assert program.receive() == frame


def test_checksums_and_tags_are_made(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start()
    whole = tcp(b"data" * 50)
    # The sum of the pseudo header is there.
    left = bytearray(whole)
    pseudo = sum16(whole[26:34] + struct.pack(">HH", 6, len(whole) - 34))
    left[50:52] = struct.pack(">H", pseudo)
    driver.send(bytes(left), mode=CSUM, header=34, position=50)
    assert program.receive() == whole
    tagged = whole[:12] + b"\x81\x00\xe1\x23" + whole[12:]
    driver.send(bytes(left), split=60, mode=CSUM, header=34, position=50, tag=0xE123)
    assert program.receive() == tagged
    driver.send(whole, tag=0xE123)
    assert program.receive() == tagged


@pytest.mark.parametrize("tag", [None, 5])
def test_segments_are_made(driver: Vmxnet3Driver, program: Program, tag: int | None) -> None:
    driver.start()
    data = bytes(range(256)) * 20
    frame = tcp(data, prepared=False)
    driver.send(frame, split=54, mode=TSO, header=54, position=1000, tag=tag)
    got = b""
    for _ in range(6):
        part = program.receive()
        if tag is not None:
            assert part[12:16] == struct.pack(">HH", 0x8100, tag)
            part = part[:12] + part[16:]
        assert sum16(part[14:34]) == 0xFFFF
        pseudo = part[26:34] + struct.pack(">HH", 6, len(part) - 34)
        assert sum16(pseudo + part[34:]) == 0xFFFF
        got += part[54:]
    assert got == data
    driver.command(GET_STATS)
    assert driver.peek(TABLE + 88)[0] == 6


@pytest.mark.parametrize(
    ("pieces", "given"),
    [
        ([(SENT, 13)], {}),
        ([(0xF000_0000, 100)], {}),
        ([((1 << 64) - 8, 100)], {}),
        ([(SENT, 100), (0xFF_FFF0, 100)], {}),
        ([(SENT, 0)] * 5, {}),
        ([(SENT, 100)], {"mode": 1}),
        ([(SENT, 100)], {"mode": CSUM, "header": 99, "position": 100}),
        ([(SENT, 100)], {"mode": CSUM, "header": 60, "position": 50}),
        ([(SENT, 100)], {"mode": CSUM, "header": 1023, "position": 0x3FFF}),
        ([(SENT, 100)], {"mode": TSO, "header": 54, "position": 10}),
        ([(SENT, 100)], {"mode": TSO, "header": 1023, "position": 10}),
        ([(SENT + 0x8000, 100)], {"mode": TSO, "header": 54, "position": 0}),
        ([(SENT + 0x8000, 100)], {"mode": TSO, "header": 40, "position": 10}),
        ([(SENT, 8)], {"tag": 7}),
    ],
)
def test_frames_that_are_none_are_ended_and_counted(
    driver: Vmxnet3Driver,
    program: Program,
    pieces: list[tuple[int, int]],
    given: dict[str, int],
) -> None:
    driver.start()
    driver.vm.write_memory(SENT, TO_NETWORK.ljust(0x4000, b"\xee"))
    driver.vm.write_memory(SENT + 0x8000, tcp(b"x" * 100))
    last = driver.offer(pieces, **given)  # type: ignore[arg-type]
    driver.ring()
    assert driver.wait_sent() == last
    assert driver.card.stats().get("sent_dropped_malformed") == 1
    driver.command(GET_STATS)
    assert driver.peek(TABLE + 88 + 64) == (1,)
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK


def test_descriptors_that_are_not_given_are_waited_for(
    driver: Vmxnet3Driver, program: Program
) -> None:
    driver.start()
    driver.vm.write_memory(SENT, TO_NETWORK)
    # The first is given, the second not.
    driver.poke(TX, SENT, 0, 20 | 1 << 14, 0)
    driver.ring()
    driver.poke(TX + 16, SENT + 20, 0, len(TO_NETWORK) - 20, 3 << 12)
    driver.ring()
    assert driver.sent() is None
    driver.poke(TX + 16, SENT + 20, 0, len(TO_NETWORK) - 20 | 1 << 14, 3 << 12)
    driver.ring()
    assert driver.wait_sent() == 1
    assert program.receive() == TO_NETWORK


@pytest.mark.parametrize(("extra", "error"), [(0, NO_END), (1 << 16, NOT_SUPPORTED)])
def test_ring_that_breaks_the_rules_stands(
    driver: Vmxnet3Driver, program: Program, extra: int, error: int
) -> None:
    driver.start()
    driver.rings.write(IMR + 16, 4, 0)
    for index in range(32):
        driver.poke(TX + 16 * index, SENT, 0, 64 | 1 << 14 | extra, 0)
    driver.ring()
    driver.wait_until(lambda: driver.read(ECR) == TX_ERROR)
    assert driver.command(GET_QUEUE_STATUS) == 0
    assert driver.peek(TABLE + 80, 2) == (1, error)
    assert driver.peek(TABLE + 256 + 80, 2) == (0, 0)
    driver.ring()
    # Its driver resets it.
    driver.command(QUIESCE_DEV)
    driver.command(RESET_DEV)
    driver.start()
    assert driver.read(ECR) == 0
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK


def test_generation_that_never_turns_ends_with_the_ring(
    driver: Vmxnet3Driver, program: Program
) -> None:
    driver.start()
    driver.vm.write_memory(SENT, TO_NETWORK)
    for index in range(32):
        driver.poke(TX + 16 * index, SENT, 0, len(TO_NETWORK) | 1 << 14, 3 << 12)
    driver.ring()
    for index in range(32):
        assert driver.wait_sent() == index
        assert program.receive() == TO_NETWORK
    driver.ring()
    driver.command(GET_STATS)
    assert driver.peek(TABLE + 88 + 16) == (32,)
    assert driver.sent() is None


def test_rings_that_move_do_so_when_the_card_is_activated_anew(
    driver: Vmxnet3Driver, program: Program
) -> None:
    driver.start()
    driver.send(TO_NETWORK)
    # What the driver writes while it is active is not looked at.
    driver.poke(TABLE + 16, 0xF000_0000, 0xFFFF, 0, 0, 0xF000_0000, 0xFFFF)
    driver.poke(TABLE + 56, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF)
    driver.poke(SHARED, 0)
    driver.poke(SHARED + 40, 0xFFFF_FFFF, 0xFFFF_FFFF)
    driver.send(TO_NETWORK)
    assert [program.receive() for _ in range(2)] == [TO_NETWORK] * 2
    driver.start(tx=8, rx=16, size=64)
    for queue in range(8):
        driver.send(TO_NETWORK + bytes([queue]), queue=queue)
        assert program.receive() == TO_NETWORK + bytes([queue])


# To the guest


def test_frames_come_into_buffers_with_what_is_known(
    driver: Vmxnet3Driver, program: Program
) -> None:
    driver.start(features=RXCSUM)
    for _ in range(31):
        driver.give()
    driver.tell()
    bad = bytearray(tcp(b"wrong"))
    bad[:12] = MAC + OTHER
    bad[-1] ^= 1
    good = MAC + OTHER + tcp(b"right")[12:]
    for frame, known in [
        (to_guest(b"plain"), 0),
        (MESSAGE, UDP | IPC | V4),  # which has no sum
        (good, TUC | TCP | IPC | V4),
        (bytes(bad), TCP | IPC | V4),
    ]:
        program.send(frame)
        got = driver.wait()
        assert got.frame == frame
        (one,) = got.completions
        assert (one.known, one.not_calculated) == (known, not known & TUC)
    for number in range(200):
        driver.give()
        program.send(to_guest(b"%d" % number))
        assert driver.wait().frame == to_guest(b"%d" % number)
    driver.command(GET_STATS)
    assert driver.peek(TABLE + 256 + 88 + 16) == (204,)


def test_long_frame_goes_on_in_bodies_of_either_ring(
    driver: Vmxnet3Driver, program: Program
) -> None:
    driver.start(features=RXCSUM)
    frame = to_guest(bytes(range(250)) * 20)
    driver.give(2000)
    driver.give(1000, body=True)
    driver.give(2000)
    for _ in range(3):
        driver.give(1500, body=True, ring=1)
    driver.tell()
    program.send(frame)
    got = driver.wait()
    assert got.frame == frame
    assert [(one.queue, one.index) for one in got.completions] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    # A body where a head is due is left out, and a head where a body is.
    driver.start()
    driver.give(1000, body=True)
    driver.give(2000)
    driver.give(2000, ring=1)
    driver.give(4000, ring=1, body=True)
    driver.tell()
    program.send(frame)
    got = driver.wait()
    assert [(one.queue, one.index) for one in got.completions] == [(0, 1), (1, 1)]


def test_frame_waits_for_buffers_and_the_driver_is_asked_to_ring(
    driver: Vmxnet3Driver, program: Program
) -> None:
    asked = TABLE + 256
    driver.start()
    program.send(to_guest(b"first"))
    driver.wait_until(lambda: driver.peek(asked) == (1,))
    driver.give()
    driver.rings.write(RXPROD2, 4, 0)
    assert driver.wait().frame == to_guest(b"first")
    driver.wait_until(lambda: driver.peek(asked) == (0,))
    # An interrupt that is unmasked does as well.
    program.send(to_guest(b"second"))
    driver.wait_until(lambda: driver.peek(asked) == (1,))
    driver.give()
    driver.rings.write(IMR + 8, 4, 0)
    assert driver.wait().frame == to_guest(b"second")


def test_frame_that_no_buffers_would_hold_is_dropped(
    driver: Vmxnet3Driver, program: Program
) -> None:
    long, short = to_guest(bytes(9000)), to_guest(b"short")
    for given in ({"bodies": 0}, {"scatter": 2}, {}):
        driver.start(**given)
        for _ in range(31):
            driver.give(200)
            if given.get("bodies") != 0:
                driver.give(200 if not given else 4000, body=True, ring=1)
        driver.tell()
        program.send(long)
        program.send(short)
        assert driver.wait().frame == short
    assert driver.card.stats().get("received_dropped_no_room") == 3


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((0xF000_0000, 0, 2048 | 1 << 31, 0), SMALL),
        ((0xFFFF_FFF8, 0xFFFF_FFFF, 2048 | 1 << 31, 0), SMALL),
        ((0x60_0000, 0, 127 | 1 << 31, 0), SMALL),
        ((0x60_0000, 0, 1 << 31, 0), SMALL),
        ((0x60_0000, 0, 2048 | 1 << 15 | 1 << 31, 0), NOT_SUPPORTED),
    ],
)
def test_buffer_that_is_none_makes_its_queue_stand(
    driver: Vmxnet3Driver, program: Program, words: tuple[int, ...], error: int
) -> None:
    driver.start()
    driver.poke(RX[0], *words)
    driver.tell()
    program.send(to_guest(b"lost"))
    driver.wait_until(lambda: driver.read(ECR) == RX_ERROR)
    driver.command(GET_QUEUE_STATUS)
    assert driver.peek(TABLE + 256 + 80, 2) == (1, error)
    program.send(to_guest(b"lost too"))
    driver.send(TO_NETWORK)
    driver.start()
    driver.give()
    driver.tell()
    program.send(to_guest(b"there"))
    assert driver.wait().frame == to_guest(b"there")


def test_heads_that_are_all_bodies_keep_nobody(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start()
    for _ in range(32):
        driver.give(body=True)
    driver.tell()
    program.send(to_guest(b"lost"))
    driver.wait_until(lambda: driver.card.stats().get("received_dropped_no_room") == 1)


def test_filters_say_what_comes(driver: Vmxnet3Driver, program: Program) -> None:
    group, other_group, everyone = b"\1\0\x5e\0\0\1", b"\1\0\x5e\0\0\2", b"\xff" * 6
    driver.start(mode=0)
    for _ in range(31):
        driver.give()
    driver.tell()
    driver.vm.write_memory(LISTS, other_group + b"\1\0\x5e\0\0\7" + group)
    ends = to_guest(b"end", b"\1\0\x5e\0\0\7")

    def come(mode: int) -> list[bytes]:
        driver.poke(SHARED + 120, mode | MCAST)
        driver.poke(SHARED + 124, 6 * (2 if mode & MCAST else 1), LISTS + 6, 0)
        driver.command(UPDATE_RX_MODE)
        driver.command(UPDATE_MAC_FILTERS)
        for to in (MAC, OTHER, group, other_group, everyone):
            program.send(to_guest(b"x", to))
        program.send(ends)
        came = []
        while (frame := driver.wait().frame) != ends:
            driver.give()
            came.append(frame[:6])
        driver.give()
        return came

    assert come(0) == []
    assert come(UCAST) == [MAC]
    assert come(MCAST) == [group]
    assert come(BCAST) == [everyone]
    assert come(ALLMULTI) == [group, other_group]
    assert come(PROMISC) == [MAC, OTHER, group, other_group, everyone]
    # A table that is nowhere is none.
    driver.poke(SHARED + 124, 0xFFFF, 0xF000_0000, 0xFFFF_FFFF)
    driver.poke(SHARED + 120, UCAST | MCAST)
    driver.command(UPDATE_MAC_FILTERS)
    driver.command(UPDATE_RX_MODE)
    program.send(to_guest(b"x", group))
    program.send(to_guest(b"y"))
    assert driver.wait().frame == to_guest(b"y")


def test_tags_are_looked_at_and_taken_off(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start(features=RXCSUM)
    for _ in range(31):
        driver.give()
    driver.tell()
    plain = MAC + OTHER + tcp(b"tagged")[12:]
    tagged = plain[:12] + b"\x81\x00\x20\x46" + plain[12:]
    program.send(tagged)
    program.send(plain)
    assert driver.wait().frame == plain
    driver.poke(SHARED + 136 + 4 * (0x46 // 32), 1 << 0x46 % 32)
    driver.command(UPDATE_VLAN_FILTERS)
    program.send(tagged)
    got = driver.wait()
    assert (got.frame, got.completions[0].tag) == (tagged, None)
    # Of what is behind a tag nothing is said.
    assert got.completions[0].not_calculated
    driver.poke(SHARED + 24, RXCSUM | RXVLAN)
    driver.command(UPDATE_FEATURE)
    program.send(tagged)
    got = driver.wait()
    assert (got.frame, got.completions[0].tag) == (plain, 0x2046)
    assert got.completions[0].known == TUC | TCP | IPC | V4


def test_flows_keep_to_their_queues(driver: Vmxnet3Driver, program: Program) -> None:
    driver.set_up(tx=2, rx=4, features=RXCSUM | RSS)
    table = struct.pack("<4H", 15, 1, 40, 128) + bytes(range(1, 41)) + bytes([0, 1, 2, 3] * 32)
    driver.vm.write_memory(LISTS, table)
    driver.poke(SHARED + 648, 1, len(table), LISTS, 0)
    assert driver.activate() == 0
    for queue in range(4):
        for _ in range(31):
            driver.give(queue=queue)
    driver.tell()
    seen: dict[int, tuple[int, int]] = {}
    for port in range(40):
        frame = bytearray(tcp(b"flow"))
        frame[:12] = MAC + OTHER
        frame[34:36] = struct.pack(">H", port)
        for _ in range(2):
            program.send(bytes(frame))
            driver.wait_until(
                lambda: any(
                    driver.peek(rx.done.base + 16 * rx.done.next + 12)[0] >> 31
                    == rx.done.generation
                    for rx in driver.rx
                )
            )
            got = [(queue, driver.received(queue)) for queue in range(4)]
            ((queue, one),) = [(queue, one) for queue, one in got if one is not None]
            driver.give(queue=queue)
            hashed = one.completions[0].words[1]
            assert one.completions[0].words[0] >> 26 & 15 == 2
            assert queue == hashed % 128 % 4
            assert seen.setdefault(port, (queue, hashed)) == (queue, hashed)
    assert {queue for queue, _ in seen.values()} == {0, 1, 2, 3}
    # What has no hash goes to the first, and all without the table.
    program.send(to_guest(b"plain"))
    assert driver.wait().completions[0].words[1] == 0
    driver.poke(SHARED + 652, 100)
    driver.command(UPDATE_RSSIDT)
    program.send(bytes(frame))
    assert driver.wait().frame == bytes(frame)


# Life


def test_without_the_bus_memory_is_left_alone(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start()
    for _ in range(4):
        driver.give()
    driver.tell()
    driver.set_bus_master(on=False)
    program.send(to_guest(b"waits"))
    driver.vm.write_memory(SENT, TO_NETWORK)
    driver.offer([(SENT, len(TO_NETWORK))])
    driver.ring()
    driver.command(GET_STATS)
    assert (driver.received(), driver.sent()) == (None, None)
    driver.set_bus_master()
    assert driver.wait().frame == to_guest(b"waits")
    assert driver.wait_sent() == 0
    assert program.receive() == TO_NETWORK


def test_saved_card_goes_on(driver: Vmxnet3Driver, program: Program) -> None:
    driver.write(MACL, 0x3322_1152)
    driver.write(MACH, 0x5544)
    driver.write(VRRS, 2)
    driver.start(tx=2, rx=2, features=RXCSUM | RXVLAN | LRO)
    for _ in range(20):
        driver.give()
    driver.tell()
    for number in range(35):
        driver.send(TO_NETWORK + bytes([number]), queue=number % 2)
        program.receive()
    driver.rings.write(IMR + 8, 4, 0)
    program.send(to_guest(b"before", bytes.fromhex("521122334455")))
    driver.wait()
    state = driver.card.save()
    with Program() as other:
        copy = Vmxnet3Driver(other.network(), driver.vm)
        copy.card.load(state)
        assert copy.card.save() == state
        copy.tx, copy.rx = driver.tx, driver.rx
        # The network hears where the guest is now.
        copy.send(TO_NETWORK, queue=1)
        announced = other.receive()
        assert announced[:14] == b"\xff" * 6 + bytes.fromhex("521122334455") + b"\x80\x35"
        assert other.receive() == TO_NETWORK
        other.send(to_guest(b"after", bytes.fromhex("521122334455")))
        assert copy.wait().frame == to_guest(b"after", bytes.fromhex("521122334455"))
        assert copy.command(GET_PERM_MAC_LO) == int.from_bytes(MAC[:4], "little")
        copy.card.change_mac(OTHER)
        copy.card.load(state)
        assert copy.command(GET_PERM_MAC_LO) == int.from_bytes(OTHER[:4], "little")
        copy.card.close()


def test_damaged_state_is_refused(driver: Vmxnet3Driver) -> None:
    driver.start(tx=2, rx=2)
    state = driver.card.save()
    rings = state["rings"]
    changes: tuple[dict[str, object], ...] = (
        {"mac": [0] * 5},
        {"mac": [256] * 6},
        {"vlans": []},
        {"setup": rings["setup"][1:]},
        {"setup": [0, *rings["setup"][1:]]},
        {"setup": [SHARED, 1 << 63, *rings["setup"][2:]]},
        {"tx": []},
        {"tx": rings["tx"] * 5},
        {"tx": [rings["tx"][0][:10]]},
        {"tx": [[*rings["tx"][0][:18], 32, 0, 0, 0]]},
        {"tx": [[1, *rings["tx"][0][1:]]]},
        {"rx": [rings["rx"][0][:-1]]},
        {"rx": [[*rings["rx"][0][:1], 1 << 40, *rings["rx"][0][2:]]]},
        {"rss": [1]},
        {"rss": [0] * 176},
        {"interrupts": [0]},
        {"state": None},
    )
    for change in changes:
        with pytest.raises(StateError):
            driver.card.load({**state, "rings": {**rings, **change}})
        assert not driver.card.rings.active
    with pytest.raises(StateError):
        driver.card.load({})
    driver.card.load(state)
    assert driver.card.rings.active


def test_reset_and_close_forget_all(driver: Vmxnet3Driver, program: Program) -> None:
    driver.start()
    driver.give()
    driver.tell()
    driver.card.reset()
    driver.set_bus_master()
    assert not driver.card.rings.active
    program.send(to_guest(b"nobody"))
    driver.wait_until(lambda: driver.card.stats().get("received_dropped_unwanted") == 1)
    assert driver.received() is None
    driver.card.close()
    assert driver.command(GET_LINK) == 0
    driver.set_up()
    driver.activate()
    driver.vm.write_memory(SENT, TO_NETWORK)
    driver.offer([(SENT, len(TO_NETWORK))])
    driver.ring()


def test_memory_of_two_regions_is_no_ring() -> None:
    with Program() as program:
        driver = Vmxnet3Driver(program.network(), Vm("bt", 16 << 20))
        driver.set_up()
        driver.poke(TABLE + 16, (16 << 20) - 512, 0)
        driver.poke(TABLE + 56, 64)
        assert driver.activate() == 1
        driver.card.close()
