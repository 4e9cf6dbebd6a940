"""A guest that is cut in the middle and goes on on the other engine, again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import cycle
from typing import Any, cast

from tests.conformance.guest import LIMIT_S, MIB, Guest

from tetrarch._native import Vm
from tetrarch.platforms import Platform

# Where it goes from bt's translator: engine, and whether bt translates.
WAY = (("kvm", True), ("bt", False), ("kvm", True), ("bt", True))
# Until the first cut by time; each further one lets twice as much pass, so that every guest ends.
FIRST_PIECE_S = 0.002


class _Now:
    """Stands for the machine that the guest is in at the time of a call."""

    def __init__(self, guest: MovedGuest) -> None:
        self._guest = guest

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self._guest.moving:
                return getattr(self._guest.machine, name)(*arguments, **named)

        return call

    def request_stop(self) -> None:
        self._guest.stop()


class MovedGuest(Guest):
    """Saved and restored before its first instruction, at each access to a device, and, if
    ``cut_by_time`` is left, wherever it is after some time. What a test sees of it is as if it
    had run in one machine."""

    def __init__(self, platform: Platform | None = None) -> None:
        super().__init__("bt", platform=platform)
        self._platform = platform
        self._way = cycle(WAY)
        self._asked = False
        self.moves = 0
        self.moving = threading.RLock()
        """Held while it is between two machines."""
        self.machine = self.vm
        self.vm = cast("Vm", _Now(self))

    def stop(self) -> None:
        """For the test; a cut ends the run of a vCPU, too, but is not seen."""
        with self.moving:
            self._asked = True
            self.machine.request_stop()

    def accessed(self) -> None:
        super().accessed()
        self.machine.request_stop()

    def _run(self) -> str:
        piece = FIRST_PIECE_S
        self.machine.request_stop()
        while True:
            cut = threading.Timer(piece, self.machine.request_stop)
            cut.daemon = True
            if self.cut_by_time:
                cut.start()
            end = super()._run()
            cut.cancel()
            if end != "stopped":
                return end
            with self.moving:
                self._move()
                asked, self._asked = self._asked, False
            if asked:
                return end
            piece = min(2 * piece, LIMIT_S)

    def _move(self) -> None:
        engine, translate = next(self._way)
        old, new = self.machine, Vm(engine, MIB, translate=translate, platform=self._platform)
        self.attach(new)
        old.hold()
        new.hold()
        new.write_memory(0, old.read_memory(0, MIB))
        new.load_state(old.save_state())
        new.vcpu(0).load_state(self.vcpu.save_state())
        new.resume()
        self.machine, self.vcpu = new, new.vcpu(0)
        self.moves += 1
