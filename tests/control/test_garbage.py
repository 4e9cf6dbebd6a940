"""Whatever a client sends: an answer of the protocol, or a closed connection."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.control.conftest import Make

from tetrarch import HostError
from tetrarch.control import Client
from tetrarch.control.json_stream import JsonStream, NotJson, TooLarge

LIMIT_S = 30
MIB = 1 << 20
NEGOTIATE = b'{"execute": "qmp_capabilities"}'


class Wire:
    """A client that sends bytes and reads lines."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT_S)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        assert "QMP" in self.read()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def finish(self) -> None:
        """Says that no more is to come."""
        self._socket.shutdown(socket.SHUT_WR)

    def read(self) -> Any:
        """The next message; None once the other side has hung up."""
        line = self._file.readline()
        assert not line or (line.endswith(b"\r\n") and line.isascii())
        return json.loads(line) if line else None

    def ask(self, data: bytes) -> Any:
        self.send(data)
        return self.read()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def wire(make: Make, socket_path: Path) -> Iterator[Wire]:
    make()
    wire = Wire(socket_path)
    yield wire
    wire.close()


@pytest.fixture
def ready(wire: Wire) -> Wire:
    assert wire.ask(NEGOTIATE) == {"return": {}}
    return wire


def description(answer: Any) -> str:
    assert answer["error"]["class"] in ("GenericError", "CommandNotFound")
    text: str = answer["error"]["desc"]
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b'{"execute": }', "JSON parse error"),
        (b"{]", "JSON parse error"),
        (b"hello\n", "JSON parse error"),
        (b"}\n", "JSON parse error"),
        (b"\xff", "JSON parse error, invalid byte 0xff"),
        (b'{"execute": "st\x01', "JSON parse error, invalid byte 0x01"),
        (b'{"execute": "st\xc3("}', "JSON parse error"),
        (b'{"id": NaN}', "JSON parse error"),
        (b'{"id": ' + b"9" * 5000 + b"}", "JSON parse error"),
        (b"[1]", "must be a JSON object"),
        (b"{}", "lacks member 'execute'"),
        (b'{"execute": 7}', "'execute' must be string"),
        (b'{"execute": "stop", "arguments": []}', "'arguments' must be object"),
        (b'{"execute": "stop", "now": 1}', "'now' is unexpected"),
        (b'{"exec-oob": "stop"}', "execute"),
    ],
)
def test_what_is_no_command_is_told_so(ready: Wire, sent: bytes, words: str) -> None:
    assert words in description(ready.ask(sent))
    assert ready.ask(b'{"execute": "query-name", "id": 1}')["id"] == 1, "the session goes on"


def test_commands_wait_for_negotiation(wire: Wire) -> None:
    assert "negotiation" in description(wire.ask(b'{"execute": "query-status"}'))
    assert "'speed' is unexpected" in description(
        wire.ask(b'{"execute": "qmp_capabilities", "arguments": {"speed": 1}}')
    )
    assert "not offered" in description(
        wire.ask(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
    )
    assert wire.ask(NEGOTIATE) == {"return": {}}


@pytest.mark.parametrize("tag", [b"null", b"7", b'"a"', b'{"a": [1]}', b'"\\ud800"'])
def test_id_of_a_command_comes_back(ready: Wire, tag: bytes) -> None:
    for name in (b"query-name", b"fly"):
        answer = ready.ask(b'{"execute": "%s", "id": %s}' % (name, tag))
        assert answer["id"] == json.loads(tag)
    assert "id" not in ready.ask(b'{"execute": "query-name"}')


def test_commands_come_in_any_pieces(ready: Wire) -> None:
    text = b'{"execute": "query-name", "id": "}\\"{"}'
    for byte in text * 3:
        ready.send(bytes([byte]))
    assert [ready.read()["id"] for _ in range(3)] == ['}"{'] * 3


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a":' * 1000, b'{"' + b"a" * (2 << 20), b"[" + b" " * (2 << 20)],
    ids=["arrays", "objects", "string", "spaces"],
)
def test_text_that_is_too_large_ends_the_connection(ready: Wire, data: bytes) -> None:
    try:
        ready.send(data)
        assert "JSON parse error" in description(ready.read())
    except ConnectionError:  # it has hung up already
        return
    with contextlib.suppress(ConnectionError):
        assert ready.read() is None


