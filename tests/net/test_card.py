"""The network card, by a driver's mock and a program at the other end of a stream."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.net.card import MAC, OTHER, PLAIN, Card, Program, udp
from tests.net.pcap import frames_of
from tests.virtio.driver import wait_until

from tetrarch import StateError
from tetrarch.net import Flow, NetSpec, open_network
from tetrarch.net.network import wrap
from tetrarch.virtio.net import (
    CSUM,
    CTRL_MAC_ADDR,
    CTRL_RX,
    CTRL_VQ,
    GUEST_ANNOUNCE,
    GUEST_CSUM,
    GUEST_TSO4,
    HOST_TSO4,
    MQ,
    MRG_RXBUF,
    MTU,
    STATUS,
)
from tetrarch.virtio.net import MAC as MAC_FEATURE

FRAME = MAC + OTHER + b"\x88\xb5" + bytes(range(60))


@pytest.fixture
def program() -> Iterator[Program]:
    with Program() as program:
        yield program


@pytest.fixture
def card(program: Program) -> Iterator[Card]:
    card = Card(program.network())
    card.start(3, MRG_RXBUF | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | STATUS | GUEST_ANNOUNCE)
    yield card
    card.kind.close()


def test_configuration_describes_the_card(program: Program) -> None:
    card = Card(program.network(NetSpec("user", mtu=9000)))
    offered = card.device.features()
    wanted = MAC_FEATURE | STATUS | CSUM | GUEST_CSUM | HOST_TSO4 | MRG_RXBUF | CTRL_VQ | MTU
    assert offered & wanted == wanted
    # A stream gives whole frames, and there is one pair of queues.
    assert not offered & (GUEST_TSO4 | MQ)
    config = bytes(card.device.config(offset, 1) for offset in range(12))
    assert config == MAC + struct.pack("<HHH", 1, 1, 9000)
    card.kind.close()


def test_frames_go_both_ways(card: Card, program: Program) -> None:
    card.send(FRAME)
    assert program.receive() == FRAME
    card.offer_room()
    program.send(FRAME)
    header, frame = card.receive()
    assert (header, frame) == (PLAIN[:10] + b"\x01\x00", FRAME)
    assert card.kind.stats() == {
        "sent": 1,
        "sent_bytes": len(FRAME),
        "received": 1,
        "received_bytes": len(FRAME),
    }


def test_segmentation_is_done_for_a_peer_that_does_none(program: Program) -> None:
    card = Card(program.network())
    card.start(2, CSUM | HOST_TSO4)
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 100, 0, 0) + bytes(3000)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 3040, 1, 0, 64, 6, 0, b"\n\0\0\1", b"\n\0\0\2")
    whole = MAC + OTHER + b"\x08\x00" + ip + tcp
    card.send(whole, struct.pack("<BBHHHHH", 1, 1, 54, 1400, 34, 16, 0))
    lengths = [len(program.receive()) for _ in range(3)]
    assert lengths == [1454, 1454, 254]
    # Without it such a header is nonsense.
    card.start(2, CSUM)
    card.send(whole, struct.pack("<BBHHHHH", 1, 1, 54, 1400, 34, 16, 0))
    assert card.kind.stats()["sent_dropped_malformed"] == 1
    card.kind.close()


def test_link_is_down_when_the_program_has_gone(card: Card, program: Program) -> None:
    assert card.device.config(6, 2) == 1
    program.socket.close()
    wait_until(lambda: card.device.config(6, 2) == 0, "the link is not down")
    card.send(FRAME)
    assert card.kind.stats()["sent_dropped_no_peer"] == 1


@pytest.fixture
def other_program() -> Iterator[Program]:
    with Program() as program:
        yield program


def test_saved_card_is_what_its_driver_made_of_it(card: Card, other_program: Program) -> None:
    assert card.command(b"\0\0\0") == 0  # no longer promiscuous
    assert card.command(b"\1\1" + OTHER) == 0
    state = card.kind.save()
    other = Card(other_program.network(), mac=b"\2\2\2\2\2\2")
    other.kind.load(state)
    other.negotiate(CTRL_VQ | CTRL_RX | STATUS | GUEST_ANNOUNCE)
    # The reset of a driver that begins anew gives the address that it was saved with.
    assert bytes(other.device.config(offset, 1) for offset in range(6)) == MAC
    other.kind.load(state)
    assert bytes(other.device.config(offset, 1) for offset in range(6)) == OTHER
    assert other.device.config(6, 2) == 3, "it is to announce itself"
    for name in ("mac", "unicast", "mode", "pairs"):
        with pytest.raises(StateError):
            other.kind.load({key: value for key, value in state.items() if key != name})
    other.kind.close()


def test_capture_is_a_file_of_all_frames(program: Program, tmp_path: Path) -> None:
    network = program.network()
    path = tmp_path / "frames.pcap"
    wrap(network.native, NetSpec("user", pcap=path))
    card = Card(network)
    card.start(2)
    card.send(FRAME)
    assert program.receive() == FRAME
    card.offer_room()
    program.send(FRAME[::-1])
    assert card.receive()[1] == FRAME[::-1]
    card.kind.close()
    assert frames_of(path) == [FRAME, FRAME[::-1]]


def test_filter_is_asked_once_about_each_flow(program: Program) -> None:
    asked = []

    def allows(flow: Flow) -> bool:
        asked.append(str(flow))
        return flow.destination_port != 53

    opened = program.network()
    wrap(opened.native, NetSpec("user", filter=allows))
    card = Card(opened)
    card.start(2)
    yes = udp(("10.0.0.1", 1000), ("10.0.0.2", 80), b"yes")
    no = udp(("10.0.0.1", 1000), ("10.0.0.2", 53), b"no")
    for frame in (no, yes, FRAME, no, yes):
        card.send(frame)
    # What is no IP passes at once; of the others those wait that nobody has judged.
    assert sorted(program.receive() for _ in range(3)) == sorted([yes, FRAME, yes])
    assert asked == ["udp 10.0.0.1:1000 to 10.0.0.2:53", "udp 10.0.0.1:1000 to 10.0.0.2:80"]
    wait_until(lambda: card.kind.stats().get("sent_dropped_filtered") == 2, "not filtered")
    card.kind.close()


def test_shaped_network_loses_and_delays(program: Program) -> None:
    opened = program.network()
    wrap(opened.native, NetSpec("user", loss=1.0))
    card = Card(opened)
    card.start(2)
    card.send(FRAME)
    assert card.kind.stats()["sent_dropped_lost"] == 1
    card.kind.close()


def test_machines_at_one_socket_are_on_one_network(tmp_path: Path) -> None:
    spec = NetSpec("socket", str(tmp_path / "net"))
    cards = [Card(open_network(spec), mac) for mac in (MAC, OTHER)]
    for card in cards:
        card.start(2)
    cards[0].offer_room()
    cards[1].send(FRAME)
    assert cards[0].receive()[1] == FRAME
    stats = [card.kind.stats() for card in cards]
    assert sum(one["switch_sent"] for one in stats) == 1
    for card in cards:
        card.kind.close()
    assert list(tmp_path.iterdir()) == []
