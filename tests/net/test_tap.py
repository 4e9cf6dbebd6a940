"""Tap devices and bridges, in a network namespace of the test's own."""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.net.card import MAC, OTHER, Card, udp
from tests.net.namespace import drop_net_admin, in_namespace, ip, need_root
from tests.virtio.driver import wait_until

from tetrarch import HostError
from tetrarch.net import NetSpec, open_network
from tetrarch.virtio.net import CTRL_VQ, GUEST_CSUM, GUEST_TSO4, MQ

pytestmark = [
    need_root,
    pytest.mark.skipif(shutil.which("ip") is None, reason="no ip: apt-get install iproute2"),
]


def link(name: str) -> dict[str, Any] | None:
    links: list[dict[str, Any]] = json.loads(ip("-j -d link show"))
    return next((one for one in links if one["ifname"] == name), None)


def opened(text: str) -> Card:
    return Card(open_network(NetSpec.parse(text)))


def exchange(card: Card, queue: int = 0) -> None:
    """A datagram each way, between the card and the host behind t0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("10.7.0.1", 0))
        host.settimeout(30)
        port: int = host.getsockname()[1]
        hardware = (link("t0") or {})["address"].replace(":", "")
        frame = udp(("10.7.0.2", 4000), ("10.7.0.1", port), b"from the guest")
        card.send(bytes.fromhex(hardware) + MAC + frame[12:], queue=queue + 1)
        assert host.recvfrom(100) == (b"from the guest", ("10.7.0.2", 4000))
        card.offer_room(queue)
        host.sendto(b"from the host", ("10.7.0.2", 4000))
        # The host's own noise comes too.
        while True:
            _, frame = card.receive(queue)
            if frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[-13:] == b"from the host":
                return
            card.offer_room(queue)


def give_address() -> None:
    ip("addr add 10.7.0.1/24 dev t0")
    ip("neigh replace 10.7.0.2 lladdr " + MAC.hex(":") + " dev t0 nud permanent")


@in_namespace
def test_tap_is_made_used_and_gone() -> None:
    card = opened("tap=t0")
    assert link("t0") is not None
    card.start(3, CTRL_VQ)
    give_address()
    exchange(card)
    card.kind.close()
    assert link("t0") is None


@in_namespace
def test_tap_that_is_there_is_used_and_stays() -> None:
    ip("tuntap add t0 mode tap multi_queue")
    for text in ("tap=t0", "tap=t0,queues=3"):
        card = opened(text)
        found = link("t0")
        assert found is not None
        assert "UP" in found["flags"]
        card.kind.close()
        assert link("t0") is not None


@in_namespace
def test_tap_is_put_into_a_bridge_and_taken_out_again() -> None:
    ip("link add br0 type bridge")
    ip("tuntap add t1 mode tap")
    cards = [opened("tap=t0,bridge=br0"), opened("tap=t1,bridge=br0")]
    for name in ("t0", "t1"):
        assert (link(name) or {})["master"] == "br0"
    for card in cards:
        card.kind.close()
    assert link("t0") is None
    assert "master" not in (link("t1") or {"master": ""})


@in_namespace
def test_bridge_joins_cards() -> None:
    ip("link add br0 type bridge")
    ip("link set br0 up")
    with ExitStack() as stack:
        cards = []
        for index, mac in enumerate((MAC, OTHER)):
            spec = NetSpec.parse(f"tap=t{index},bridge=br0")
            card = Card(open_network(spec), mac)
            stack.callback(card.kind.close)
            card.start(2)
            cards.append(card)
        frame = b"\xff" * 6 + OTHER + b"\x88\xb5" + bytes(46)
        cards[0].offer_room()

        def came() -> bool:
            # A port forwards nothing until the kernel has seen that its link is up.
            cards[1].send(frame)
            if not cards[0].has_used(0):
                return False
            _, got = cards[0].receive()
            cards[0].offer_room()
            return got == frame

        wait_until(came, "the bridge does not forward")


@in_namespace
def test_every_pair_of_queues_carries_frames() -> None:
    card = opened("tap=t0,queues=3")
    card.start(7, CTRL_VQ | MQ)
    assert card.device.config(8, 2) == 3
    give_address()
    exchange(card)
    assert card.command(b"\4\0\3\0", queue=6) == 0
    frame = b"\xff" * 6 + OTHER + b"\x88\xb5" + bytes(46)
    for pair in range(3):
        card.send(frame, queue=2 * pair + 1)
    assert card.command(b"\4\0\1\0", queue=6) == 0
    # All that comes goes to the first again.
    exchange(card)
    card.kind.close()


@in_namespace
def test_checksums_and_segments_are_left_to_a_guest_that_takes_them() -> None:
    card = opened("tap=t0")
    card.start(2, GUEST_CSUM | GUEST_TSO4)
    give_address()
    card.offer_room()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.sendto(b"x" * 100, ("10.7.0.2", 4000))
        while True:
            header, frame = card.receive()
            if frame[12:14] == b"\x08\x00" and frame[-100:] == b"x" * 100:
                break
            card.offer_room()
    # NEEDS_CSUM, from the UDP header on, at its checksum.
    assert (header[0], header[6:10]) == (1, b"\x22\x00\x06\x00")
    card.kind.close()


@in_namespace
def test_tap_that_somebody_removes_is_a_link_that_is_down() -> None:
    card = opened("tap=t0")
    card.start(2)
    assert card.device.config(6, 2) == 1
    # The host's noise has room: a card that reads on sees the end.
    for _ in range(16):
        card.offer_room()
    ip("link del t0")
    wait_until(lambda: card.device.config(6, 2) == 0, "the link is not down")
    card.send(b"\xff" * 6 + MAC + b"\x88\xb5" + bytes(46))
    assert card.kind.stats()["sent_dropped_no_peer"] == 1
    card.kind.close()


@pytest.mark.parametrize(
    ("before", "text", "message"),
    [
        ("", "tap=t0,bridge=br0", "there is no bridge br0; make it: ip link add br0 type bridge"),
        ("tuntap add br0 mode tap", "tap=t0,bridge=br0", "br0 is no bridge but a tun; name"),
        ("link add t0 type bridge", "tap=t0", "t0 is no tap device but a bridge; name another"),
        ("tuntap add t0 mode tun", "tap=t0", "t0 is no tap device but a tun device; name"),
        ("", "tap=lo", "lo is no tap device but a network device; name another"),
        ("tuntap add t0 mode tap", "tap=t0,queues=2", "the tap device t0 has one queue, not 2; "),
    ],
)
@in_namespace
def test_what_is_no_tap_is_one_line(before: str, text: str, message: str) -> None:
    if before:
        ip(before)
    with pytest.raises(HostError) as raised:
        opened(text)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    links = {one["ifname"] for one in json.loads(ip("-j link show"))}
    assert links == {"lo", *before.split()[2:3]}


@in_namespace
def test_tap_in_use_is_one_line() -> None:
    card = opened("tap=t0")
    with pytest.raises(HostError, match="another program has the tap device t0; name another"):
        opened("tap=t0")
    assert link("t0") is not None
    card.kind.close()


@in_namespace
def test_no_right_is_one_line() -> None:
    drop_net_admin()
    with pytest.raises(HostError) as raised:
        opened("tap=t0")
    assert str(raised.value) == (
        "no right to make the tap device t0: it takes CAP_NET_ADMIN; let root run: "
        "ip tuntap add t0 mode tap user $USER; or use a user network"
    )


def test_no_device_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tetrarch.net.tap._DEVICE", str(tmp_path / "tun"))
    with pytest.raises(HostError, match=r"cannot open .*/tun: No such file.*; load it"):
        opened("tap=tetrarch-test")
