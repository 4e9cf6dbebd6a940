"""Our own client of the control socket, which the command line uses."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.control.conftest import Make
from tests.machine import guests

from tetrarch import HostError
from tetrarch.control import Client, ControlError

LIMIT_S = 30


def test_client_executes_commands_and_keeps_events(make: Make, socket_path: Path) -> None:
    vm = make()
    vm.start()
    with Client(socket_path) as client:
        assert client.greeting["version"]["package"].startswith("tetrarch")
        client.execute("stop")
        client.execute("cont", timeout=LIMIT_S)
        assert client.execute("query-status") == {"status": "running", "running": True}
        assert client.next_event("RESUME", timeout=LIMIT_S)["event"] == "RESUME"
        with pytest.raises(TimeoutError):
            client.next_event(timeout=0.01)
        with pytest.raises(ControlError, match="fly has not been found") as raised:
            client.execute("fly")
        assert raised.value.error_class == "CommandNotFound"


def test_client_sees_the_end_of_the_machine(make: Make, socket_path: Path) -> None:
    vm = make(guests.POWER_OFF)
    with Client(socket_path) as client:
        vm.start()
        assert client.next_event("SHUTDOWN", timeout=LIMIT_S)["data"]["guest"] is True
        with pytest.raises(HostError, match="has hung up"):
            client.next_event(timeout=LIMIT_S)
        with pytest.raises(HostError, match="has hung up"):
            client.execute("query-status", timeout=LIMIT_S)


def test_place_without_a_machine_is_one_line(socket_path: Path) -> None:
    with pytest.raises(HostError, match=r"no machine answers at .*No such file"):
        Client(socket_path)


@pytest.mark.parametrize(
    "answer", [b"", b"hello\n", b"[1]\n", b'{"QMP": {}}\n', b"\xff" * 100 + b"\n"]
)
def test_whatever_answers_there_is_no_traceback(socket_path: Path, answer: bytes) -> None:
    with (
        serving(socket_path, lambda connection: connection.sendall(answer)),
        pytest.raises(HostError, match="no machine answers at"),
    ):
        Client(socket_path)


class serving:  # noqa: N801  # used as a function
    """One client of a socket is served by ``talk``."""

    def __init__(self, path: Path, talk: Callable[[socket.socket], None]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._talk = talk
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            self._talk(connection)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._socket.close()
