"""What happens to a machine, for those who want to know: ``vm.on("reset", fn)``.

Names and data are those of QEMU's events (qapi/run-state.json and its neighbours), so that
the control socket hands on what a program in Python sees.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from weakref import WeakSet

from tetrarch.errors import ConfigError
from tetrarch.machine.event_stream import EventStream
from tetrarch.machine.status import BY_QUIT, ExitStatus, StopReason

__all__ = ["EVENTS", "EventName", "Events", "MachineEvent", "shutdown_data"]

EventName = Literal[
    "shutdown",
    "reset",
    "stop",
    "resume",
    "powerdown",
    "guest-panicked",
    "guest-crashloaded",
    "balloon-change",
    "block-io-error",
    "device-deleted",
    "dump-completed",
]
_LIMITED: frozenset[EventName] = frozenset(
    {"balloon-change", "block-io-error", "guest-panicked", "guest-crashloaded"}
)
_INTERVAL_S = 1.0
EVENTS: tuple[EventName, ...] = get_args(EventName)


@dataclass(frozen=True)
class MachineEvent:
    name: EventName
    data: Mapping[str, Any] = field(default_factory=dict)
    """As QEMU's event of that name has it."""
    time: float = field(default_factory=time.time)
    """When it happened, in seconds since 1970."""


Listener = Callable[[MachineEvent], object]


class Events:
    """The events of one machine. What happens never waits for who listens."""

    def __init__(self, fail: Callable[[BaseException], None]) -> None:
        """``fail`` is called with what a listener raises."""
        self._fail = fail
        # Guards changes of the two below; who tells an event takes them as they are.
        self._lock = threading.Lock()
        self._watchers: tuple[Listener, ...] = ()
        self._listeners: tuple[tuple[EventName, Listener], ...] = ()
        self._streams: WeakSet[EventStream[MachineEvent]] = WeakSet()
        self._ended = False
        self._queue: queue.SimpleQueue[MachineEvent | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # Of those that were told within the last second: what has come since.
        self._late: dict[tuple[EventName, object], MachineEvent | None] = {}

    def tell(self, name: EventName, **data: Any) -> None:
        """It has happened; from any thread.

        What a guest can bring about as often as it likes is told once a second at most, and
        then the last of it.
        """
        event = MachineEvent(name, data)
        if name in _LIMITED:
            key = name, data.get("node-name")
            with self._lock:
                waiting = key in self._late
                self._late[key] = event if waiting else None
            if waiting:
                return
            timer = threading.Timer(_INTERVAL_S, self._tell_late, (key,))
            timer.daemon = True
            timer.start()
        self._tell(event)

    def _tell_late(self, key: tuple[EventName, object]) -> None:
        with self._lock:
            event = self._late.pop(key)
        if event is not None:
            self.tell(event.name, **event.data)

    def hand_on(self, event: MachineEvent) -> None:
        """One that has been told elsewhere, with its data and time."""
        self._tell(event)

    def _tell(self, event: MachineEvent) -> None:
        for watcher in self._watchers:
            watcher(event)
        for stream in self._all_streams():
            stream.put(event.name, event)
        if self._listeners:
            self._queue.put(event)

    def watch(self, watcher: Listener) -> None:
        """``watcher`` is called with every event, where it happens: it must not wait."""
        with self._lock:
            self._watchers += (watcher,)

    def on(self, name: EventName, listener: Listener) -> None:
        """``listener`` is called with each event of that name, one at a time, on a thread of
        their own. Raises ConfigError for a name that no event has."""
        _require_event(name)
        with self._lock:
            self._listeners += ((name, listener),)
            if self._thread is None:
                self._thread = threading.Thread(target=self._call, name="events", daemon=True)
                self._thread.start()

    def stream(self, *names: EventName) -> EventStream[MachineEvent]:
        """Those of the names, or all, from now on. Raises ConfigError as ``on`` does."""
        for name in names:
            _require_event(name)
        stream: EventStream[MachineEvent] = EventStream(names)
        with self._lock:
            self._streams.add(stream)
        if self._ended:
            stream.end()
        return stream

    def _all_streams(self) -> list[EventStream[MachineEvent]]:
        with self._lock:
            return list(self._streams)

    def end(self) -> None:
        """There are no more."""
        self._ended = True
        for stream in self._all_streams():
            stream.end()
        self._watchers = ()
        self._queue.put(None)

    def _call(self) -> None:
        while (event := self._queue.get()) is not None:
            for name, listener in self._listeners:
                if name == event.name:
                    try:
                        listener(event)
                    except BaseException as error:
                        self._fail(error)


def _require_event(name: str) -> None:
    if name not in EVENTS:
        raise ConfigError(f"{name!r} is no event", mend=f"there are {', '.join(EVENTS)}")


_CAUSES = {
    StopReason.POWERED_OFF: "guest-shutdown",
    StopReason.DEBUG_EXIT: "guest-shutdown",
    StopReason.RESET: "guest-reset",
    StopReason.CRASHED: "guest-panic",
    StopReason.STOPPED: "host-ui",
    StopReason.TIMEOUT: "host-signal",
}


def shutdown_data(end: ExitStatus | BaseException) -> dict[str, Any]:
    """How a machine ended, as the data of SHUTDOWN (ShutdownCause, qapi/run-state.json)."""
    if not isinstance(end, ExitStatus):
        return {"guest": False, "reason": "host-error"}
    reason = "host-qmp-quit" if end.detail == BY_QUIT else _CAUSES[end.reason]
    return {"guest": reason.startswith("guest"), "reason": reason}
