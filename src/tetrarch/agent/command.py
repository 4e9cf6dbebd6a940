"""One command in a guest, with the streams of this process: what container users expect."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import BinaryIO, Self

from tetrarch._readiness import readable
from tetrarch.agent.client import (
    ERROR,
    EXIT,
    OUTPUT,
    RUN,
    SIGNAL,
    WINDOW,
    AgentError,
    AgentStream,
    encode_run,
    encode_window,
)
from tetrarch.errors import HostError

__all__ = ["run_here", "run_quietly", "window"]

#: Signals of ours that are the command's.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

#: What of our environment a command on a terminal needs.
_ENVIRONMENT = ("TERM", "LANG", "COLORTERM")

_INPUT = 0
_CHUNK = 64 << 10
#: So many signals may be under way; one more says that the guest is to be stopped.
_PATIENCE = 2
#: On a terminal: a guest hangs that has not taken what was typed for so long, and so many Ctrl-C
#: after that are asked for before it is stopped.
_STALLED_S = 3.0
_INTERRUPT = b"\x03"
_INTERRUPTS = 3
_END_S = 5
_LOOK_S = 0.2


def run_here(
    stream: AgentStream,
    arguments: Sequence[str],
    *,
    environment: Sequence[str] = (),
    directory: str = "",
) -> int:
    """Runs a command with our input, output, error output, terminal and signals; its exit code.

    A terminal is given to it where ours has both input and output on one. To be called on the
    main thread. Raises AgentError where the guest goes, or takes no signals.
    """
    terminal = window() if sys.stdin.isatty() and sys.stdout.isatty() else None
    kept = [f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    body = encode_run(
        arguments,
        environment=[*(kept if terminal else ()), *environment],
        directory=directory,
        terminal=terminal,
    )
    on_terminal = terminal is not None
    with (
        _Feeder(stream, on_terminal) as feeder,
        _terminal(on_terminal),
        _signals(feeder, on_terminal),
    ):
        stream.send(RUN, body)
        feeder.start()
        return _follow(stream)


def run_quietly(stream: AgentStream, arguments: Sequence[str]) -> int:
    """Runs a command without any of ours; its exit code."""
    stream.send(RUN, encode_run(arguments))
    while True:
        kind, data = stream.read()
        if kind == EXIT:
            return int.from_bytes(data[:4], "little")


def _follow(stream: AgentStream) -> int:
    outputs = {OUTPUT: sys.stdout.buffer, ERROR: sys.stderr.buffer}
    while True:
        # A signal that comes just before a wait does not end it: so none is long.
        while not stream.ready(_LOOK_S):
            pass
        kind, data = stream.read()
        if kind == EXIT:
            return int.from_bytes(data[:4], "little")
        output = outputs.get(kind)
        if output is not None:
            _pass_on(output, data)


def _pass_on(output: BinaryIO, data: bytes) -> None:
    try:
        output.write(data)
        output.flush()
    except BrokenPipeError:  # who read it has gone
        raise
    except OSError as error:
        raise HostError(
            f"the command's output cannot be written: {error.strerror}",
            "open it to a file with room",
        ) from error


class _Feeder:
    """Our input, and our signals and the terminal's size, on their way to the command.

    A thread of its own sends them, so that neither a signal handler nor who reads the output waits
    for what does not move: a command that reads nothing, or a guest that hangs.
    """

    def __init__(self, stream: AgentStream, terminal: bool = False) -> None:
        self._stream = stream
        self._terminal = terminal
        self._interrupts = 0
        # Its put may interrupt itself: handlers of signals use it.
        self._wanted: SimpleQueue[tuple[bytes, bytes]] = SimpleQueue()
        self._done = False
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        stream.on_room = self._ring

    def signal(self, number: int) -> None:
        """For signal handlers. Raises AgentError where the guest has not taken those before."""
        if self._interrupts >= _INTERRUPTS:
            raise AgentError(
                f"the guest has taken nothing for {_STALLED_S:g} s, and is left",
                "see what it says on its console",
            )
        if self._signals - self._stream.signalled >= _PATIENCE:
            raise AgentError(
                f"the guest has not taken {_PATIENCE} signals, and is stopped",
                "see what it says on its console",
            )
        self._signals += 1
        self._wanted.put((SIGNAL, bytes([number])))
        self._ring()

    def resize(self) -> None:
        rows, columns = window()
        self._wanted.put((WINDOW, encode_window(rows, columns)))
        self._ring()

    def start(self) -> None:
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._done = True
        self._ring()
        if self._thread.ident is not None:
            self._thread.join(_END_S)
        # One that a guest keeps in a write still has the pipe: it ends with the process.
        if not self._thread.is_alive():
            self._stream.on_room = lambda: None
            os.close(self._wake)
            os.close(self._waker)

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it is full of rings
            os.write(self._waker, b"x")

    def _run(self) -> None:
        reading = True
        try:
            while not self._done:
                if self._wait(reading):
                    data = _read_input(min(self._stream.room, _CHUNK))
                    if self._terminal:
                        self._count_interrupts(data)
                    self._stream.send_input(data)
                    reading = bool(data)
                with suppress(Empty):
                    while True:
                        self._stream.send(*self._wanted.get_nowait())
        except OSError:  # the guest is gone: the reader sees it
            return

    def _count_interrupts(self, data: bytes) -> None:
        """A raw terminal makes no signals: the way out of a guest that hangs."""
        if self._stream.stalled < _STALLED_S:
            self._interrupts = 0
            return
        self._interrupts += data.count(_INTERRUPT)
        if self._interrupts >= _INTERRUPTS:
            os.kill(os.getpid(), signal.SIGINT)

    def _wait(self, reading: bool) -> bool:
        """Until there is something to do; true if it is input, which the command has room for."""
        own = [_INPUT] if reading and self._stream.room else []
        ready = readable(self._wake, *own)
        if self._wake in ready:
            with suppress(BlockingIOError):
                os.read(self._wake, 4096)
        return _INPUT in ready


def _read_input(length: int) -> bytes:
    try:
        return os.read(_INPUT, length)
    except OSError:
        return b""


def window() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    try:
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return 24, 80
    rows, columns = struct.unpack_from("<HH", size)
    return rows or 24, columns or 80


@contextmanager
def _terminal(raw: bool) -> Iterator[None]:
    """Each key is the command's while it runs."""
    if not raw:
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextmanager
def _signals(feeder: _Feeder, terminal: bool) -> Iterator[None]:
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = dict.fromkeys(
        _FORWARDED, lambda number, _: feeder.signal(number)
    )
    if terminal:
        handlers[signal.SIGWINCH] = lambda number, _: feeder.resize()
    # What our parent has us ignore, as nohup does, is not the command's either.
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
