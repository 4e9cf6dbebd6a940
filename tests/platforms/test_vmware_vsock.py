"""vSockets over VMCI: programs of the host and a guest's driver that knows only Linux's headers."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.platforms.vmci import (
    ATTACH,
    CONTROL,
    DATA_IN,
    DISABLE,
    INVALID,
    LIMIT_S,
    NEGOTIATE2,
    OFFER,
    PAGE,
    READ,
    REQUEST,
    REQUEST2,
    RESET,
    RST,
    SHUTDOWN,
    WAITING_READ,
    WAITING_WRITE,
    WROTE,
    Driver,
    Packet,
    Stream,
)

from tetrarch.errors import HostError
from tetrarch.pci.function import BUS_MASTER, COMMAND

PORT = 80
SEND_ENDS, RECEIVE_ENDS = 2, 1


@pytest.fixture(params=[True, False], ids=["transfers", "bytes"])
def driver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = Driver(sockets=tmp_path / "vsock", transfers=request.param)
    driver.start()
    yield driver
    driver.device.close()


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(sockets=tmp_path / "vsock", transfers=True)
    driver.start()
    yield driver
    driver.device.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path / 'vsock'}_{PORT}")
        listener.listen(64)
        listener.settimeout(LIMIT_S)
        yield listener


def program(tmp_path: Path, port: int, more: bytes = b"") -> socket.socket:
    """One that wants a port of the guest."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT_S)
    client.connect(str(tmp_path / "vsock"))
    client.sendall(b"CONNECT %d\n" % port + more)
    return client


