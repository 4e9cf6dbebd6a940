"""What a guest says whose agent is not ours."""

from __future__ import annotations

import io
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tetrarch.agent import AgentError, AgentStream
from tetrarch.agent.capture import run_captured, run_streamed
from tetrarch.agent.client import ERROR, EXIT, OUTPUT
from tetrarch.agent.copy import copy_in, copy_out
from tetrarch.cli.failure import report_error
from tetrarch.errors import HostError


def frame(kind: bytes, body: bytes) -> bytes:
    return struct.pack("<cI", kind, len(body)) + body


@contextmanager
def agent(*said: bytes) -> Iterator[Callable[[], AgentStream]]:
    """Makes connections with one that says this to any command, and hangs up."""
    threads: list[threading.Thread] = []

    def serve(theirs: socket.socket) -> None:
        with theirs, suppress(OSError):
            theirs.recv(1 << 16)
            for data in said:
                theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            while theirs.recv(1 << 16):
                pass

    def connect() -> AgentStream:
        ours, theirs = socket.socketpair()
        threads.append(threading.Thread(target=serve, args=(theirs,)))
        threads[-1].start()
        return AgentStream(ours)

    yield connect
    for thread in threads:
        thread.join()


def test_frame_of_any_length_is_not_waited_for() -> None:
    with (
        agent(struct.pack("<cI", OUTPUT, 0xFFFF_FFFF)) as connect,
        connect() as stream,
        pytest.raises(AgentError, match="sends nonsense"),
    ):
        run_captured(stream, ["true"])


def test_what_is_no_archive_is_said_by_what_tar_says_or_else_as_it_is(tmp_path: Path) -> None:
    no_tar = [frame(ERROR, b"sh: no tar here\n"), frame(EXIT, struct.pack("<I", 127))]
    with agent(*no_tar) as connect, pytest.raises(HostError, match="cannot copy: sh: no tar here"):
        copy_out(connect, "/x", tmp_path / "x")
    noise = [frame(OUTPUT, b"noise" * 999), frame(EXIT, bytes(4))]
    with agent(*noise) as connect, pytest.raises(HostError, match="no archive that can be read"):
        copy_out(connect, "/x", tmp_path / "x")
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    long = [frame(OUTPUT, header.tobuf(tarfile.GNU_FORMAT)), frame(EXIT, bytes(4))]
    with agent(*long) as connect, pytest.raises(HostError, match="a header has 1099511627776"):
        copy_out(connect, "/x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_archive_without_an_end_is_told_when_the_agent_goes(tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        member = tarfile.TarInfo("x")
        member.size = 1 << 20
        tar.addfile(member, io.BytesIO(bytes(1 << 20)))
    with (
        agent(frame(OUTPUT, data.getvalue()[: 1 << 19])) as connect,
        pytest.raises(AgentError, match="the guest has ended"),
    ):
        copy_out(connect, "/x", tmp_path / "x")


def test_command_that_ends_before_its_input_does(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "file").write_bytes(bytes(4 << 20))
    with (
        agent(frame(ERROR, b"full"), frame(EXIT, struct.pack("<I", 1))) as connect,
        pytest.raises(HostError, match="the guest cannot copy: full"),
    ):
        copy_in(connect, tmp_path / "file", "/x")

    def source() -> Iterator[bytes]:
        yield b"x"
        raise ValueError("of the source")

    # The thread that sends has nobody to tell that the guest is gone too.
    with agent() as connect, connect() as stream, pytest.raises(AgentError):
        run_streamed(stream, ["true"], source())
    assert [str(warning.message) for warning in recwarn] == []


def test_words_of_a_guest_do_not_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [frame(ERROR, b"\x1b]0;title\x07\x9b2J no such file"), frame(EXIT, b"\1\0\0\0")]
    with agent(*said) as connect, pytest.raises(HostError) as caught:
        copy_out(connect, "/x", tmp_path / "x")
    assert report_error(caught.value) == 1
    line = capsys.readouterr().err
    assert line.startswith("tetrarch: the guest cannot copy: \\x1b]0;title\\x07")
    assert line[:-1].isprintable()
