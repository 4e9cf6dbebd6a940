"""A replay under a debugger: it stops without a trace in the guest, and goes back and forth.

What the guest does is fixed by the recording. So breakpoints are not planted in its memory, no
interrupt is held back while it steps, and neither memory nor registers can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence

from tetrarch.errors import MachineStateError
from tetrarch.machine.debugger import Debugger, Hardware, Place, Stop
from tetrarch.machine.engine_vm import EngineReplay, EngineVcpu, EngineVm

__all__ = ["ReplayDebugger", "ReplayView", "debugger_of", "not_replayed"]

#: Beyond each recording's end.
_END = (1 << 64) - 1
#: How far back a watchpoint is looked for first: about a second, as all of it is interpreted.
_NEAR = 1 << 22

_Way = Generator[tuple[int, int, int], None, Stop]
"""Seeks of a way that has several, and where it has led to."""


class ReplayDebugger(Debugger):
    """As ``Debugger``. Breakpoints that are executed can be any number, of either kind."""

    def __init__(self, vm: EngineVm, vcpus: Sequence[EngineVcpu], replay: EngineReplay) -> None:
        super().__init__(vm, vcpus)
        self.replay = replay
        self.block_interrupts = False
        self._code: set[int] = set()
        self._code_hardware: set[Hardware] = set()
        self._way: _Way | None = None
        self._blind = False
        """The part of the way that is under way tells nothing of watchpoints."""
        self._stays = False

    def stay(self) -> None:
        """At the recording's end the machine stands from now on, and does not end."""
        self._stays = True
        self.replay.set_stay(True)

    def close(self) -> None:
        self.replay.set_stay(False)
        super().close()

    # Back and forth.

    def go(self, count: int) -> None:
        """When the machine runs next it goes to a count, or to the recording's end if that comes
        first, and stops there."""
        self._begin(self._go(count))

    def step_back(self) -> None:
        """It goes to where it was an instruction ago."""
        count = self.replay.count
        self._begin(self._go(count - 1) if count else self._to_begin())

    def continue_back(self) -> None:
        """It goes to before the last instruction that met a breakpoint or watchpoint; without one
        to the start."""
        self._begin(self._continue_back())

    def _begin(self, way: _Way) -> None:
        self._way = way
        self.replay.seek(*next(way))

    def _go(self, count: int) -> _Way:
        # The end may come first.
        self.replay.set_stay(True)
        self._blind = True
        yield count, count, 0
        self.replay.set_stay(self._stays)
        return Stop(0, place="here" if self.replay.count == count else "end")

    def _to_begin(self) -> _Way:
        self._blind = True
        yield 0, 0, 0
        return Stop(0, place="begin")

    def _continue_back(self) -> _Way:
        now = end = self.replay.count
        reach = _NEAR
        while end > 0:
            start = end - 1
            if self._hardware:
                # Watchpoints have all code interpreted: up to where they are looked for the guest
                # runs without, and most are met not far from here.
                start, reach = max(0, end - reach), reach * 2
                if start:
                    self._blind = True
                    yield start, start, 0
            self._blind = False
            yield end, start, now
            began, met = self.replay.passed
            if met is not None:
                count, hits = met
                self._blind = True
                yield count, count, 0
                return Stop(0, hardware=self._hit(hits), place="here")
            # A breakpoint right where the guest stood meanwhile has yet to be met.
            end = began + 1 if self._hardware and began else began
        return (yield from self._to_begin())

    def _armed(self) -> Sequence[Hardware]:
        return () if self._blind else self._hardware

    def interrupt(self) -> None:
        self._way = None
        self._blind = False
        self.replay.give_up()

    def take_stops(self) -> list[Stop]:
        stops = super().take_stops()
        if self._way is None or not stops:
            return stops
        try:
            self.replay.seek(*next(self._way))
        except StopIteration as arrived:
            self._way = None
            self._blind = False
            return [arrived.value]
        return []

    def resume(self, steps: Collection[int] = (), frozen: Collection[int] = ()) -> None:
        if not steps:
            # Who steps has lifted those it stands before, and puts them back: as they were the
            # engine knows them, and passes the one at which it stands.
            self.replay.set_breakpoints([*self._code, *(at for _, at, _ in self._code_hardware)])
        super().resume(steps, frozen)

    def detach(self) -> None:
        self.interrupt()
        self._code.clear()
        self._code_hardware.clear()
        self.replay.set_stay(False)
        super().detach()

    # Breakpoints.

    def plant(self, vcpu: int, linear: int) -> None:
        self._code.add(linear)

    def unplant(self, linear: int) -> None:
        self._code.discard(linear)

    def watch(self, wanted: Hardware) -> bool:
        if wanted[0] != "execute":
            return super().watch(wanted)
        self._code_hardware.add(wanted)
        return True

    def unwatch(self, wanted: Hardware) -> None:
        self._code_hardware.discard(wanted)
        super().unwatch(wanted)

    def _stop_of(self, vcpu: int, kind: str, value: int) -> Stop:
        if kind == "end":
            return Stop(vcpu, place="end")
        if kind != "breakpoint":
            return super()._stop_of(vcpu, kind, value)
        planted = value in self._code
        watched: Hardware = ("execute", value, 1)
        return Stop(vcpu, None if planted else watched, planted=planted, passes=True)


def debugger_of(
    vm: EngineVm, vcpus: Sequence[EngineVcpu], there: Callable[[], Sequence[int]]
) -> Debugger:
    replay = vm.replay()
    if replay is None:
        return Debugger(vm, vcpus, there)
    return ReplayDebugger(vm, vcpus, replay)


def not_replayed() -> MachineStateError:
    return MachineStateError("the machine does not replay", mend="make it with replay=FILE")


class ReplayView:
    """``vm.replay``: where in its recording a machine is, and the way to another place there."""

    def __init__(
        self, replay: EngineReplay, travel: Callable[[Callable[[Debugger], None]], Stop]
    ) -> None:
        """``travel`` has a debugger begin a way, and returns where the machine stands then."""
        self._replay = replay
        self._travel = travel

    @property
    def count(self) -> int:
        """Instructions, and ways into a handler, since the recording's start: of a machine that
        is paused."""
        return self._replay.count

    def goto(self, count: int) -> Place:
        """Goes to a count, back or on, and pauses the machine there: "here"; or at the "end" of
        the recording, if that comes first.

        A way back begins at the checkpoint before it. What the guest says on its console on the
        way is not shown. Raises MachineStateError while gdb debugs the machine, or where it ends
        on the way.
        """
        if not 0 <= count <= _END:
            raise ValueError(f"{count} is no count of instructions")

        def begin(debugger: Debugger) -> None:
            assert isinstance(debugger, ReplayDebugger)
            debugger.go(count)

        return self._travel(begin).place or "here"
