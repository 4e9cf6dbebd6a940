"""``kill -CONT`` of the program: a machine that a disk has held (werror=stop) goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tetrarch.errors import MachineStateError
from tetrarch.machine.machine import Machine

__all__ = ["resumed_by_signal"]


@contextmanager
def resumed_by_signal(machine: Machine) -> Iterator[None]:
    """To be called on the main thread.

    The signal itself writes to a pipe, whoever else has set a handler for it and whatever the
    main thread is in the middle of; a thread that has no lock of the machine reads it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(
        target=_resume, args=(machine, reader), name="resume-by-signal", daemon=True
    )
    thread.start()
    # Only signals with a handler in Python are written.
    handler = signal.signal(signal.SIGCONT, lambda signum, frame: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGCONT, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _resume(machine: Machine, reader: int) -> None:
    while signals := os.read(reader, 512):
        if signal.SIGCONT in signals:
            with suppress(MachineStateError):  # it is not held: there is nothing to resume
                machine.resume()
