"""The host's end of a command, against an agent that a test plays."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tetrarch.agent import AgentError, AgentStream
from tetrarch.agent.client import (
    EXIT,
    HELLO,
    INPUT,
    INPUT_WINDOW,
    OUTPUT,
    RUN,
    SIGNAL,
    SIGNALLED,
    TAKEN,
    VERSION,
)
from tetrarch.agent.command import run_here

LIMIT_S = 60
HEAD = struct.Struct("<cI")


class Agent:
    """The guest's end."""

    def __init__(self, stream: socket.socket) -> None:
        stream.settimeout(LIMIT_S)
        self._stream = stream

    def send(self, kind: bytes, body: bytes = b"") -> None:
        self._stream.sendall(HEAD.pack(kind, len(body)) + body)

    def read(self) -> tuple[bytes, bytes]:
        kind, length = HEAD.unpack(self._read(HEAD.size))
        return kind, self._read(length)

    def exit(self, code: int) -> None:
        self.send(EXIT, code.to_bytes(4, "little"))

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._stream.recv(length - len(data))
            assert more, "the host has hung up"
            data += more
        return data


@contextmanager
def playing(play: Callable[[Agent], None]) -> Iterator[AgentStream]:
    """A stream to an agent that a function plays on a thread; it must come to its end."""
    ours, theirs = socket.socketpair()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            play(Agent(theirs))
        except BaseException as error:
            failures.append(error)
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    with theirs:
        try:
            with AgentStream(ours) as stream:
                yield stream
        finally:
            thread.join(LIMIT_S)
    assert (failures, thread.is_alive()) == ([], False)


@contextmanager
def standard_input(data: bytes | None) -> Iterator[None]:
    """Descriptor 0 with these bytes and then its end; None: an endless one."""
    before = os.dup(0)
    read, write = os.pipe()
    if data is None:
        zero = os.open("/dev/zero", os.O_RDONLY)
        os.dup2(zero, 0)
        os.close(zero)
    else:
        os.write(write, data)
        os.dup2(read, 0)
    os.close(write)
    try:
        yield
    finally:
        os.dup2(before, 0)
        for descriptor in (before, read):
            os.close(descriptor)


def test_no_more_input_is_sent_than_the_agent_has_room_for() -> None:
    taken = 1000

    def play(agent: Agent) -> None:
        assert agent.read()[0] == RUN
        assert input_of(agent, INPUT_WINDOW)
        agent.send(TAKEN, taken.to_bytes(4, "little"))
        assert input_of(agent, taken)
        # What follows is no input: of that there would be more, had it been sent.
        os.kill(os.getpid(), signal.SIGUSR1)
        assert agent.read() == (SIGNAL, bytes([signal.SIGUSR1]))
        agent.exit(3)

    def input_of(agent: Agent, length: int) -> bool:
        while length > 0:
            kind, data = agent.read()
            assert kind == INPUT
            length -= len(data)
        return length == 0

    with standard_input(None), playing(play) as stream:
        assert run_here(stream, ["x"]) == 3


def test_input_and_its_end_are_the_commands(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    def play(agent: Agent) -> None:
        assert agent.read()[0] == RUN
        assert agent.read() == (INPUT, b"line\n")
        assert agent.read() == (INPUT, b"")
        agent.send(OUTPUT, b"done\n")
        agent.exit(0)

    with standard_input(b"line\n"), playing(play) as stream:
        assert run_here(stream, ["x"]) == 0
    assert capfdbinary.readouterr().out == b"done\n"


def test_guest_that_takes_no_signals_is_given_up() -> None:
    def play(agent: Agent) -> None:
        assert agent.read()[0] == RUN
        assert agent.read() == (INPUT, b"")
        for acknowledged in (True, False, False):
            os.kill(os.getpid(), signal.SIGINT)
            assert agent.read() == (SIGNAL, bytes([signal.SIGINT]))
            if acknowledged:
                agent.send(SIGNALLED)
                while not stream.signalled:
                    time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    refused = pytest.raises(AgentError, match="has not taken 2 signals")
    with standard_input(b""), playing(play) as stream, refused:
        run_here(stream, ["x"])


def test_signal_that_is_ignored_here_is_not_the_commands() -> None:
    def play(agent: Agent) -> None:
        assert agent.read()[0] == RUN
        assert agent.read() == (INPUT, b"")
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert agent.read() == (SIGNAL, bytes([signal.SIGTERM]))
        agent.exit(0)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with standard_input(b""), playing(play) as stream:
            assert run_here(stream, ["x"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_agent_of_another_version_is_told() -> None:
    def play(agent: Agent) -> None:
        agent.send(HELLO, (VERSION + 1).to_bytes(4, "little"))

    with playing(play) as stream, pytest.raises(AgentError, match="of another version"):
        stream.greet()