def test_line_without_end_that_is_no_json_costs_nothing(ready: Wire) -> None:
    # The peak counts from here (proc(5), /proc/pid/clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    ready.send(b"x")
    assert "JSON parse error" in description(ready.read())
    line = b"x" * MIB
    for _ in range(100):
        ready.send(line)
    ready.send(b"\n")
    assert ready.ask(b'{"execute": "query-name", "id": 1}')["id"] == 1
    assert peak_kib() - before < 32 << 10


def peak_kib() -> int:
    """The most memory that this process has had at once."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_clients_beyond_what_there_can_be_are_hung_up_on(wire: Wire, socket_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        others = []
        for _ in range(200):
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.connect(str(socket_path))
            other.settimeout(LIMIT_S)
            others.append(other)
        heard = [other.makefile("rb").readline() for other in others]
        assert sum(b'"QMP"' in line for line in heard) == 63
        refused = [json.loads(line)["error"]["desc"] for line in heard if b'"QMP"' not in line]
        assert set(refused) == {"the machine has 64 clients already"}
        with pytest.raises(HostError, match="has 64 clients already"):
            Client(socket_path)
        assert wire.ask(NEGOTIATE) == {"return": {}}
        for other in others:
            other.close()
        # Their places are free when the machine has seen that they went.
        deadline = time.monotonic() + LIMIT_S
        while True:
            late = stack.enter_context(socket.socket(socket.AF_UNIX))
            late.connect(str(socket_path))
            if b'"QMP"' in late.makefile("rb").readline():
                break
            assert time.monotonic() < deadline


@pytest.mark.parametrize("name", ["control-send", "control-client"])
def test_client_that_the_host_has_no_thread_for_is_hung_up_on(
    wire: Wire, socket_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as refused:
        patch.setattr(threading.Thread, "start", refuse)
        refused.settimeout(LIMIT_S)
        refused.connect(str(socket_path))
        with refused.makefile("rb") as file:
            said = file.read()
        assert said == b"" or "can't start new thread" in description(json.loads(said))
    assert wire.ask(NEGOTIATE) == {"return": {}}
    other = Wire(socket_path)
    assert other.ask(NEGOTIATE) == {"return": {}}
    other.close()


def test_half_a_command_is_nothing(ready: Wire) -> None:
    ready.send(b'{"execute": "quit"')
    ready.finish()
    assert ready.read() is None


def test_client_that_reads_nothing_is_held_back(ready: Wire, socket_path: Path) -> None:
    # It would fill the host's memory with answers.
    ready._socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        ready.send(b'{"execute": "query-commands"}' * 1_000_000)
    other = Wire(socket_path)
    assert other.ask(NEGOTIATE) == {"return": {}}
    other.close()


# Pieces of which a stream is made: what is nearly a command more often than noise.
PIECES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [
            b'{"execute": "query-name"}',
            b'{"execute": ',
            b'"',
            b"\\",
            b"{",
            b"}",
            b"[",
            b"]",
            b"\xff",
        ]
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces=st.lists(PIECES, max_size=10))
def test_any_stream_is_answered_or_ended(ready: Wire, pieces: list[bytes]) -> None:
    ready.send(b"".join(pieces) + b"\x01" + b'\n{"execute": "query-name", "id": "last"}')
    for _ in range(200):
        answer = ready.read()
        if answer.get("id") == "last":
            assert "name" in answer["return"]
            return
        assert "return" in answer or description(answer)
    raise AssertionError("more answers than there were bytes")


@given(pieces=st.lists(PIECES, max_size=10), cut=st.integers(1, 7))
def test_stream_gives_the_same_in_any_pieces(pieces: list[bytes], cut: int) -> None:
    stream = b" ".join(pieces)
    assert texts([stream]) == texts([stream[at : at + cut] for at in range(0, len(stream), cut)])


def texts(pieces: list[bytes]) -> list[bytes]:
    stream, found = JsonStream(), []
    try:
        for piece in pieces:
            found += [
                str(text).encode() if isinstance(text, NotJson) else text
                for text in stream.feed(piece)
            ]
    except TooLarge:
        found.append(b"too large")
    return found
