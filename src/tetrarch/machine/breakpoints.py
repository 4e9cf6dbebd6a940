"""Breakpoints and watchpoints of a program: ``vm.breakpoint(address, listener)``.

One thread owns the machine's debugger: it sleeps until a vCPU stops or somebody wants a breakpoint
more or less, calls listeners, and lets the vCPU go on: with the breakpoint lifted for the one
instruction it stands before, which no other vCPU may run past meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, Self

from tetrarch._native import EngineError
from tetrarch._patience import patience
from tetrarch._readiness import readable
from tetrarch.errors import HostError, MachineStateError
from tetrarch.machine.debugger import Debugger, DebuggerPort, Hardware, NoMemory, Stop, Watched
from tetrarch.machine.vcpu import VcpuView

__all__ = ["Breakpoint", "Breakpoints", "Hit", "Listener", "Owner"]

# A listener that does not return when the machine has ended is left to itself.
_END_PATIENCE_S = 10.0
# Between looks, while somebody asks for something that has to wait.
_LOOK_S = 0.01


@dataclass(frozen=True)
class Hit:
    """A vCPU has come to a breakpoint. The machine stands while a listener has this."""

    breakpoint: Breakpoint
    vcpu: VcpuView


Listener = Callable[[Hit], object]


class Owner(Protocol):
    """Who has set breakpoints."""

    def remove(self, point: Breakpoint) -> None: ...


class Breakpoint:
    """One that a machine has, until ``remove()`` or the end of a ``with`` statement."""

    def __init__(
        self,
        owner: Owner,
        listener: Listener | None,
        kind: Watched,
        address: int,
        length: int,
    ) -> None:
        self._owner = owner
        self.listener = listener
        """None: the machine is paused at each hit."""
        self._waiting: SimpleQueue[Hit | None] = SimpleQueue()
        self.kind: Watched = kind
        """What stops there: "execute", or a "write" or any "access" of data."""
        self.address = address
        self.length = length
        """In bytes."""
        self.hits = 0
        """How often it was met."""

    def __repr__(self) -> str:
        return f"<Breakpoint at {self.address:#x}, {self.kind}, {self.hits} hits>"

    def wait(self, timeout: float | None = None) -> Hit:
        """The next hit, of one without a listener: the machine is held there, and goes on by its
        ``resume()``.

        Raises TimeoutError after ``timeout`` seconds, MachineStateError when the machine has ended.
        """
        if self.listener is not None:
            raise MachineStateError(
                "a breakpoint with a listener is not waited for", mend="give it none"
            )
        try:
            hit = self._waiting.get(timeout=patience(timeout))
        except Empty:
            raise TimeoutError(f"{self!r}: no hit within {timeout:g} s") from None
        if hit is None:
            self._waiting.put(None)
            raise MachineStateError(f"the machine ended, or gave up {self!r}", mend="look earlier")
        return hit

    def remove(self) -> None:
        """Takes it out of the machine. Without effect if it is."""
        self._owner.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @property
    def key(self) -> Hardware:
        return self.kind, self.address, self.length

    def met(self, hit: Hit, hold: Callable[[], object]) -> None:
        self.hits += 1
        if self.listener is not None:
            self.listener(hit)
        else:
            hold()
            self._waiting.put(hit)

    def give_up(self) -> bool:
        """True: it holds the machine, and nobody knows."""
        untold = not self._waiting.empty()
        self._waiting.put(None)
        return untold


class Breakpoints:
    """Those of one machine.

    All but ``_do`` and ``close`` runs on the thread; ``_lock`` guards its start and its end.
    """

    def __init__(
        self,
        port: DebuggerPort,
        vcpus: Sequence[VcpuView],
        hold: Callable[[], object],
        resume: Callable[[], object],
        fail: Callable[[BaseException], None],
    ) -> None:
        """``hold`` holds the machine, ``resume`` lets it run; ``fail`` is called with what a
        listener raises."""
        self._port = port
        self._vcpus = vcpus
        self._hold = hold
        self._resume = resume
        self._fail = fail
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._asked: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._wake = -1
        self._debugger: Debugger | None = None
        self._planted: list[Breakpoint] = []
        self._hardware: list[Breakpoint] = []
        # vCPUs that stand before a breakpoint; the first is let over it when it is lifted.
        self._standing: deque[int] = deque()
        self._lifted: int | None = None
        """The address of what is lifted."""

    @property
    def current(self) -> bool:
        """Whether the caller is a listener."""
        return threading.current_thread() is self._thread

    def plant(self, vcpu: int, address: int, listener: Listener | None) -> Breakpoint:
        """An INT3. Raises MachineStateError where another debugs the machine, or where the vCPU
        has nothing mapped."""
        point = Breakpoint(self, listener, "execute", address, 1)

        def plant(debugger: Debugger) -> None:
            try:
                debugger.plant(vcpu, address)
            except NoMemory:
                raise MachineStateError(
                    f"the guest has nothing at {address:#x}, where a breakpoint could be planted",
                    mend="wait until it has, or give hardware=True",
                ) from None
            self._planted.append(point)

        self._do(lambda: self._change(plant))
        return point

    def watch(self, wanted: Hardware, listener: Listener | None) -> Breakpoint:
        """One of the CPU's four. Raises MachineStateError where another debugs the machine, or all
        are in use; EngineError for what no CPU has."""
        point = Breakpoint(self, listener, *wanted)

        def watch(debugger: Debugger) -> None:
            if not debugger.watch(wanted):
                raise MachineStateError(
                    "a CPU has four hardware breakpoints, and all are in use", mend="remove one"
                )
            self._hardware.append(point)

        self._do(lambda: self._change(watch))
        return point

    def remove(self, point: Breakpoint) -> None:
        def remove(debugger: Debugger) -> None:
            for points in (self._planted, self._hardware):
                if point in points:
                    points.remove(point)
                    if point.give_up():
                        self._resume()
            if not any(other.address == point.address for other in self._planted):
                debugger.unplant(point.address)
            if not any(other.key == point.key for other in self._hardware):
                debugger.unwatch(point.key)

        with suppress(MachineStateError):  # the machine has ended, and its breakpoints with it
            self._do(lambda: self._change(remove) if self._debugger is not None else None)

    def travel(
        self,
        begin: Callable[[Debugger], None],
        lend: Callable[[], object],
        take_back: Callable[[], object],
    ) -> Stop:
        """Has a debugger begin a way through a recording, and gives where it has led to.

        The machine is paused, which is lent to it meanwhile. Raises MachineStateError where another
        debugs the machine, or where that ends on the way.
        """
        arrived: list[Stop] = []

        def travel(debugger: Debugger) -> None:
            begin(debugger)
            lend()
            try:
                debugger.resume()
                arrived.append(self._arrival(debugger))
            finally:
                debugger.stop()
                take_back()

        self._do(lambda: self._change(travel))
        return arrived[0]

    def close(self) -> None:
        """The machine has ended."""
        with self._lock:
            self._ended = True
            if self._thread is None:
                return
            os.eventfd_write(self._wake, 1)
        if not self.current:
            self._thread.join(_END_PATIENCE_S)

    def _do(self, action: Callable[[], object]) -> None:
        """Has the thread do something; raises what that raises."""
        if self.current:
            action()
            return
        done: Future[None] = Future()

        def act() -> None:
            try:
                action()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:
            if self._ended:
                raise MachineStateError("the machine has ended", mend="set it earlier")
            if self._thread is None:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._thread = threading.Thread(target=self._serve, name="breakpoints", daemon=True)
                self._thread.start()
            self._asked.put(act)
            os.eventfd_write(self._wake, 1)
        done.result()

    # The thread.

    def _serve(self) -> None:
        try:
            while not self._ended:
                watched = [self._wake]
                if self._debugger is not None:
                    watched.append(self._debugger.alert)
                ready = readable(*watched)
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                    while not self._asked.empty():
                        self._asked.get()()
                elif self._debugger is not None and self._pause(self._debugger):
                    self._go_on(self._debugger)
        finally:
            for point in (*self._planted, *self._hardware):
                point.give_up()
            if self._debugger is not None:
                self._port.release(self._debugger)
            # Another thread would begin anew.
            self._debugger, self._lifted = None, None
            for known in (self._planted, self._hardware, self._standing):
                known.clear()
            with self._lock:
                os.close(self._wake)
                self._thread = None
            while not self._asked.empty():
                self._asked.get()()  # tells that the machine has ended

    def _arrival(self, debugger: Debugger) -> Stop:
        while True:
            ready = readable(self._wake, debugger.alert)
            if self._ended:
                raise MachineStateError("the machine has ended on the way", mend="look earlier")
            if debugger.alert not in ready:
                # Who asks for something waits.
                time.sleep(_LOOK_S)
                continue
            debugger.stop()
            for stop in debugger.take_stops():
                return stop
            debugger.resume()

    def _change(self, change: Callable[[Debugger], None]) -> None:
        """With the machine at rest; it goes on then, unless a listener is what asks."""
        if self._ended:
            raise MachineStateError("the machine has ended", mend="set it earlier")
        if self._debugger is None:
            self._debugger = self._port.take("a breakpoint of the program")
        debugger = self._debugger
        within = debugger.stopped
        if not within and not self._pause(debugger):
            self._let_go_if_unused(debugger)
            raise HostError(
                "the machine cannot be stopped: a device does not return from an access",
                mend="end its read() or write()",
            )
        try:
            change(debugger)
        finally:
            if not within:
                self._go_on(debugger)
                self._let_go_if_unused(debugger)

    def _let_go_if_unused(self, debugger: Debugger) -> None:
        if not self._planted and not self._hardware and not self._standing:
            self._debugger = None
            self._port.release(debugger)

    def _pause(self, debugger: Debugger) -> bool:
        """Stops the machine, and calls the listeners of what its vCPUs have met meanwhile; False
        where it cannot be stopped."""
        try:
            debugger.stop()
        except EngineError:
            return False
        stops = debugger.take_stops()
        if self._lifted is not None and any(stop.vcpu == self._standing[0] for stop in stops):
            self._put_back(debugger, self._standing.popleft(), self._lifted)
        for stop in stops:
            self._met(stop)
        return True

    def _met(self, stop: Stop) -> None:
        vcpu = self._vcpus[stop.vcpu]
        if stop.planted:
            address = vcpu.regs.rip
            met = [point for point in self._planted if point.address == address]
        else:
            met = [point for point in self._hardware if point.key == stop.hardware]
        if stop.repeats and stop.vcpu not in self._standing:
            self._standing.append(stop.vcpu)
        for point in met:
            try:
                point.met(Hit(point, vcpu), self._hold)
            except BaseException as error:
                self._fail(error)

    def _go_on(self, debugger: Debugger) -> None:
        """Lets the machine run; vCPUs that stand before a breakpoint first, one by one, over it."""
        if self._lifted is not None and not self._wanted(self._lifted):
            self._lifted = None  # it was taken away meanwhile
        while self._standing:
            vcpu = self._standing[0]
            address = self._vcpus[vcpu].regs.rip
            if self._lifted is None and self._lift(debugger, address):
                self._lifted = address
            if self._lifted is not None:
                others = set(range(len(self._vcpus))) - {vcpu}
                debugger.resume(steps={vcpu}, frozen=others)
                return
            self._standing.popleft()  # the listener has sent it elsewhere, or taken it away
        debugger.resume()

    def _wanted(self, address: int) -> bool:
        """Whether something stops before an instruction."""
        points = (*self._planted, *self._hardware)
        return any(point.kind == "execute" and point.address == address for point in points)

    def _lift(self, debugger: Debugger, address: int) -> bool:
        """False: there is nothing to be lifted."""
        debugger.unplant(address)
        debugger.unwatch(("execute", address, 1))
        return self._wanted(address)

    def _put_back(self, debugger: Debugger, vcpu: int, address: int) -> None:
        self._lifted = None
        if any(point.address == address for point in self._planted):
            with suppress(NoMemory):  # the instruction has taken its own page away
                debugger.plant(vcpu, address)
        if any(point.key == ("execute", address, 1) for point in self._hardware):
            debugger.watch(("execute", address, 1))
