"""A console that several clients share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tetrarch.console import ConsoleError, MemoryConsole
from tetrarch.console.shared import SharedConsole

LIMIT_S = 30


class Typed:
    """What the guest was given."""

    def __init__(self) -> None:
        self.data = b""
        self._changed = threading.Condition()
        self.reads = threading.Event()
        self.reads.set()

    def receive(self, data: bytes) -> None:
        assert self.reads.wait(LIMIT_S)
        with self._changed:
            self.data += data
            self._changed.notify_all()

    def wait_for(self, length: int) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.data) >= length, LIMIT_S)
            return self.data


@pytest.fixture
def typed() -> Typed:
    return Typed()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console"


@pytest.fixture
def console(path: Path, typed: Typed) -> Iterator[SharedConsole]:
    console = SharedConsole(path)
    console.start(typed.receive, lambda: None)
    yield console
    console.close()


def join(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT_S)
    client.connect(str(path))
    return client


def read(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = client.recv(length - len(data))
        assert more, f"hung up after {data!r}"
        data += more
    return data


def rest(client: socket.socket) -> bytes:
    data = b""
    while more := client.recv(1 << 16):
        data += more
    return data


def fill(client: socket.socket) -> int:
    """Sends as much as there is room for."""
    sent = 0
    try:
        while True:
            sent += client.send(bytes(1 << 16))
    except BlockingIOError:
        return sent


def test_all_clients_see_what_was_and_what_comes(console: SharedConsole, path: Path) -> None:
    console.write(b"before ")
    with join(path) as first, join(path) as second:
        assert read(first, 7) == read(second, 7) == b"before "
        console.write(b"after")
        assert read(first, 5) == read(second, 5) == b"after"
    with join(path) as late:
        assert read(late, 12) == b"before after"


def test_all_clients_type(console: SharedConsole, path: Path, typed: Typed) -> None:
    with join(path) as first, join(path) as second:
        first.sendall(b"one")
        assert typed.wait_for(3) == b"one"
        second.sendall(b"two")
        assert typed.wait_for(6) == b"onetwo"


def test_client_that_reads_nothing_hurts_nobody(console: SharedConsole, path: Path) -> None:
    data = bytes(range(32, 127)) * 700
    with join(path) as slow, join(path) as quick:
        console.write(b"x")
        assert read(quick, 1) == read(slow, 1) == b"x"
        for _ in range(100):  # 6 MB: more than is kept, and than sockets hold
            console.write(data)
            assert read(quick, len(data)) == data
        # It finds a hole, and behind it the end of what there was.
        slow.shutdown(socket.SHUT_WR)
        late = rest(slow)
        assert b"bytes are missing here" in late
        assert late.endswith(data)
        assert len(late) < 50 * len(data)


def test_client_that_types_to_a_guest_that_does_not_read_hurts_nobody(
    console: SharedConsole, path: Path, typed: Typed
) -> None:
    typed.reads.clear()
    with join(path) as writer, join(path) as watcher:
        writer.setblocking(False)
        sent = fill(writer)
        console.write(b"still here")
        assert read(watcher, 10) == b"still here"
        typed.reads.set()
        assert typed.wait_for(sent) == bytes(sent)


def test_client_that_goes_leaves_the_others(console: SharedConsole, path: Path) -> None:
    with join(path) as stays:
        for _ in range(5):
            join(path).close()
        console.write(b"on")
        assert read(stays, 2) == b"on"


def test_client_that_types_no_more_gets_what_there_is(console: SharedConsole, path: Path) -> None:
    console.write(b"so far" * 100_000)
    with join(path) as client:
        client.shutdown(socket.SHUT_WR)
        assert rest(client) == b"so far" * 100_000


def test_questions_to_a_terminal_are_not_asked_again(console: SharedConsole, path: Path) -> None:
    past = b"\x1b[6nab\x1b[c\x1b[31mred\x1b]11;?\x07\x1b[0m"
    console.write(past)
    with join(path) as late:
        assert read(late, 14) == b"ab\x1b[31mred\x1b[0m"
        console.write(past)
        assert read(late, len(past)) == past


def test_last_words_reach_the_clients(path: Path, typed: Typed) -> None:
    console = SharedConsole(path)
    console.start(typed.receive, lambda: None)
    with join(path) as client:
        console.write(b"x")
        read(client, 1)
        console.write(b"the end")
        console.close()
        assert rest(client) == b"the end"
    assert not path.exists()
    console.close()


def test_so_many_clients_and_no_more(console: SharedConsole, path: Path) -> None:
    clients = []
    for _ in range(64):
        clients.append(join(path))
        console.write(b".")  # it is attended to
        read(clients[-1], 1)
    with join(path) as one_more:
        assert rest(one_more) == b"tetrarch: the console has too many clients\r\n"
    for client in clients:
        client.close()


def test_other_end_in_the_process_comes_first(path: Path, typed: Typed) -> None:
    memory = MemoryConsole()
    console = SharedConsole(path, memory)
    console.start(typed.receive, lambda: None)
    with join(path) as client:
        console.write(b"both")
        assert memory.text == "both"
        assert read(client, 4) == b"both"
        memory.send("a")
        assert typed.wait_for(1) == b"a"
        client.sendall(b"b")
        assert typed.wait_for(2) == b"ab"
    console.close()


def test_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConsoleError, match="cannot listen on the console socket"):
        SharedConsole(tmp_path / "no" / "such")


def test_one_that_was_never_started_leaves_nothing(path: Path) -> None:
    SharedConsole(path).close()
    assert not path.exists()
