"""``kill -CONT`` of the program: a machine that a disk has held (werror=stop) goes on.

And no signal waits for the main thread, which runs the handlers in Python: the kernel may give it
to another thread (signal(7)), and nobody wakes the main thread then; or it comes just before the
main thread begins to wait.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from tetrarch.errors import MachineStateError
from tetrarch.machine.machine import Machine

__all__ = ["resumed_by_signal"]

#: Interrupts what the main thread waits in; ignored where nobody asks for it.
_WAKE: Final = signal.SIGURG
#: Until the main thread is interrupted again, where that came before it waited.
_AGAIN_S: Final = 0.1


@contextmanager
def resumed_by_signal(machine: Machine) -> Iterator[None]:
    """To be called on the main thread.

    The signal itself writes to a pipe, whoever else has set a handler for it and whatever the
    main thread is in the middle of; a thread that has no lock of the machine reads it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    awake = threading.Event()
    thread = threading.Thread(
        target=_resume, args=(machine, reader, awake), name="resume-by-signal", daemon=True
    )
    thread.start()
    # Only signals with a handler in Python are written.
    before = {
        signal.SIGCONT: signal.signal(signal.SIGCONT, lambda signum, frame: None),
        _WAKE: signal.signal(_WAKE, lambda signum, frame: awake.set()),
    }
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        # The thread may be at waking us still.
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)


def _resume(machine: Machine, reader: int, awake: threading.Event) -> None:
    main = threading.main_thread().ident
    assert main is not None
    while signals := os.read(reader, 512):
        if signal.SIGCONT in signals:
            with suppress(MachineStateError):  # it is not held: there is nothing to resume
                machine.resume()
        if set(signals) == {_WAKE}:
            continue
        awake.clear()
        while not awake.is_set():
            signal.pthread_kill(main, _WAKE)
            awake.wait(_AGAIN_S)
