"""The process of a machine, from outside."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from typing import Self

from tetrarch._patience import patience
from tetrarch.registry import About
from tetrarch.registry.listing import alive

__all__ = ["MachineProcess"]


class MachineProcess:
    """A hold on it by which it can be waited for and ended, and no other that got its number."""

    def __init__(self, about: About) -> None:
        """Has no process where the machine's has ended."""
        self._descriptor: int | None = None
        try:
            self._descriptor = os.pidfd_open(about.pid)
        except ProcessLookupError:
            return
        # Who holds the lock after the process was opened has had its number all the time.
        if not alive(about.name):
            self.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Until it has ended; False if it has not after ``timeout`` seconds."""
        if self._descriptor is None:
            return True
        limit = patience(timeout)
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(None if limit is None else limit * 1000))

    def signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self._descriptor is not None:
            with suppress(ProcessLookupError):  # it was quicker
                signal.pidfd_send_signal(self._descriptor, number)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
