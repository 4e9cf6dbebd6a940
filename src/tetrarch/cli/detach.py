"""``tetrarch run --detach``: the machine in a process of its own, without a terminal.

The shell's process waits until the other's machine runs, or has come to nothing: until then the
other says what is wrong where this one would have, and its exit code is this one's.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

from tetrarch.cli.failure import fail
from tetrarch.registry import Claim

__all__ = ["Shell", "in_background"]


class Shell:
    """The other end of the background process: who started it, and waits."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def release(self, claim: Claim) -> None:
        """The machine runs: whoever waits goes on, and what there is to say goes to the log.

        Raises BrokenPipeError where nobody waits any more, and so nobody knows of the machine;
        HostError where it can have no log.
        """
        log = claim.open_log()  # before who waits is told that all is well
        os.write(self._pipe, claim.name.encode())
        os.close(self._pipe)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.close(log)
        sys.stderr = _Stamped(sys.stderr)
        for handler in logging.getLogger("tetrarch").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        print(f"tetrarch: {claim.name} runs in process {os.getpid()}", file=sys.stderr)


def in_background(run: Callable[[Shell], int]) -> int:
    """Calls ``run`` in a process of its own, and gives its exit code there.

    Here it is 0 when the machine runs, and its name has been printed; else that of ``run``.
    """
    reader, writer = os.pipe()
    # No thread has been started yet: a copy of this process is a whole one.
    child = os.fork()
    if child == 0:
        os.close(reader)
        _leave_terminal()
        return run(Shell(writer))
    os.close(writer)
    try:
        name = _read_all(reader)
        if name:
            print(name.decode())
            return 0
        _, status = os.waitpid(child, 0)
    except BaseException:  # a signal that ends us
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        ended = f"the machine's process was ended by {signal.Signals(-code).name}"
        return fail(f"{ended}; look into the host's kernel log", 128 - code)
    return code


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb") as pipe:
        return pipe.read()


def _leave_terminal() -> None:
    os.setsid()
    # A terminal that a console is sent to becomes ours, and must not end us when it goes.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Ours are all closed on exec: those that are not came through one.
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            inherited = not fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        except OSError:  # the listing's own
            continue
        if inherited and descriptor > 2:
            os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)


class _Stamped(io.TextIOBase):
    """Begins each line with the time (RFC 3339). A full disk loses lines, and ends no machine."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._part = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        *lines, self._part = (self._part + text).split("\n")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with suppress(OSError):
            self._stream.write("".join(f"{now} {line}\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
