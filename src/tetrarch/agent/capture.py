"""One command in a guest for a program: its input and output are bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from tetrarch.agent.client import ERROR, EXIT, OUTPUT, RUN, AgentStream, encode_run

__all__ = ["Completed", "run_captured", "run_streamed"]

#: As much as a shell's user would read; what is larger is copied, not printed.
_OUTPUT_BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True)
class Completed:
    """A command that has ended."""

    code: int
    """Its exit code; 128 + N where signal N ended it."""
    stdout: bytes
    stderr: bytes


def run_streamed(
    stream: AgentStream,
    arguments: Sequence[str],
    source: Iterable[bytes] = (),
    *,
    output: Callable[[bytes], object] = lambda data: None,
    error: Callable[[bytes], object] = lambda data: None,
) -> int:
    """Runs a command with input from ``source``; its exit code.

    ``output`` and ``error`` are called with what it says. Raises AgentError where the guest goes,
    and what ``source`` raised: then the command is left to itself, without further input.
    """
    failure: list[BaseException] = []

    def feed() -> None:
        try:
            for data in source:
                if data:
                    stream.send_input(data)
            stream.send_input(b"")
        except OSError as gone:
            # The reader sees the end of the guest; a command may end before its input does.
            if not stream.gone:
                failure.append(gone)
        except BaseException as raised:
            failure.append(raised)
            with suppress(OSError):  # as above
                stream.send_input(b"")

    stream.send(RUN, encode_run(arguments))
    feeder = threading.Thread(target=feed, name="agent-input", daemon=True)
    feeder.start()
    while True:
        kind, data = stream.read()
        if kind == OUTPUT:
            output(data)
        elif kind == ERROR:
            error(data)
        elif kind == EXIT:
            if failure:
                raise failure[0]
            return int.from_bytes(data[:4], "little")


def run_captured(stream: AgentStream, arguments: Sequence[str], data: bytes = b"") -> Completed:
    """Runs a command; what it says beyond 64 MiB is dropped."""
    stdout, stderr = bytearray(), bytearray()

    def into(buffer: bytearray) -> Callable[[bytes], object]:
        return lambda more: buffer.extend(more[: max(0, _OUTPUT_BYTES_MAX - len(buffer))])

    code = run_streamed(stream, arguments, [data], output=into(stdout), error=into(stderr))
    return Completed(code, bytes(stdout), bytes(stderr))
