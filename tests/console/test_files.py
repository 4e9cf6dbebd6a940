"""The console on a Unix socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tetrarch.console.files import SocketConsole

LIMIT_S = 30


@pytest.fixture
def console(tmp_path: Path) -> Iterator[SocketConsole]:
    made = SocketConsole(tmp_path / "console")
    made.start(lambda data: made.write(b"<" + data + b">"), lambda: None)
    yield made
    made.close()


def connect(tmp_path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT_S)
    client.connect(str(tmp_path / "console"))
    return client


def receive(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = client.recv(length - len(data))
        if not part:
            break
        data += part
    return data


def test_client_gets_what_it_missed_and_types(console: SocketConsole, tmp_path: Path) -> None:
    console.write(b"early ")
    with connect(tmp_path) as client:
        assert receive(client, 6) == b"early "
        client.sendall(b"x")
        assert receive(client, 3) == b"<x>"


def test_second_client_is_told_and_the_next_one_is_served(
    console: SocketConsole, tmp_path: Path
) -> None:
    console.write(b"ready")
    with connect(tmp_path) as first:
        assert receive(first, 5) == b"ready"
        with connect(tmp_path) as second:
            assert receive(second, 1000) == b"tetrarch: the console has a client already\r\n"
        first.sendall(b"x")
        assert receive(first, 3) == b"<x>"
        for thread in threading.enumerate():
            if thread.name == "console-client":
                attended = thread
    attended.join(LIMIT_S)
    with connect(tmp_path) as third:
        assert receive(third, 8) == b"ready<x>"
