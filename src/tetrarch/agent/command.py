"""One command in a guest, with the streams of this process: what container users expect."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from tetrarch.agent.client import ERROR, EXIT, OUTPUT, RUN, AgentStream, encode_run

__all__ = ["run_here", "run_quietly", "window"]

#: Signals of ours that are the command's.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

#: What of our environment a command on a terminal needs.
_ENVIRONMENT = ("TERM", "LANG", "COLORTERM")


def run_here(stream: AgentStream, arguments: Sequence[str]) -> int:
    """Runs a command with our input, output, error output, terminal and signals; its exit code.

    A terminal is given to it where ours has both input and output on one. To be called on the
    main thread. Raises AgentError where the guest goes.
    """
    terminal = window() if sys.stdin.isatty() and sys.stdout.isatty() else None
    kept = [f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    body = encode_run(arguments, environment=kept if terminal else (), terminal=terminal)
    stream.send(RUN, body)
    done = threading.Event()
    wake, waker = os.pipe()
    feeder = threading.Thread(target=_feed, args=(stream, wake, done), daemon=True)
    with _terminal(terminal is not None), _signals(stream, terminal is not None):
        feeder.start()
        try:
            return _follow(stream)
        finally:
            done.set()
            os.write(waker, b"x")
            feeder.join(5)
            os.close(wake)
            os.close(waker)


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
        kind, data = stream.read()
        if kind == EXIT:
            return int.from_bytes(data[:4], "little")
        output = outputs.get(kind)
        if output is not None:
            output.write(data)
            output.flush()


def _feed(stream: AgentStream, wake: int, done: threading.Event) -> None:
    """Our input goes to the command until its end, or the command's."""
    own = 0
    while not done.is_set():
        try:
            ready, _, _ = select.select([own, wake], [], [])
        except (OSError, ValueError):  # input is closed
            ready = [own]
        if wake in ready:
            return
        try:
            data = os.read(own, 64 << 10)
        except OSError:
            data = b""
        try:
            stream.send_input(data)
        except OSError:
            return
        if not data:
            return


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
def _signals(stream: AgentStream, terminal: bool) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        _try(lambda: stream.send_signal(number))

    def resize(number: int, frame: FrameType | None) -> None:
        _try(lambda: stream.send_window(*window()))

    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = dict.fromkeys(
        _FORWARDED, forward
    )
    if terminal:
        handlers[signal.SIGWINCH] = resize
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _try(send: Callable[[], None]) -> None:
    with suppress(OSError):  # the guest is gone: the reader sees it
        send()
