"""``tetrarch console``: this terminal on the console of a machine that another process runs."""

from __future__ import annotations

import os
import select
import socket
import sys
from contextlib import ExitStack

from tetrarch.console.stdio import LEAVE_KEY
from tetrarch.console.terminal import RawTerminal
from tetrarch.errors import MachineStateError
from tetrarch.registry import find
from tetrarch.remote.console import open_console

__all__ = ["attach", "show_history"]

_READ_BYTES = 64 << 10
#: What waits for a guest that does not read, before this terminal is read no further.
_TYPED_BYTES_MAX = 64 << 10


def attach(name: str, read_only: bool) -> None:
    """Until Ctrl-], or the machine's end. A terminal that hangs up leaves the machine alone."""
    with _console(name) as stream, ExitStack() as stack:
        if on_terminal := os.isatty(0):
            print(f"tetrarch: {name}; Ctrl-] detaches", file=sys.stderr, flush=True)
            terminal = RawTerminal(0)
            terminal.enter()
            stack.callback(terminal.restore)
        ended = _join(stream, on_terminal, read_only)
    if on_terminal:
        how = "has ended" if ended else "goes on"
        print(f"\r\ntetrarch: {name} {how}", file=sys.stderr, flush=True)


def show_history(name: str, lines: int | None = None) -> None:
    """What the guest has said, as far as it is kept; of that the last ``lines``."""
    said = bytearray()
    with _console(name) as stream:
        # Who types no more gets what there is, and no more either.
        stream.shutdown(socket.SHUT_WR)
        while data := stream.recv(_READ_BYTES):
            said += data
    kept = bytes(said).splitlines(keepends=True)
    _write(b"".join(kept if lines is None else kept[len(kept) - min(lines, len(kept)) :]))


def _console(name: str) -> socket.socket:
    about = find(name)
    if about.console is None:
        where = about.console_goes if about.ready else "not there yet"
        raise MachineStateError(f"the console of {name} is {where}", mend="see tetrarch ps --json")
    return open_console(about.console)


def _join(stream: socket.socket, on_terminal: bool, read_only: bool) -> bool:
    """True: the machine has hung up."""
    stream.setblocking(False)
    guest = stream.fileno()
    typed, reading = b"", True
    while True:
        sources = [guest, 0] if reading and len(typed) < _TYPED_BYTES_MAX else [guest]
        readable, writable, _ = select.select(sources, [guest] if typed else [], [])
        if guest in readable:
            try:
                data = stream.recv(_READ_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                return True
            _write(data)
        if 0 in readable:
            data = _read_input()
            if on_terminal and (not data or LEAVE_KEY in data):
                return False
            # Without a terminal the end of the input is none of the watching.
            reading = bool(data)
            if not read_only:
                typed += data
        if writable:
            try:
                typed = typed[stream.send(typed) :]
            except ConnectionError:
                return True


def _read_input() -> bytes:
    try:
        return os.read(0, _READ_BYTES)
    except OSError:  # the terminal has hung up
        return b""


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:
            # Whoever shares the terminal with us made it non-blocking.
            select.select((), (1,), ())