def line(client: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        text += client.recv(1)
    return text


def accepted(listener: socket.socket) -> socket.socket:
    client, _ = listener.accept()
    client.settimeout(LIMIT_S)
    return client


def rest(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:  # what it has sent was not taken
        return True


def wait_until_taken(stream: Stream) -> None:
    end = time.monotonic() + LIMIT_S
    while stream.used():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("old", [False, True], ids=["states", "asked"])
def test_guest_reaches_who_listens(driver: Driver, listener: socket.socket, old: bool) -> None:
    stream = driver.connect(PORT, 5000, old=old)
    with accepted(listener) as client:
        assert stream.write(b"from the guest") == 14
        assert client.recv(100) == b"from the guest"
        client.sendall(b"from the host")
        if old:
            # Of the ring's first time around, the byte behind those that it has taken.
            first = driver.packet()
            assert (first.kind, first.word) == (WAITING_READ, 0)
        assert stream.read_all(13) == b"from the host"
        client.shutdown(socket.SHUT_WR)
        over = driver.packet(WROTE, READ, WAITING_READ)
        assert over == Packet(SHUTDOWN, PORT, 5000, SEND_ENDS)
        stream.write(b"bye")  # half of it is open still
        assert client.recv(100) == b"bye"
        assert stream.close() == 0
        assert client.recv(1) == b""


@pytest.mark.parametrize("old", [False, True], ids=["states", "asked"])
def test_program_reaches_a_port_of_the_guest(driver: Driver, tmp_path: Path, old: bool) -> None:
    with program(tmp_path, 1234, b"early") as client:
        stream = driver.accept(old=old)
        assert stream.guest == 1234
        assert line(client) == b"OK %d\n" % stream.host
        assert stream.read_all(5) == b"early"
        stream.write(b"late")
        wait_until_taken(stream)
        # Its end: all that it has written comes out, then nothing.
        stream.tell(SHUTDOWN, SEND_ENDS)
        assert rest(client) == b"late"
        stream.tell(SHUTDOWN, RECEIVE_ENDS)
        deadline = time.monotonic() + LIMIT_S
        while not driver.events and time.monotonic() < deadline:
            driver.fetch()
        assert driver.events.popleft() == (4, 0, *stream.handle, 2, 0)
        assert stream.close() == 3


def test_where_nobody_listens_or_accepts_is_a_reset(driver: Driver, tmp_path: Path) -> None:
    driver.tell(REQUEST2, 81, 1, 1 << 16, 1)
    assert driver.packet() == Packet(RST, 81, 1)
    with program(tmp_path, 7) as client:
        asked = driver.packet()
        driver.tell(RST, asked.host, 7)
        assert client.recv(1) == b""


def test_guest_that_says_nothing_is_given_up(fast: Driver, tmp_path: Path) -> None:
    # A driver without sockets, and sockets that do not answer.
    for proven in (False, True):
        with program(tmp_path, 7) as client:
            asked = fast.packet() if proven else None
            begun = time.monotonic()
            assert client.recv(1) == b""
            assert 1 < time.monotonic() - begun < LIMIT_S / 2
        given_up = fast.packet()
        assert (given_up.kind, given_up.guest) == (RST, 7)
        assert asked is None or (asked.kind, asked.host) == (REQUEST2, given_up.host)
    # Where there is no driver that could answer nobody waits.
    fast.write(CONTROL, DISABLE)
    with program(tmp_path, 7) as client:
        begun = time.monotonic()
        assert ended(client)
        assert time.monotonic() - begun < 1


def test_what_a_guest_wrote_before_it_closed_is_there(
    fast: Driver, listener: socket.socket
) -> None:
    data = random.Random(1).randbytes(1 << 18)
    stream = fast.connect(PORT, 5000, 1 << 18)
    with accepted(listener) as client:
        sent = stream.write(data[:-1])
        assert sent == len(data) - 1
        stream.close()
        assert rest(client) == data[:-1]
    # And where its socket was gone before it has closed.
    stream = fast.connect(PORT, 5000, 1 << 18)
    with accepted(listener) as client:
        stream.write(data[:-1])
        stream.tell(RST)
        assert rest(client) == data[:-1]
        assert stream.close() == 3


def echo(client: socket.socket) -> None:
    with client:
        while data := client.recv(1 << 16):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("old", [False, True], ids=["states", "asked"])
@pytest.mark.parametrize("size", [2, 61, PAGE, 5000, 1 << 18])
def test_bytes_come_back_as_they_went(
    fast: Driver, listener: socket.socket, size: int, old: bool
) -> None:
    """Through rings that come around, are full and empty again and again."""
    total = min(200 * size, 4 << 20)
    chance = random.Random(size)
    data = chance.randbytes(total)
    stream = fast.connect(PORT, 5000, size, old=old)
    assert stream.size == size
    thread = threading.Thread(target=echo, args=(accepted(listener),))
    thread.start()
    sent, back = 0, b""
    end = time.monotonic() + 2 * LIMIT_S
    while len(back) < total:
        assert time.monotonic() < end, f"{sent} sent, {len(back)} back of {total}"
        sent += stream.write(data[sent : sent + chance.randrange(1, 2 * size)])
        back += stream.read(chance.randrange(1, 2 * size))
        fast.fetch()
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
    stream.tell(SHUTDOWN, SEND_ENDS)
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_guest_that_waits_is_told(fast: Driver, listener: socket.socket) -> None:
    stream = fast.connect(PORT, 5000, PAGE)
    with accepted(listener) as client:
        client.sendall(b"x" * 100_000)
        assert fast.packet() == Packet(WROTE, PORT, 5000)
        end = time.monotonic() + LIMIT_S
        while stream.ready() < PAGE - 1:
            assert time.monotonic() < end
        assert len(stream.read()) == PAGE - 1  # it was full, so that it says READ
        stream.read_all(100_000 - PAGE + 1)
        fast.packets.clear()
        fast.fetch()
        # The other way: the host's program does not read.
        written = 0
        while time.monotonic() < end:
            if not (more := stream.write(b"y" * PAGE)):
                time.sleep(0.05)
                more = stream.write(b"y" * PAGE)
            written += more
            if not more:
                break
        fast.packets.clear()
        assert len(client.recv(1 << 20)) > 0
        assert fast.packet(WROTE) == Packet(READ, PORT, 5000)
        assert written > PAGE


def test_many_connections_at_once(fast: Driver, tmp_path: Path, listener: socket.socket) -> None:
    with contextlib.ExitStack() as stack:
        streams = [fast.connect(PORT, 5000 + number, 100) for number in range(40)]
        clients = [stack.enter_context(accepted(listener)) for _ in streams]
        for _ in range(40):
            clients.append(stack.enter_context(program(tmp_path, 9)))
            streams.append(fast.accept(100))
            assert line(clients[-1]) == b"OK %d\n" % streams[-1].host
        assert len({stream.handle for stream in streams}) == 80
        for number, (stream, client) in enumerate(zip(streams, clients, strict=True)):
            stream.write(b"%d" % number)
            assert client.recv(10) == b"%d" % number
            client.sendall(b"%d!" % number)
        for number, stream in enumerate(streams):
            assert stream.read_all(len(b"%d!" % number)) == b"%d!" % number
        for stream in streams:
            assert stream.close() == 0
        for client in clients:
            assert client.recv(1) == b""


@pytest.mark.parametrize("where", ["tail", "head", "high"])
def test_ring_that_cannot_be_ends_its_connection_alone(
    fast: Driver, listener: socket.socket, where: str
) -> None:
    stream, other = fast.connect(PORT, 5000, 5000), fast.connect(PORT, 5001, 5000)
    with accepted(listener) as client, accepted(listener) as good:
        offset = {"tail": 8, "head": 16, "high": 8}[where]
        wrong = 1 << 32 if where == "high" else stream.size
        stream.set_number(stream.produce[0], offset, wrong)
        stream.tell(WROTE)
        client.sendall(b"x")
        assert fast.packet(WROTE) == Packet(RST, PORT, 5000)
        assert ended(client)
        other.write(b"good")
        assert good.recv(10) == b"good"
        assert stream.close() == 3


def test_packets_that_are_none(driver: Driver, tmp_path: Path) -> None:
    assert driver.send(1, bytes(31), 2) == -2
    assert driver.send(2, bytes(32), 2) == -1
    for kind in (INVALID, NEGOTIATE2, OFFER, ATTACH, WROTE, READ, SHUTDOWN, WAITING_WRITE):
        driver.tell(kind, 1, 2)
        assert driver.packet() == Packet(RST, 1, 2)
    driver.tell(RST, 1, 2)
    driver.tell(99, 1, 2)
    assert driver.packet() == Packet(INVALID, 1, 2)
    driver.tell(REQUEST2, 1, 2, 1 << 16, 2)  # none of the ways that there are
    assert driver.packet() == Packet(RST, 1, 2)
    driver.tell(REQUEST, 1, 2, 0)
    assert driver.packet() == Packet(RST, 1, 2)
    for answer in (
        (NEGOTIATE2, 0, 1),
        (NEGOTIATE2, (1 << 18) + 1, 1),
        (NEGOTIATE2, 1 << 16, 2),
        (ATTACH, 1, 0),
    ):
        with program(tmp_path, 7) as client:
            asked = driver.packet()
            driver.tell(answer[0], asked.host, 7, answer[1], answer[2])
            assert driver.packet() == Packet(RST, asked.host, 7)
            assert client.recv(1) == b""
    # One that is offered has to be taken as it is, and before it is said to be.
    with program(tmp_path, 7) as client:
        asked = driver.packet()
        driver.tell(NEGOTIATE2, asked.host, 7, PAGE, 1)
        offer = driver.packet()
        handle = (offer.word & 0xFFFFFFFF, offer.word >> 32)
        assert driver.alloc(handle, PAGE, PAGE + 1, driver.pages(5), flags=1) == -31
        driver.tell(ATTACH, asked.host, 7, offer.word)
        assert driver.packet() == Packet(RST, asked.host, 7)
        assert client.recv(1) == b""
        assert driver.alloc(handle, PAGE, PAGE, driver.pages(4), flags=1) == -21


def test_offer_of_what_is_no_queue_pair_of_that_size(fast: Driver, listener: socket.socket) -> None:
    fast.alloc((fast.context, 1), PAGE, 2 * PAGE, fast.pages(5))
    for word in (0, 1 << 63, fast.context | 1 << 32):
        fast.tell(REQUEST2, PORT, 5, PAGE, 1)
        assert fast.packet().kind == NEGOTIATE2
        with accepted(listener) as client:
            fast.tell(OFFER, PORT, 5, word)
            assert fast.packet() == Packet(RST, PORT, 5)
            assert client.recv(1) == b""
    # No pair has two connections.
    stream = fast.connect(PORT, 6, PAGE)
    accepted(listener).close()
    fast.tell(REQUEST2, PORT, 7, PAGE, 1)
    assert fast.packet(SHUTDOWN).kind == NEGOTIATE2
    fast.tell(OFFER, PORT, 7, stream.word)
    assert fast.packet(SHUTDOWN) == Packet(RST, PORT, 7)


def test_port_is_used_again_before_the_guest_has_detached(
    fast: Driver, listener: socket.socket
) -> None:
    stream = fast.connect(PORT, 5, PAGE)
    with accepted(listener) as client:
        stream.write(b"old")
        stream.handle = (fast.context, 1)  # a name for the next one
        old = (fast.context, 5005)
        fast.tell(REQUEST2, PORT, 5, PAGE, 1)
        assert fast.packet() == Packet(NEGOTIATE2, PORT, 5, PAGE, 1)
        assert rest(client) == b"old"
        assert fast.events.popleft() == (4, 0, *old, 2, 0)
        with accepted(listener) as again:
            assert fast.detach(old) == 3
            new = Stream(fast, PORT, 5, stream.handle, PAGE, old=False)
            assert new.alloc(0) == 4
            fast.tell(OFFER, PORT, 5, new.word)
            assert fast.packet() == Packet(ATTACH, PORT, 5, new.word)
            new.write(b"new")
            assert again.recv(10) == b"new"


def test_guest_that_takes_nothing_is_not_heard(fast: Driver, tmp_path: Path) -> None:
    refused = 0
    end = time.monotonic() + LIMIT_S
    while refused < 100 and time.monotonic() < end:
        refused += fast.tell(WROTE, 1, 2) == -19
    assert refused == 100
    while fast.tell(WROTE, 1, 2) == -19:
        fast.fetch()
    fast.packets.clear()
    with program(tmp_path, 7, b"hello"):
        while (asked := fast.packet(RST)).kind != REQUEST2:
            pass
        fast.packets.appendleft(asked)
        assert fast.accept().read_all(5) == b"hello"


@pytest.mark.parametrize("how", ["driver", "machine", "bus"])
def test_resets_end_all_connections(fast: Driver, listener: socket.socket, how: str) -> None:
    stream = fast.connect(PORT, 5, PAGE)
    with accepted(listener) as client:
        if how == "bus":  # which is none, but nothing moves without it
            fast.device.function.write_config(COMMAND, 2, 0)
            client.sendall(b"later")
            time.sleep(0.1)
            assert stream.ready() == 0
            fast.device.function.write_config(COMMAND, 2, BUS_MASTER)
            assert stream.read_all(5) == b"later"
            return
        if how == "driver":
            fast.write(CONTROL, RESET)
        else:
            fast.device.reset()
            fast.device.function.write_config(COMMAND, 2, BUS_MASTER)
        assert client.recv(1) == b""
        fast.start()
        assert stream.close() == -21
        assert fast.connect(PORT, 5, PAGE).write(b"x") == 1
        with accepted(listener) as again:
            assert again.recv(1) == b"x"


def test_saved_device_has_no_connections(tmp_path: Path, listener: socket.socket) -> None:
    driver = Driver(sockets=tmp_path / "vsock", transfers=True)
    driver.start()
    stream = driver.connect(PORT, 5, PAGE)
    with accepted(listener) as client:
        state = driver.device.save()
        stream.write(b"goes on")
        assert client.recv(10) == b"goes on"
        driver.device.close()
        assert client.recv(1) == b""
    other = Driver(sockets=tmp_path / "vsock", transfers=True)
    other.context = driver.context
    other.device.load(state)
    other.fetch()
    assert other.events.popleft() == (2, 0, other.context, 0)
    assert other.detach(stream.handle) == 3
    assert other.connect(PORT, 5, PAGE).close() == 0
    other.device.close()


def test_saved_device_goes_on_in_the_middle_of_a_page(tmp_path: Path) -> None:
    driver = Driver(sockets=tmp_path / "vsock")
    driver.start()
    driver.tell(REQUEST2, 81, 1, PAGE, 1)
    end = time.monotonic() + LIMIT_S
    while not driver.wire.is_high():
        assert time.monotonic() < end
    data = bytes(driver.ports.read(DATA_IN, 1) for _ in range(30))
    state = driver.device.save()
    driver.device.close()
    other = Driver(sockets=tmp_path / "vsock")
    other.context = driver.context
    other.device.load(state)
    other._take(data + bytes(other.ports.read(DATA_IN, 1) for _ in range(PAGE - 30)))
    assert other.packets.popleft() == Packet(RST, 81, 1)
    other.device.close()


def test_socket_is_removed_with_its_machine_and_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    driver = Driver(sockets=path)
    with pytest.raises(HostError, match="another program listens"):
        Driver(sockets=path)
    driver.device.close()
    assert not path.exists()
