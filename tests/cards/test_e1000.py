"""Intel's 82540EM (317453): registers, EEPROM, PHY, rings, and drivers that err."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import pytest
from tests.cards.e1000_driver import (
    BAM,
    BSEX,
    DATA,
    DD,
    DEXT,
    EN,
    EOP,
    IC,
    ICR,
    ICS,
    IDE,
    IFCS,
    IGNORE,
    IMC,
    IMS,
    IPCS,
    IPE,
    ITR,
    IXSM,
    LPE,
    LSC,
    MDAC,
    MPE,
    MTA,
    PIF,
    PSP,
    RA,
    RADV,
    RCTL,
    RDBAH,
    RDBAL,
    RDH,
    RDLEN,
    RDT,
    RDTR,
    RPS,
    RS,
    RX,
    RXCSUM,
    RXDMT0,
    RXE,
    RXO,
    RXT0,
    SECRC,
    SENT,
    SRPD,
    TADV,
    TCPCS,
    TCPE,
    TCTL,
    TDBAL,
    TDH,
    TDLEN,
    TDT,
    TIDV,
    TSE,
    TUCMD_IP,
    TUCMD_TCP,
    TX,
    TXD_LOW,
    TXDCTL,
    TXDW,
    TXQE,
    TXSM,
    UPE,
    VET,
    VFE,
    VFTA,
    VLE,
    VP,
    E1000Driver,
)
from tests.cards.frames import MAC, MESSAGE, OTHER, TO_NETWORK, sum16, tcp, to_guest
from tests.net.card import Program

from tetrarch.cards.e1000 import (
    CTRL,
    CTRL_EXT,
    CTRL_START,
    EECD,
    EEPROM_SUM,
    EERD,
    FCAH,
    FCAL,
    FCT,
    IOADDR,
    IODATA,
    MDIC,
    PHY_RESET,
    RESET,
    STATUS,
    TAGS,
)
from tetrarch.errors import StateError

GROUP, OTHER_GROUP = b"\1\0\x5e\0\x34\x12", b"\1\0\x5e\0\0\2"


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as one:
        yield one


@pytest.fixture
def driver(program: Program) -> Iterator[E1000Driver]:
    one = E1000Driver(program.network())
    yield one
    one.card.close()


def raised(driver: E1000Driver) -> bool:
    return driver.card.function.intx.level


# Registers


def test_function_is_the_one_that_guests_know(driver: E1000Driver) -> None:
    config = driver.card.function.config
    assert (config.get(0, 2), config.get(2, 2), config.get(9, 3)) == (0x8086, 0x100E, 0x020000)
    assert (config.get(0x2C, 2), config.get(0x2E, 2)) == (0x8086, 0x001E)
    assert config.get(0x3D, 1) == 1
    assert config.get(6, 2) & 0x10 == 0, "no capabilities: no messages"
    for bar, mask in ((0x10, 0xFFFE_0000), (0x14, 0xFFFF_FFC1)):
        driver.card.function.write_config(bar, 4, 0xFFFF_FFFF)
        assert driver.card.function.read_config(bar, 4) == mask


@pytest.mark.parametrize(
    ("register", "mask"),
    [
        (FCAL, 0xFFFF_FFFF),
        (FCAH, 0xFFFF),
        (FCT, 0xFFFF),
        (VET, 0xFFFF),
        (0x170, 0xFFFF),
        (RCTL, 0x06DF_B3FE),
        (0x410, 0x3FFF_FFFF),
        (RDBAL, 0xFFFF_FFF0),
        (RDBAH, 0xFFFF_FFFF),
        (RDLEN, 0xF_FF80),
        (RDH, 0xFFFF),
        (RDT, 0xFFFF),
        (RDTR, 0xFFFF),
        (RADV, 0xFFFF),
        (TDBAL, 0xFFFF_FFF0),
        (TDLEN, 0xF_FF80),
        (TDH, 0xFFFF),
        (TDT, 0xFFFF),
        (TIDV, 0xFFFF),
        (TADV, 0xFFFF),
        (TXDCTL, 0xFF3F_3F3F),
        (ITR, 0xFFFF),
        (MTA + 4 * 127, 0xFFFF_FFFF),
        (RA + 4, 0x8003_FFFF),
        (RA + 120, 0xFFFF_FFFF),
        (VFTA + 4 * 127, 0xFFFF_FFFF),
        (CTRL_EXT, 0x00FF_0FFF),
        # Read alone, or not there.
        (STATUS, 0),
        (0x3C, 0),
        (0x4000, 0),
        (0x1_FFFC, 0),
    ],
)
def test_registers_keep_the_bits_that_they_have(
    driver: E1000Driver, register: int, mask: int
) -> None:
    fresh = driver.read(register)
    before = fresh & ~mask
    for value in (0x5A5A_5A5A, 0xA5A5_A5A5, 0, 0xFFFF_FFFF):
        driver.write(register, value)
        assert driver.read(register) == before | value & mask
    # Parts are read, and only whole words are written.
    driver.write(register, 0, 2)
    whole = driver.read(register)
    assert whole == before | mask
    assert driver.read(register + 2, 2) == whole >> 16
    assert driver.read(register + 1, 1) == whole >> 8 & 0xFF
    # A reset of the card is one of them all.
    driver.write(CTRL, RESET)
    assert driver.read(register) == fresh


def test_wide_accesses_are_two(driver: E1000Driver) -> None:
    driver.write(RDBAL, 0x1_2345_6789, 8)
    assert (driver.read(RDBAL), driver.read(RDBAH)) == (0x2345_6780, 1)
    assert driver.read(RDBAL, 8) == 0x1_2345_6780
    driver.write(FCAL, 0x1234_5678_9ABC_DEF0, 8)
    assert driver.read(FCAL, 8) == 0x5678_9ABC_DEF0
    # Where one register of each side is touched.
    assert driver.read(0x34) == 0


def test_ports_reach_all_registers(driver: E1000Driver) -> None:
    ports = driver.ports
    for register, value in ((FCAL, 0x1234_5678), (RDBAH, 5), (RA, 7)):
        ports.write(IOADDR, 4, register)
        ports.write(IODATA, 4, value)
        assert (ports.read(IOADDR, 4), ports.read(IODATA, 4)) == (register, value)
        assert driver.read(register) == value
    for nowhere in (0x2_0000, 0xFFFF_FFFC, FCAL + 1):
        ports.write(IOADDR, 4, nowhere)
        ports.write(IODATA, 4, 0xFFFF_FFFF)
        assert ports.read(IODATA, 4) == 0
    for offset, size in ((IODATA, 2), (8, 4), (0x3C, 4), (1, 1)):
        ports.write(offset, size, 1)
        assert ports.read(offset, size) == 0


def test_eeprom_has_the_address_and_a_right_sum(driver: E1000Driver) -> None:
    def eerd(word: int) -> int:
        driver.write(EERD, 1 | word << 8)
        value = driver.read(EERD)
        assert value & 0xFFFF == word << 8 | 0x10
        return value >> 16

    words = [eerd(word) for word in range(64)]
    assert sum(words) & 0xFFFF == EEPROM_SUM
    assert struct.pack("<3H", *words[:3]) == MAC
    assert eerd(64) == eerd(255) == 0xFFFF
    assert words[0x0A] >> 14 == 1, "it is valid"
    driver.write(EERD, 3 << 8)
    assert driver.read(EERD) == 3 << 8

    # The same by its wires.
    clock, select, data, out, request, grant, present = (1 << bit for bit in (0, 1, 2, 3, 6, 7, 8))
    assert driver.read(EECD) == present | out
    driver.write(EECD, request)
    assert driver.read(EECD) & grant

    def shift(bit: int) -> int:
        wires = request | select | (data if bit else 0)
        driver.write(EECD, wires)
        driver.write(EECD, wires | clock)
        seen = driver.read(EECD) & out
        driver.write(EECD, wires)
        return int(seen != 0)

    def command(bits: str) -> None:
        driver.write(EECD, request)
        for bit in bits:
            shift(int(bit))

    for word in (0, 1, 2, 0x0A, 62, 63):
        command(f"00110{word:06b}")
        assert driver.read(EECD) & out == 0, "a 0 is before the first bit"
        got = int("".join(str(shift(0)) for _ in range(32)), 2)
        assert got == words[word] << 16 | words[(word + 1) % 64]
    # It cannot be written, and says that it is ready.
    for bits in ("10011000000", "101000000" + "1" * 16):
        command(bits)
        assert driver.read(EECD) & out
    assert eerd(0) == words[0]


def test_phy_is_the_one_of_the_part(driver: E1000Driver, program: Program) -> None:
    assert (driver.phy_read(2), driver.phy_read(3)) == (0x0141, 0x0C20)
    assert driver.phy_read(1) == 0x796D
    assert driver.phy_read(17) == 0xAC00
    assert driver.phy_read(10) >> 10 == 0xF
    assert driver.read(STATUS) & 0xC3 == 0x83
    driver.phy_write(1, 0)
    driver.phy_write(4, 0x1E1)
    assert (driver.phy_read(1), driver.phy_read(4)) == (0x796D, 0x1E1)
    assert driver.read(ICR) == 0
    driver.phy_write(0, 0x1340)  # negotiate anew
    assert (driver.phy_read(0), driver.read(ICR)) == (0x1140, LSC)
    driver.phy_write(0, 0x1940)  # without power
    assert driver.read(ICR) == LSC
    assert driver.phy_read(1) & 4 == driver.read(STATUS) & 2 == 0
    driver.phy_write(0, 0x9140)
    assert driver.read(STATUS) & 2
    driver.read(ICR)
    # Another PHY, an operation that is none, an interrupt at the end.
    for wrong in (2 << 26 | 2 << 21, 0, 3 << 26 | 1 << 21):
        driver.write(MDIC, wrong)
        assert driver.read(MDIC) >> 30 == 1
    driver.write(MDIC, 1 << 29 | 2 << 26 | 1 << 21 | 2 << 16)
    assert (driver.read(MDIC) & 0xFFFF, driver.read(ICR)) == (0x0141, MDAC)
    # The network goes.
    program.socket.close()
    driver.wait_until(lambda: driver.read(ICR) & LSC)
    assert driver.phy_read(1) & 0x24 == driver.phy_read(17) == driver.read(STATUS) & 2 == 0
    driver.write(CTRL, PHY_RESET | CTRL_START)
    assert (driver.phy_read(4), driver.read(CTRL)) == (0x0DE1, CTRL_START)


def test_reset_of_the_card_leaves_the_phy(driver: E1000Driver) -> None:
    driver.phy_write(4, 0x1E1)
    driver.write(FCAL, 5)
    driver.write(RA, 0)
    driver.write(IMS, LSC)
    driver.write(ICS, LSC)
    assert raised(driver)
    driver.start()
    driver.write(CTRL, RESET | TAGS)
    assert not raised(driver)
    assert driver.read(CTRL) == CTRL_START
    assert driver.read(FCAL) == driver.read(RCTL) == driver.read(TDT) == driver.read(ICS) == 0
    assert driver.read(RA) == int.from_bytes(MAC[:4], "little")
    assert driver.phy_read(4) == 0x1E1
    driver.card.reset()
    assert driver.phy_read(4) == 0x0DE1


def test_address_is_the_drivers_until_a_reset(driver: E1000Driver, program: Program) -> None:
    own = bytes.fromhex("521122334455")
    driver.start()
    driver.write(RA, int.from_bytes(own[:4], "little"))
    driver.write(RA + 4, 1 << 31 | int.from_bytes(own[4:], "little"))
    assert driver.card.mac == own
    program.send(to_guest(b"not mine"))
    program.send(to_guest(b"mine", own))
    assert driver.wait().frame == to_guest(b"mine", own)
    driver.write(RA + 4, 0)
    assert driver.card.mac == MAC
    driver.write(CTRL, RESET)
    assert driver.card.mac == MAC


def test_line_is_high_while_a_cause_is_not_masked(driver: E1000Driver) -> None:
    driver.start(buffers=0)
    driver.send(TO_NETWORK)
    driver.wait_until(lambda: driver.read(ICS) == TXDW | TXQE | TXD_LOW)
    assert not raised(driver)
    driver.write(IMS, TXDW)
    assert raised(driver)
    assert (driver.read(ICR), driver.read(ICR), raised(driver)) == (TXDW | TXQE | TXD_LOW, 0, False)
    driver.write(ICS, TXDW | LSC)
    assert raised(driver)
    driver.write(IMC, TXDW)
    assert (raised(driver), driver.read(IMS)) == (False, 0)
    driver.write(ICR, LSC)
    assert driver.read(ICS) == TXDW


# From the guest


def test_frames_go_out_in_their_order_and_in_pieces(driver: E1000Driver, program: Program) -> None:
    driver.start()
    for number in range(100):
        frame = TO_NETWORK + bytes([number])
        driver.send(frame, split=number % 50)
        assert program.receive() == frame
    assert driver.read(TDH) == driver.read(TDT) == driver.next_tx
    # Several at once, of which the last alone is to be told.
    frames = [TO_NETWORK + bytes([number]) * 10 for number in range(5)]
    for number, frame in enumerate(frames):
        driver.vm.write_memory(SENT + 0x1000 * number, frame)
        command = EOP | IFCS | (RS if number == 4 else 0)
        last = driver.offer(SENT + 0x1000 * number, len(frame) | command)
    driver.ring()
    driver.wait_until(lambda: driver.is_sent(last))
    assert not driver.is_sent(last - 1)
    assert [program.receive() for _ in frames] == frames


def test_rps_tells_too_and_null_descriptors_carry_nothing(
    driver: E1000Driver, program: Program
) -> None:
    driver.start()
    driver.vm.write_memory(SENT, TO_NETWORK)
    driver.offer(0, 100 | RS)
    driver.offer(SENT, RS)
    last = driver.offer(SENT, len(TO_NETWORK) | EOP | IFCS | RPS, 0xE)
    driver.ring()
    driver.wait_until(lambda: driver.is_sent(last))
    assert driver.peek(TX + 16 * last + 12) == (DD,)
    assert driver.is_sent(0)
    assert driver.is_sent(1)
    assert program.receive() == TO_NETWORK
    # A frame of nothing is none.
    last = driver.offer(0, EOP | RS)
    driver.ring()
    driver.wait_until(lambda: driver.is_sent(last))
    assert "sent_dropped_malformed" not in driver.card.stats()


def test_frames_wait_for_a_network_that_is_full(driver: E1000Driver, program: Program) -> None:
    driver.start(size=1024, buffers=0)
    driver.vm.write_memory(SENT, TO_NETWORK.ljust(9000, b"\x55"))
    for _ in range(1000):
        last = driver.offer(SENT, 9000 | EOP | IFCS | RS)
    driver.ring()
    # As many as the socket holds.
    driver.wait_until(lambda: driver.card.stats()["sent"] > 10)
    assert driver.read(TDH) < 1000
    for _ in range(1000):
        assert len(program.receive()) == 9000
    driver.wait_until(lambda: driver.is_sent(last))
    assert not [name for name in driver.card.stats() if "dropped" in name]


def test_ring_that_is_off_is_left_alone(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.write(TCTL, 0)
    driver.vm.write_memory(SENT, TO_NETWORK)
    last = driver.offer(SENT, len(TO_NETWORK) | EOP | IFCS | RS)
    driver.ring()
    driver.write(RCTL, 0)
    assert not driver.is_sent(last)
    driver.write(TCTL, EN)
    driver.wait_until(lambda: driver.is_sent(last))
    assert program.receive() == TO_NETWORK


def test_short_frames_are_not_padded(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.write(TCTL, EN | PSP)
    driver.send(TO_NETWORK[:20], split=7)
    assert program.receive() == TO_NETWORK[:20]


def test_check_sequence_of_the_drivers_own_is_taken_off(
    driver: E1000Driver, program: Program
) -> None:
    driver.start()
    check = zlib.crc32(TO_NETWORK).to_bytes(4, "little")
    driver.send(TO_NETWORK + check, command=0)
    assert program.receive() == TO_NETWORK
    # A driver that has forgotten it.
    driver.send(TO_NETWORK, command=0)
    assert program.receive() == TO_NETWORK


def pseudo_left(whole: bytes) -> bytearray:
    """A TCP segment whose sum is that of the pseudo header."""
    left = bytearray(whole)
    left[50:52] = struct.pack(">H", sum16(whole[26:34] + struct.pack(">HH", 6, len(whole) - 34)))
    return left


def test_sums_are_made_by_legacy_descriptors(driver: E1000Driver, program: Program) -> None:
    driver.start()
    whole = tcp(b"data" * 50)
    left = bytes(pseudo_left(whole))
    driver.send(left, command=IFCS | IC | 50 << 16, word3=34 << 8)
    assert program.receive() == whole
    # Of what is outside nothing comes.
    for offset, start in ((33, 34), (255, 34), (50, 255)):
        driver.send(left, command=IFCS | IC | offset << 16, word3=start << 8)
        got = program.receive()
        assert got == left, (offset, start)


@pytest.mark.parametrize("tag", [None, 0xE123])
def test_sums_are_made_by_contexts(driver: E1000Driver, program: Program, tag: int | None) -> None:
    driver.start()
    driver.write(CTRL, TAGS | CTRL_START)
    whole = tcp(b"data" * 50)
    left = pseudo_left(whole)
    left[24:26] = b"\0\0"
    command = DATA | IFCS | (0 if tag is None else VLE)
    special = 0 if tag is None else tag << 16
    expected = whole if tag is None else whole[:12] + struct.pack(">HH", 0x8100, tag) + whole[12:]
    for ends in ((33, 0), (33, len(whole) - 1), (33, 0xFFFF)):
        for split in (0, 10, 60):
            driver.context(ip=(14, 24, ends[0]), transport=(34, 50, ends[1]), command=TUCMD_IP)
            driver.send(bytes(left), command=command, word3=IXSM | TXSM | special, split=split)
            assert program.receive() == expected
    # Each for itself, by the context that is there.
    left[24:26] = whole[24:26]
    driver.send(bytes(left), command=command, word3=TXSM | special)
    assert program.receive() == expected
    # A sum of a part of the data.
    driver.context(transport=(34, 50, 99))
    driver.send(bytes(left), command=command, word3=TXSM | special)
    at = 0 if tag is None else 4
    got = program.receive()
    assert sum16(got[34 + at : 100 + at] + left[50:52]) == 0xFFFF


@pytest.mark.parametrize("tag", [None, 5])
def test_segments_are_made(driver: E1000Driver, program: Program, tag: int | None) -> None:
    driver.start()
    driver.write(CTRL, TAGS | CTRL_START)
    data = bytes(range(256)) * 20
    frame = tcp(data, prepared=False)
    driver.context(
        ip=(14, 24, 33),
        transport=(34, 50, 0),
        command=TUCMD_IP | TUCMD_TCP | TSE,
        length=len(data),
        header=54,
        size=1000,
    )
    command = DATA | TSE | IFCS | (0 if tag is None else VLE)
    word3 = IXSM | TXSM | (0 if tag is None else tag << 16)
    for split in (0, 54, 300):
        driver.send(frame, command=command, word3=word3, split=split)
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
    # GPTC, PTC255, PTC1522, TSCTC, and GOTC.
    added = 0 if tag is None else 4
    assert [driver.read(at) for at in (0x4080, 0x40E0, 0x40EC, 0x40F8)] == [18, 3, 15, 3]
    assert driver.read(0x4090) == 3 * (len(data) + 6 * (54 + added + 4))


@pytest.mark.parametrize(
    ("pieces", "context"),
    [
        ([(SENT, 13, IFCS)], {}),
        ([(0xF000_0000, 100, IFCS)], {}),
        ([((1 << 64) - 8, 100, IFCS)], {}),
        ([(SENT, 100, 0), (0xFF_FFF0, 100, IFCS)], {}),
        ([(SENT, 0xFFFF, DATA)] * 2 + [(SENT, 100, DATA | IFCS)], {}),
        ([(SENT, 0xF_FFFF, DATA | IFCS)], {}),
        ([(SENT, 8, VLE | IFCS)], {}),
        ([(SENT, 8, DATA | VLE | IFCS)], {}),
        ([(SENT, 100, DATA | TSE)], {"header": 54, "size": 10}),
        ([(SENT, 100, DATA | TSE)], {"header": 54, "size": 10, "command": TUCMD_TCP}),
        ([(SENT + 0x8000, 154, DATA | TSE)], {"header": 54, "size": 0, "command": TUCMD_TCP}),
        ([(SENT + 0x8000, 154, DATA | TSE)], {"header": 40, "size": 9, "command": TUCMD_TCP}),
        ([(SENT + 0x8000, 154, DATA | TSE)], {"header": 0, "size": 9, "command": TUCMD_TCP}),
        ([(SENT + 0x8000, 40, DATA | TSE)], {"header": 54, "size": 9, "command": TUCMD_TCP}),
        ([(SENT + 0x8000, 154, DATA | TSE)], {"header": 255, "size": 9, "command": TUCMD_TCP}),
    ],
)
def test_frames_that_are_none_are_ended_and_counted(
    driver: E1000Driver,
    program: Program,
    pieces: list[tuple[int, int, int]],
    context: dict[str, int],
) -> None:
    driver.start()
    driver.write(CTRL, TAGS | CTRL_START)
    driver.vm.write_memory(SENT, TO_NETWORK.ljust(0x8000, b"\xee"))
    driver.vm.write_memory(SENT + 0x8000, tcp(b"x" * 100))
    if context:
        driver.context(**{**context, "command": context.get("command", 0) | TSE})  # type: ignore[arg-type]
    for address, length, command in pieces:
        ends = EOP | RS if (address, length, command) == pieces[-1] else 0
        last = driver.offer(address, length | command | ends, IXSM | TXSM)
    driver.ring()
    driver.wait_until(lambda: driver.is_sent(last))
    assert driver.card.stats().get("sent_dropped_malformed") == 1
    assert driver.read(0x40FC) == bool(context)  # TSCTFC
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK


def test_frame_of_more_pieces_than_one_can_have_is_ended(
    driver: E1000Driver, program: Program
) -> None:
    driver.start(size=2048, buffers=0)
    driver.vm.write_memory(SENT, TO_NETWORK)
    for _ in range(1500):
        driver.offer(SENT, 20)
    driver.send(TO_NETWORK)
    assert driver.card.stats().get("sent_dropped_malformed") == 1
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK


def test_frames_without_an_end_are_waited_for(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.vm.write_memory(SENT, TO_NETWORK)
    driver.offer(SENT, 20 | RS)
    driver.ring()
    # A context amid a frame, whose bit for TCP is no end; and descriptors that are none.
    driver.context(command=TUCMD_TCP)
    driver.offer(SENT, 100 | DEXT | 7 << 20)
    driver.ring()
    assert driver.read(TDH) == 0
    last = driver.offer(SENT + 20, len(TO_NETWORK) - 20 | EOP | IFCS | RS)
    driver.ring()
    driver.wait_until(lambda: driver.is_sent(last))
    assert program.receive() == TO_NETWORK
    # All of a ring without one: a reset ends it.
    for _ in range(31):
        driver.offer(SENT, 20)
    driver.ring()
    driver.write(CTRL, RESET)
    driver.start()
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (TDT, 32),
        (TDT, 0xFFFF),
        (TDH, 32),
        (TDH, 0xFFFF),
        (TDLEN, 0),
        (TDLEN, 0x7F),
        (TDLEN, 0xF_FF80),
        (TDBAL, 0xFFFF_FFF0),
        (TDBAL, 0xFF_FF00),
        (TDBAL + 4, 0xFFFF_FFFF),
    ],
)
def test_ring_that_cannot_be_stands(
    driver: E1000Driver, program: Program, register: int, value: int
) -> None:
    driver.start(buffers=0)
    driver.write(register, value)
    if register != TDT:
        driver.write(TDT, 5)
    driver.write(TCTL, EN)
    program.send(to_guest(b"anything"))
    driver.wait_until(lambda: driver.card.stats()["received"] == 1)
    driver.start()
    assert driver.wait().frame == to_guest(b"anything")
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK
    assert driver.card.stats()["sent"] == 1


def test_ring_may_be_at_any_multiple_of_16(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.write(TDBAL, TX + 0x13)
    driver.vm.write_memory(SENT, TO_NETWORK)
    driver.poke(TX + 16, SENT, 0, len(TO_NETWORK) | EOP | IFCS | RS, 0)
    driver.write(TDT, 1)
    driver.wait_until(lambda: driver.is_sent(1))
    assert program.receive() == TO_NETWORK


def test_causes_of_sending(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.write(TXDCTL, 1 << 25)  # 8 descriptors are left
    driver.write(TCTL, 0)
    driver.vm.write_memory(SENT, TO_NETWORK)
    for _ in range(12):
        last = driver.offer(SENT, len(TO_NETWORK) | EOP | IFCS | RS)
    driver.ring()
    driver.read(ICR)
    driver.write(TCTL, EN)
    driver.wait_until(lambda: driver.is_sent(last))
    driver.wait_until(lambda: driver.read(ICS) == TXDW | TXQE | TXD_LOW)
    driver.read(ICR)
    # What is delayed waits; another ends that.
    driver.write(TIDV, 0xFFFF)
    driver.write(TXDCTL, 0)
    driver.send(TO_NETWORK, command=IFCS | IDE)
    driver.wait_until(lambda: driver.read(ICS) == TXQE | TXD_LOW)
    driver.write(TIDV, 1 << 31 | 0xFFFF)
    assert driver.read(ICR) == TXDW | TXQE | TXD_LOW
    driver.send(TO_NETWORK)
    driver.wait_until(lambda: driver.read(ICS) & TXDW)
    driver.read(ICR)
    driver.write(TADV, 1)
    driver.send(TO_NETWORK, command=IFCS | IDE)
    driver.wait_until(lambda: driver.read(ICS) & TXDW)
    for _ in range(15):
        program.receive()


# To the guest


def test_frames_come_with_what_is_known(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.write(RXCSUM, 0x300 | 14)
    good = MAC + OTHER + tcp(b"right", prepared=True)[12:]
    bad = bytearray(good)
    bad[-1] ^= 1
    wrong_ip = bytearray(good)
    wrong_ip[24] ^= 1
    for frame, status in [
        (to_guest(b"plain"), IGNORE),
        (MESSAGE.ljust(60, b"\0"), IPCS),  # which has no sum
        (good.ljust(60, b"\0"), IPCS | TCPCS),
        (bytes(bad).ljust(60, b"\0"), IPCS | TCPCS | TCPE),
        (bytes(wrong_ip).ljust(60, b"\0"), IPCS | IPE | TCPCS),
    ]:
        program.send(frame)
        got = driver.wait()
        assert got.frame == frame
        assert got.status == DD | 2 | status, hex(got.status)
        assert got.sum == ~sum16(frame[14:]) & 0xFFFF
    driver.write(RXCSUM, 40)
    program.send(good)
    got = driver.wait()
    assert (got.status, got.frame) == (DD | 2 | IGNORE, good.ljust(60, b"\0"))
    assert got.sum == ~sum16(good[40:]) & 0xFFFF
    for number in range(200):
        program.send(to_guest(b"%d" % number))
        assert driver.wait().frame == to_guest(b"%d" % number)
    # GPRC and PRC64, once.
    assert [driver.read(0x4074), driver.read(0x405C)] == [206, 206]
    assert driver.read(0x4074) == 0


def test_check_sequence_is_there_unless_it_is_stripped(
    driver: E1000Driver, program: Program
) -> None:
    driver.start(BAM)
    frame = to_guest(b"checked", kind=b"\x88\xb5")[:30]
    program.send(frame)
    padded = frame.ljust(60, b"\0")
    assert driver.wait().frame == padded + zlib.crc32(padded).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("control", "buffer"), [(0, 2048), (2 << 16, 512), (3 << 16, 256), (BSEX | 3 << 16, 4096)]
)
def test_frames_go_on_in_other_buffers(
    driver: E1000Driver, program: Program, control: int, buffer: int
) -> None:
    driver.start(control | LPE | SECRC, size=64)
    for length in (60, buffer - 1, buffer, buffer + 1, 3 * buffer + 7):
        frame = to_guest(bytes(range(250)) * 80)[: max(length, 60)]
        program.send(frame)
        got = driver.wait()
        assert (got.frame, got.descriptors) == (frame, -(-len(frame) // buffer))


def test_long_frames_are_for_who_wants_them(driver: E1000Driver, program: Program) -> None:
    driver.start(SECRC)
    end = to_guest(b"end")
    for length in (1518, 1519, 9000):
        program.send(to_guest(bytes(9000))[:length])
    program.send(end)
    assert len(driver.wait().frame) == 1518
    assert driver.wait().frame == end
    assert driver.read(0x40AC) == 2  # ROC
    driver.write(RCTL, EN | SECRC | LPE)
    for length in (9000, 16380, 16381):
        program.send(to_guest(bytes(20000))[:length])
    program.send(end)
    assert [len(driver.wait().frame) for _ in range(3)] == [9000, 16380, 60]
    assert driver.card.stats()["received_dropped_no_room"] == 3


def test_frame_waits_for_buffers(driver: E1000Driver, program: Program) -> None:
    driver.start(buffers=0)
    for text in (b"first", b"second"):
        program.send(to_guest(text))
        driver.wait_until(lambda: driver.read(0x40A0) == 1)  # RNBC
        assert driver.received() is None
        driver.give()
        driver.tell()
        assert driver.wait().frame == to_guest(text)
        driver.write(RCTL, 0)
        driver.start(buffers=0)
    # One that waits is not for a receiver that was switched on anew.
    program.send(to_guest(b"lost"))
    driver.wait_until(lambda: driver.read(0x40A0) == 1)
    driver.write(RCTL, 0)
    driver.start()
    program.send(to_guest(b"new"))
    assert driver.wait().frame == to_guest(b"new")


def test_causes_of_receiving(driver: E1000Driver, program: Program) -> None:
    driver.start(SECRC, buffers=20)
    driver.write(IMS, RXT0)
    program.send(to_guest(b"one"))
    driver.wait_until(lambda: raised(driver))
    assert driver.read(ICR) == RXT0
    # Half of the ring is left, or an eighth; small frames.
    driver.write(0x2C00, 64)
    driver.start(SECRC, buffers=17)
    program.send(to_guest(b"two"))
    driver.wait_until(lambda: raised(driver))
    assert driver.read(ICR) == RXT0 | RXDMT0 | SRPD
    driver.write(RCTL, EN | SECRC | 2 << 8)
    program.send(to_guest(bytes(100)))
    driver.wait_until(lambda: raised(driver))
    assert driver.read(ICR) == RXT0
    # One waits for others, but not for ever.
    driver.write(RDTR, 0xFFFF)
    driver.write(RADV, 1)
    program.send(to_guest(bytes(100)))
    driver.wait_until(lambda: raised(driver))
    assert driver.read(ICR) == RXT0


@pytest.mark.parametrize("address", [0xF000_0000, 0xFF_FFF0, (1 << 64) - 16])
def test_buffer_that_is_none_loses_its_frame(
    driver: E1000Driver, program: Program, address: int
) -> None:
    driver.start(buffers=0)
    driver.give(address)
    driver.give()
    driver.tell()
    program.send(to_guest(b"lost"))
    driver.wait_until(lambda: driver.peek(RX + 12)[0])
    assert driver.peek(RX + 12) == (DD | 2 | IGNORE | RXE,)
    driver.next_rx = 1
    program.send(to_guest(b"there"))
    assert driver.wait().frame == to_guest(b"there")
    assert driver.card.stats()["received_dropped_no_room"] == 1


def test_buffers_without_an_address_are_passed_over(driver: E1000Driver, program: Program) -> None:
    driver.start(LPE | SECRC, buffers=0)
    for address in (0, 0, None, 0, None):
        driver.give(address)
    driver.tell()
    frame = to_guest(bytes(range(250)) * 12)
    program.send(frame)
    got = driver.wait()
    assert (got.frame, got.descriptors) == (frame, 5)
    # A ring of them: none is left, and a frame waits.
    for _ in range(31):
        driver.give(0)
    driver.tell()
    program.send(frame)
    driver.wait_until(lambda: driver.read(RDH) == driver.read(RDT))
    driver.next_rx = driver.read(RDH)
    driver.give()
    driver.give()
    driver.tell()
    assert driver.wait().frame == frame


def test_frame_that_no_ring_would_hold_is_dropped(driver: E1000Driver, program: Program) -> None:
    driver.start(LPE | SECRC | 3 << 16, size=8)
    program.send(to_guest(bytes(9000)))
    program.send(to_guest(b"short"))
    assert driver.wait().frame == to_guest(b"short")
    assert driver.read(0x4010) == 1  # MPC
    assert driver.read(ICR) & RXO
    assert driver.card.stats().get("received_dropped_no_room") == 1


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (RDH, 32),
        (RDH, 0xFFFF),
        (RDLEN, 0),
        (RDBAL, 0xFF_FF00),
        (RDBAH, 0xFFFF_FFFF),
    ],
)
def test_receive_ring_that_cannot_be_stands(
    driver: E1000Driver, program: Program, register: int, value: int
) -> None:
    driver.start()
    driver.write(register, value)
    program.send(to_guest(b"waits"))
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK
    assert driver.card.stats()["received"] == 0
    # It goes on where it was, as soon as it can be.
    good = {RDH: 0, RDLEN: 512, RDBAL: RX, RDBAH: 0}[register]
    driver.write(register, good)
    assert driver.wait().frame == to_guest(b"waits")


@pytest.mark.parametrize("tail", [32, 0xFFFF])
def test_tail_beyond_the_ring_is_never_met(
    driver: E1000Driver, program: Program, tail: int
) -> None:
    driver.start(buffers=32)
    for number in range(100):
        driver.write(RDT, tail)
        program.send(to_guest(b"%d" % number))
        assert driver.wait().frame == to_guest(b"%d" % number)


def test_filters_say_what_comes(driver: E1000Driver, program: Program) -> None:
    driver.start()
    everyone, end = b"\xff" * 6, to_guest(b"end", b"\1\0\x5e\0\0\7")
    hashes = [(to[5] << 8 | to[4]) >> 4 for to in (GROUP, end[:6])]
    for one in hashes:
        driver.write(MTA + 4 * (one >> 5), 1 << (one & 31))

    def come(mode: int) -> list[bytes]:
        driver.write(RCTL, EN | SECRC | mode)
        for to in (MAC, OTHER, GROUP, OTHER_GROUP, everyone):
            program.send(to_guest(b"x", to))
        program.send(end)
        came = []
        while (got := driver.wait()).frame != end:
            came.append(got.frame[:6])
            assert bool(got.status & PIF) == (got.frame[:6] == GROUP and not mode & MPE)
        return came

    assert come(0) == [MAC, GROUP]
    assert come(UPE) == [MAC, OTHER, GROUP]
    assert come(BAM) == [MAC, GROUP, everyone]
    assert come(MPE) == [MAC, GROUP, OTHER_GROUP, everyone]
    # BPRC and MPRC.
    assert [driver.read(at) for at in (0x4078, 0x407C)] == [2, 9]


def test_tags_are_looked_at_and_taken_off(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.write(RXCSUM, 0x300 | 14)
    plain = MAC + OTHER + tcp(b"tagged" * 10)[12:]
    tagged = plain[:12] + b"\x81\x00\x20\x46" + plain[12:]
    program.send(tagged)
    got = driver.wait()
    assert (got.frame, got.status, got.tag) == (tagged, DD | 2 | IPCS | TCPCS, 0)
    driver.write(CTRL, TAGS | CTRL_START)
    program.send(tagged)
    got = driver.wait()
    assert (got.frame, got.status, got.tag) == (plain, DD | 2 | VP | IPCS | TCPCS, 0x2046)
    assert got.sum == ~sum16(plain[14:]) & 0xFFFF
    driver.write(RCTL, EN | SECRC | VFE)
    program.send(tagged)
    program.send(plain)
    assert driver.wait().status & VP == 0
    driver.write(VFTA + 4 * (0x46 // 32), 1 << 0x46 % 32)
    program.send(tagged)
    assert driver.wait().tag == 0x2046
    # Another type.
    driver.write(VET, 0x88A8)
    program.send(tagged)
    assert driver.wait().frame == tagged
    driver.send(TO_NETWORK, command=IFCS | VLE, word3=7 << 16)
    assert program.receive() == TO_NETWORK[:12] + b"\x88\xa8\0\7" + TO_NETWORK[12:]


@pytest.mark.parametrize("by", ["phy", "rctl"])
def test_loop_brings_back_what_is_sent(driver: E1000Driver, program: Program, by: str) -> None:
    driver.start(UPE | SECRC | (3 << 6 if by == "rctl" else 0))
    if by == "phy":
        driver.phy_write(0, 0x4140)
    program.send(to_guest(b"from without"))
    driver.wait_until(lambda: driver.card.stats().get("received_dropped_unwanted") == 1)
    for number in range(64):
        driver.send(TO_NETWORK + bytes([number]))
        assert driver.wait().frame == TO_NETWORK + bytes([number])
    whole = tcp(b"data" * 50)
    driver.send(bytes(pseudo_left(whole)), command=IFCS | IC | 50 << 16, word3=34 << 8)
    assert driver.wait().frame == whole
    # Without buffers it is lost.
    driver.write(RDT, driver.read(RDH))
    driver.send(TO_NETWORK)
    assert driver.read(0x4010) == 1
    driver.tell()
    driver.phy_write(0, 0x1140)
    driver.write(RCTL, EN | SECRC)
    program.send(to_guest(b"again"))
    assert driver.wait().frame == to_guest(b"again")
    driver.send(TO_NETWORK)
    assert program.receive() == TO_NETWORK


# Life


def test_without_the_bus_memory_is_left_alone(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.set_bus_master(on=False)
    program.send(to_guest(b"waits"))
    driver.vm.write_memory(SENT, TO_NETWORK)
    last = driver.offer(SENT, len(TO_NETWORK) | EOP | IFCS | RS)
    driver.ring()
    driver.write(RCTL, EN | SECRC)
    assert (driver.received(), driver.is_sent(last)) == (None, False)
    driver.set_bus_master()
    assert driver.wait().frame == to_guest(b"waits")
    driver.wait_until(lambda: driver.is_sent(last))
    assert program.receive() == TO_NETWORK


def test_saved_card_goes_on(driver: E1000Driver, program: Program) -> None:
    own = bytes.fromhex("521122334455")
    driver.write(RA, int.from_bytes(own[:4], "little"))
    driver.write(RA + 4, 1 << 31 | int.from_bytes(own[4:], "little"))
    driver.start()
    driver.write(CTRL, TAGS | CTRL_START)
    driver.write(RXCSUM, 0x300)
    driver.phy_write(4, 0x1E1)
    driver.context(transport=(34, 50, 0))
    for number in range(35):
        driver.send(TO_NETWORK + bytes([number]))
        program.receive()
    driver.write(IMS, RXT0 | LSC)
    program.send(to_guest(b"before", own))
    driver.wait()
    driver.write(EECD, 2)
    driver.write(EECD, 2 | 4 | 1)
    assert raised(driver)
    state = driver.card.save()
    with Program() as other:
        copy = E1000Driver(other.network(), driver.vm)
        copy.card.load(state)
        assert copy.card.save() == state
        assert raised(copy)
        assert copy.read(ICR) & RXT0
        names = ("size", "next_tx", "next_rx", "given")
        for name in names:
            setattr(copy, name, getattr(driver, name))
        whole = tcp(b"data" * 50)
        copy.send(bytes(pseudo_left(whole)), command=DATA | IFCS | VLE, word3=TXSM | 9 << 16)
        # The network hears where the guest is now.
        assert other.receive()[:14] == b"\xff" * 6 + own + b"\x80\x35"
        assert other.receive() == whole[:12] + b"\x81\0\0\x09" + whole[12:]
        other.send(to_guest(b"after", own))
        assert copy.wait().frame == to_guest(b"after", own)
        assert copy.phy_read(4) == 0x1E1
        copy.card.change_mac(OTHER)
        copy.card.load(state)
        copy.write(EERD, 1)
        assert copy.read(EERD) >> 16 == int.from_bytes(OTHER[:2], "little")
        copy.write(CTRL, RESET)
        assert copy.card.mac == OTHER
        # One whose network is gone by then says so.
        other.socket.close()
        copy.wait_until(lambda: not copy.card.rings.link)
        copy.card.load(state)
        assert copy.read(ICR) & LSC
        copy.card.close()


def test_damaged_state_is_refused(driver: E1000Driver) -> None:
    driver.start()
    state = driver.card.save()
    rings = state["rings"]
    changes: tuple[dict[str, object], ...] = (
        {"permanent": [0] * 5},
        {"permanent": [256] * 6},
        {"registers": rings["registers"][1:]},
        {"registers": [1 << 32, *rings["registers"][1:]]},
        {"filter": []},
        {"filter": [*rings["filter"], 0]},
        {"statistics": [0] * 63},
        {"interrupts": [0]},
        {"places": [0] * 5},
        {"contexts": []},
        {"state": None},
    )
    for change in changes:
        with pytest.raises(StateError):
            driver.card.load({**state, "rings": {**rings, **change}})
        assert driver.read(RCTL) == 0
    with pytest.raises(StateError):
        driver.card.load({})
    # Numbers that no card has are cut to those that it may have.
    many = {"places": [0xFFFF_FFFF] * 4, "interrupts": [0xFFFF_FFFF] * 7, "state": [9] * 3}
    driver.card.load({**state, "rings": {**rings, **many}})
    assert (driver.read(TDH), driver.read(RDT), driver.read(IMS)) == (0xFFFF, 0xFFFF, 0x1_FFFF)
    driver.card.load(state)
    assert driver.read(RCTL) == EN | BAM | SECRC


def test_reset_and_close_forget_all(driver: E1000Driver, program: Program) -> None:
    driver.start()
    driver.card.reset()
    driver.set_bus_master()
    program.send(to_guest(b"nobody"))
    driver.wait_until(lambda: driver.card.stats().get("received_dropped_unwanted") == 1)
    assert driver.received() is None
    driver.card.close()
    assert driver.read(STATUS) & 2 == 0
    driver.start()
    driver.vm.write_memory(SENT, TO_NETWORK)
    driver.offer(SENT, len(TO_NETWORK) | EOP | IFCS | RS)
    driver.ring()
