"""The lines between the guest's consoles, serial or virtio, and their other ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tetrarch.errors import HostError
from tetrarch.machine.conclusion import Conclusion
from tetrarch.machine.panic import PanicWatch
from tetrarch.machine.status import ExitStatus, StopReason

if TYPE_CHECKING:
    from tetrarch.console import ConsoleBackend

__all__ = ["ConsoleLine", "ConsoleLines", "GuestEnd"]

# Typed input that waits for the guest: beyond this the console's reader is held back.
_INPUT_BYTES_MAX = 64 << 10
_INPUT_RETRY_S = 0.01
# How long a console may take for what it was given, while the machine is held and at its end.
_FLUSH_PATIENCE_S = 5.0
_END_PATIENCE_S = 10.0


class GuestEnd(Protocol):
    """The guest's end: ``SerialPort`` says what its methods do."""

    @property
    def queued(self) -> int: ...
    def receive(self, data: bytes) -> None: ...
    def wait_output(self) -> bytes: ...
    def flush_output(self, timeout: float) -> bool: ...
    def end_output(self) -> None: ...


class ConsoleLine:
    """What the guest sends goes to the back end, what is typed there to the guest."""

    def __init__(
        self,
        guest: GuestEnd,
        backend: ConsoleBackend,
        conclusion: Conclusion,
        panic: PanicWatch | None = None,
    ) -> None:
        """``panic`` follows what the guest sends."""
        self._guest = guest
        self._backend = backend
        self._panic = panic
        self._conclusion = conclusion
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        if callable(watch := getattr(self._backend, "watch_size", None)) and callable(
            resize := getattr(self._guest, "resize", None)
        ):
            watch(resize)
        self._backend.start(self._typed, self._left)
        self._thread = threading.Thread(target=self._deliver, name="console-output", daemon=True)
        self._thread.start()

    @property
    def current(self) -> bool:
        """Whether the caller is the console, in its write()."""
        return threading.current_thread() is self._thread

    def flush(self) -> bool:
        """Waits until the console has all that the guest sent; false where it takes too long."""
        return self.current or self._thread is None or self._guest.flush_output(_FLUSH_PATIENCE_S)

    def hang_up(self) -> None:
        """The guest sends no more."""
        self._guest.end_output()

    def end(self) -> BaseException | None:
        """The guest sends no more: waits until the console has it all.

        Gives what the console raised, if it did. Raises HostError where it takes too long.
        """
        self.hang_up()
        if self._thread is not None:
            self._thread.join(_END_PATIENCE_S)
            if self._thread.is_alive():
                raise HostError(
                    "the console does not take what the guest sent", mend="end its write()"
                )
        return self._failure

    def _deliver(self) -> None:
        while data := self._guest.wait_output():
            if self._failure is not None:
                continue  # the machine ends; no vCPU is to wait here
            try:
                self._backend.write(data)
            except BaseException as error:
                self._failure = error
                self._conclusion.post(error)
            if self._panic is not None:
                self._panic.feed(data)

    def _typed(self, data: bytes) -> None:
        # The guest's end keeps what it has not read. Holding the reader back here
        # keeps that small when a large file is piped in.
        while self._guest.queued > _INPUT_BYTES_MAX and not self._conclusion.decided:
            time.sleep(_INPUT_RETRY_S)
        self._guest.receive(data)

    def _left(self) -> None:
        self._conclusion.post(ExitStatus(StopReason.STOPPED, "left by Ctrl-]"))


class ConsoleLines:
    """All lines of a machine."""

    def __init__(self, lines: Sequence[ConsoleLine]) -> None:
        self._lines = lines

    def start(self) -> None:
        for line in self._lines:
            line.start()

    @property
    def current(self) -> bool:
        return any(line.current for line in self._lines)

    def flush(self) -> bool:
        return all(line.flush() for line in self._lines)

    def end(self) -> BaseException | None:
        for line in self._lines:
            line.hang_up()
        failures = [line.end() for line in self._lines]
        return next((failure for failure in failures if failure is not None), None)
