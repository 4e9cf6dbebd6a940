"""The serial line between the guest's UART and its other end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

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


class SerialLine:
    """What the guest sends goes to the console and the panic watch, what is typed to the UART."""

    def __init__(self, backend: ConsoleBackend, panic: PanicWatch, conclusion: Conclusion) -> None:
        self._backend = backend
        self._panic = panic
        self._conclusion = conclusion

    def start(self, uart: Uart16550) -> None:
        self._uart = uart
        self._backend.start(self._typed, self._left)

    def output(self, data: bytes) -> None:
        self._backend.write(data)
        self._panic.feed(data)

    def _typed(self, data: bytes) -> None:
        # The UART keeps what the guest has not read. Holding the reader back here
        # keeps that small when a large file is piped in.
        while self._uart.queued > _INPUT_BYTES_MAX and not self._conclusion.decided:
            time.sleep(_INPUT_RETRY_S)
        self._uart.receive(data)

    def _left(self) -> None:
        self._conclusion.post(ExitStatus(StopReason.STOPPED, "left by Ctrl-]"))
