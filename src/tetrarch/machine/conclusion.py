"""How a machine ends: the first event counts, and one thread acts on it.

Whatever ends the machine (the guest's power button, a fault, an exception in a
device, a timeout, a signal handler) posts one event. The keeper, a thread that
does nothing else, takes the first of them and takes the machine down, whether
anybody waits for that or not. Where it is a reset that the machine survives, the
next one counts. The queue is a SimpleQueue because that one may be filled from a
signal handler and from a device in the middle of anything.

Nothing here refers to the ``Machine``: one that its user forgot can be collected
while it runs, and ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from tetrarch._patience import patience
from tetrarch.errors import MachineStateError
from tetrarch.machine.forked import elsewhere
from tetrarch.machine.status import ExitStatus, StopReason

__all__ = ["Conclusion", "Event", "HostReset", "Posted"]

Event = ExitStatus | BaseException
"""What ended the machine: by its own or our will, or by an exception."""


class HostReset:
    """The host resets the machine, which runs on."""


Posted = Event | HostReset

# Ends that come from outside of the guest.
_FROM_OUTSIDE = {StopReason.STOPPED, StopReason.TIMEOUT}


class Conclusion:
    """The end of one machine."""

    def __init__(self, request_stop: Callable[[], None]) -> None:
        """``request_stop`` makes the vCPUs return; from any thread."""
        self._request_stop = request_stop
        self._events: queue.SimpleQueue[Posted] = queue.SimpleQueue()
        self._done = threading.Event()
        self._keeper: threading.Thread | None = None
        self.decided = False
        """An event was posted: no vCPU runs on."""
        self.status: ExitStatus | None = None
        self.failure: BaseException | None = None
        """One of the two is set once the machine has ended."""

    def post(self, event: Posted) -> None:
        """Ends or resets the machine; returns at once. From any thread or signal handler."""
        self.decided = True
        self._events.put(event)
        # Devices call this in the middle of a guest's instruction: it is the last.
        self._request_stop()

    def keep(
        self,
        name: str,
        survive: Callable[[Posted], Event | None],
        stop: Callable[[Event], Event],
        close: Callable[[Event], None],
    ) -> None:
        """Starts the keeper.

        ``survive`` gives what ends the machine, None where it runs on; ``stop`` brings it to
        rest and gives what is to be reported; ``close`` is called when ``status`` or
        ``failure`` is set, and tells all others.
        """
        self._keeper = threading.Thread(
            target=self._keep, args=(survive, stop, close), name=f"{name}-keeper", daemon=True
        )
        self._keeper.start()

    def reopen(self) -> Event | None:
        """Forgets the events of a guest that was reset; gives what ends the machine even so.

        To be called on the keeper's thread, while no vCPU runs.
        """
        # In this order: an event that comes now is either found or met by the keeper next.
        self.decided = False
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return None
            if isinstance(event, HostReset):
                continue
            if not isinstance(event, ExitStatus) or event.reason in _FROM_OUTSIDE:
                return event

    def _next_end(self, survive: Callable[[Posted], Event | None]) -> Event:
        while True:
            event = self._events.get()
            # Again: reopen() may have come between the event and its flag.
            self.decided = True
            try:
                ended = survive(event)
            except BaseException as error:  # it comes out of wait()
                return error
            if ended is not None:
                return ended

    def _keep(
        self,
        survive: Callable[[Posted], Event | None],
        stop: Callable[[Event], Event],
        close: Callable[[Event], None],
    ) -> None:
        event = self._next_end(survive)
        self.decided = True
        try:
            event = stop(event)
        except BaseException as error:  # it comes out of wait()
            event = error
        self.settle(event, close)

    def become_shadow(self) -> None:
        """In a process that was forked from the machine's: nobody would end a wait there."""
        self._events = queue.SimpleQueue()
        self._request_stop = lambda: None
        self.decided, self.failure = True, elsewhere()
        self._done = threading.Event()
        self._done.set()

    def settle(self, event: Event, close: Callable[[Event], None]) -> None:
        """The machine has come to rest."""
        self.decided = True
        if isinstance(event, ExitStatus):
            self.status = event
        else:
            self.failure = event
        try:
            close(event)
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            self._done.set()

    @property
    def keeping(self) -> bool:
        """Whether the caller is the keeper: something that is being closed."""
        return threading.current_thread() is self._keeper

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Raises TimeoutError, or what ended the machine if that was an exception."""
        if not self.wait_done(timeout):
            raise TimeoutError(f"the machine still runs after {timeout:g} s")
        if self.failure is not None:
            raise self.failure
        if self.status is None:  # _keep() sets one of the two
            raise MachineStateError("the machine ended without a reason", mend="report this")
        return self.status

    def wait_done(self, timeout: float | None = None) -> bool:
        """Until the machine is down, however it ended; False if it is not in that time."""
        return self._done.wait(patience(timeout))
