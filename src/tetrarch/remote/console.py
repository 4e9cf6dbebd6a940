"""The console of a machine that another process runs."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from tetrarch.console import ConsoleError, MemoryConsole

__all__ = ["RemoteConsole", "open_console"]

_READ_BYTES: Final = 64 << 10


def open_console(path: Path) -> socket.socket:
    """A connection with a shared console (console/shared.py). Raises ConsoleError."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(str(path))
    except OSError as error:
        stream.close()
        raise ConsoleError(
            f"no console answers at {path}: {error.strerror or error}",
            mend="see whether the machine still runs: tetrarch ps",
        ) from error
    return stream


class RemoteConsole(MemoryConsole):
    """One client of it: what the guest said before is the first that ``expect`` sees."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._stream = open_console(path)
        self.start(self._stream.sendall, lambda: None)
        threading.Thread(target=self._follow, name="remote-console", daemon=True).start()

    def _follow(self) -> None:
        with suppress(ConnectionError):  # the machine's process was killed
            while data := self._stream.recv(_READ_BYTES):
                self.write(data)
        self.end("its console has hung up")
        super().close()
        self._stream.close()

    def close(self) -> None:
        """Leaves the console; the machine goes on."""
        with suppress(OSError):  # it has hung up
            self._stream.shutdown(socket.SHUT_RDWR)
