"""Breakpoints of this process in a machine of another.

They belong to a connection, and go with it. One thread owns that: it sleeps until the machine tells
of a hit or somebody wants a breakpoint more or less.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from tetrarch._readiness import readable
from tetrarch.control.client import Client
from tetrarch.errors import HostError, MachineStateError, TetrarchError
from tetrarch.machine.breakpoints import Breakpoint, Hit, Listener
from tetrarch.machine.debugger import Watched
from tetrarch.machine.vcpu import VcpuView

__all__ = ["RemoteBreakpoints"]

#: For the rest of a message of which something is there.
_MESSAGE_S = 10.0


class RemoteBreakpoints:
    """Those of one ``RemoteMachine``."""

    def __init__(
        self,
        client: Client,
        vcpu: Callable[[int], VcpuView],
        resume: Callable[[], object],
        report: Callable[[BaseException], object],
    ) -> None:
        """``report`` is called with what a listener raises."""
        self._client = client
        self._vcpu = vcpu
        self._resume = resume
        self._report = report
        self._points: dict[str, Breakpoint] = {}
        self._asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # Guards the end: who asks has the thread there.
        self._lock = threading.Lock()
        self._ended = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._serve, name="remote-breakpoints", daemon=True)
        self._thread.start()

    def add(
        self, kind: Watched, address: int, length: int, listener: Listener | None, **how: Any
    ) -> Breakpoint:
        name = secrets.token_hex(8)
        point = Breakpoint(self, listener, kind, address, length)
        what = {"id": name, "kind": kind, "address": address, "length": length, **how}

        def add() -> None:
            self._client.execute("x-breakpoint-add", what)
            self._points[name] = point

        self._do(add)
        return point

    def remove(self, point: Breakpoint) -> None:
        def remove() -> None:
            for name in [name for name, known in self._points.items() if known is point]:
                del self._points[name]
                self._client.execute("x-breakpoint-del", {"id": name})

        try:
            self._do(remove)
        except MachineStateError:  # the machine has ended, and it with that
            return

    def close(self) -> None:
        """They are gone; whoever waits for one hears it."""
        with self._lock:
            if not self._ended:
                self._ended = True
                os.eventfd_write(self._wake, 1)

    def _do(self, act: Callable[[], None]) -> None:
        """On the thread."""
        if threading.current_thread() is self._thread:
            act()
            return
        done: Future[None] = Future()

        def do() -> None:
            try:
                act()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:
            if self._ended:
                raise MachineStateError("the machine has ended", mend="set it earlier")
            self._asked.put(do)
            os.eventfd_write(self._wake, 1)
        done.result()

    def _serve(self) -> None:
        try:
            while not self._ended:
                ready = readable(self._client, self._wake)
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                    while not self._asked.empty():
                        self._asked.get()()
                if self._client.fileno() in ready:
                    self._take(_MESSAGE_S)
                # Those that came before an answer.
                while self._take(0):
                    pass
        except (HostError, OSError):  # the machine has ended
            pass
        finally:
            with self._lock:
                self._ended = True
            self._client.close()
            for point in self._points.values():
                point.give_up()
            while not self._asked.empty():
                self._asked.get()()  # tells that the connection is gone
            os.close(self._wake)

    def _take(self, timeout: float) -> bool:
        try:
            event = self._client.next_event(timeout=timeout)
        except TimeoutError:
            return False
        data = event.get("data", {})
        if event.get("event") == "X_BREAKPOINT" and (point := self._points.get(data.get("id"))):
            self._met(point, int(data["cpu-index"]))
        return True

    def _met(self, point: Breakpoint, vcpu: int) -> None:
        waited = point.listener is None
        try:
            # The machine has paused itself.
            point.met(Hit(point, self._vcpu(vcpu)), lambda: None)
        except BaseException as error:
            self._report(error)
        if not waited:
            try:
                self._resume()
            except TetrarchError as error:  # the listener has ended it
                if not isinstance(error, (HostError, MachineStateError)):
                    self._report(error)
