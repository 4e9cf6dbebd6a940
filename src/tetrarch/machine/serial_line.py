"""The serial line between the guest's UART and its other end."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from tetrarch.errors import HostError
from tetrarch.machine.conclusion import Conclusion
from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.status import ExitStatus, StopReason

if TYPE_CHECKING:
    from tetrarch.console import ConsoleBackend
    from tetrarch.devices import Uart16550

__all__ = ["SerialLine"]

# Typed input that waits for the guest: beyond this the console's reader is held back.
_INPUT_BYTES_MAX = 64 << 10
_INPUT_RETRY_S = 0.01
# How long a console may take for what it was given, while the machine is held and at its end.
_FLUSH_PATIENCE_S = 5.0
_END_PATIENCE_S = 10.0


class SerialLine:
    """What the guest sends goes to the console and the panic watch, what is typed to the UART."""

    def __init__(self, backend: ConsoleBackend, panic: PanicWatch, conclusion: Conclusion) -> None:
        self._backend = backend
        self._panic = panic
        self._conclusion = conclusion
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, uart: Uart16550) -> None:
        self._uart = uart
        self._backend.start(self._typed, self._left)
        self._thread = threading.Thread(target=self._deliver, name="console-output", daemon=True)
        self._thread.start()

    @property
    def current(self) -> bool:
        """Whether the caller is the console, in its write()."""
        return threading.current_thread() is self._thread

    def flush(self) -> bool:
        """Waits until the console has all that the guest sent; false where it takes too long."""
        return self.current or self._thread is None or self._uart.flush_output(_FLUSH_PATIENCE_S)

    def end(self) -> BaseException | None:
        """The guest sends no more: waits until the console has it all.

        Gives what the console raised, if it did. Raises HostError where it takes too long.
        """
        self._uart.end_output()
        if self._thread is not None:
            self._thread.join(_END_PATIENCE_S)
            if self._thread.is_alive():
                raise HostError(
                    "the console does not take what the guest sent", mend="end its write()"
                )
        return self._failure

    def _deliver(self) -> None:
        while data := self._uart.wait_output():
            if self._failure is not None:
                continue  # the machine ends; no vCPU is to wait here
            try:
                self._backend.write(data)
            except BaseException as error:
                self._failure = error
                self._conclusion.post(error)
            self._panic.feed(data)

    def _typed(self, data: bytes) -> None:
        # The UART keeps what the guest has not read. Holding the reader back here
        # keeps that small when a large file is piped in.
        while self._uart.queued > _INPUT_BYTES_MAX and not self._conclusion.decided:
            time.sleep(_INPUT_RETRY_S)
        self._uart.receive(data)

    def _left(self) -> None:
        self._conclusion.post(ExitStatus(StopReason.STOPPED, "left by Ctrl-]"))
