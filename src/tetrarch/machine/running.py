"""How a machine runs: started, paused, reset, ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from tetrarch._native import EngineError
from tetrarch.errors import HostError, MachineStateError
from tetrarch.machine.assembly import AssembledMachine
from tetrarch.machine.engine_errors import engine_cause, engine_mend
from tetrarch.machine.guest import load_guest, resolve_guest
from tetrarch.machine.lifecycle import PRESS_AGAIN_S, STOP_GRACE_S, Phase
from tetrarch.machine.status import ExitStatus, StopReason

__all__ = ["RunMethods"]


class RunMethods(AssembledMachine):
    def seal_with(self, action: Callable[[], None]) -> None:
        """Has ``action`` called in start(): all is opened, and the guest has yet to run."""
        self._seal = action

    def load(self) -> None:
        """Puts the guest into memory. start() does it if you have not.

        Raises BootError for files that cannot be booted, ImageError when there is
        no such image and none can be fetched.
        """
        self._load("load")

    def start(self) -> None:
        """Lets the guest run. Returns at once."""
        self._start("start")

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Waits until the machine has ended, and says how.

        Raises TimeoutError if it still runs after ``timeout`` seconds, and what a
        device raised if that ended it.
        """
        self._life.require("wait", Phase.RUNNING, Phase.PAUSED, Phase.ENDED)
        return self._conclusion.wait(timeout)

    def run(self, timeout: float | None = None) -> ExitStatus:
        """start() and finish()."""
        self._start("run")
        return self.finish(timeout)

    def finish(self, timeout: float | None = None) -> ExitStatus:
        """wait(), but after ``timeout`` seconds the machine is stopped; so it is where the wait is
        cut short, as by Ctrl-C."""
        self._life.require("finish", Phase.RUNNING, Phase.PAUSED, Phase.ENDED)
        try:
            if not self._conclusion.wait_done(timeout):
                self._conclusion.post(ExitStatus(StopReason.TIMEOUT, f"{timeout:g} s passed"))
            return self._conclusion.wait()
        finally:
            self.kill()

    def pause(self) -> None:
        """Brings the machine to rest between two instructions, until resume().

        Its clock stands meanwhile. Raises HostError where a device does not return
        from an access, and MachineStateError from a device's own thread.
        """
        self._life.require("pause", Phase.RUNNING)
        if self._threads.current or self._attached.current:
            raise MachineStateError(
                "a device cannot pause its own machine", mend="do it on another thread"
            )
        with self._resets.lock:
            try:
                self._vm.hold()
            except EngineError as error:
                raise HostError(
                    f"the machine cannot be paused: {engine_cause(error)}",
                    mend=engine_mend(error, "end the device's access"),
                ) from error
            if not self._lines.flush():
                self._vm.resume()
                raise HostError(
                    "the machine cannot be paused: its console does not take what the guest sent",
                    mend="end its write()",
                )
            try:
                self._life.move(Phase.PAUSED, "pause")
            except MachineStateError:  # it has ended meanwhile
                self._vm.resume()
                raise
            self._events.tell("stop")

    def resume(self) -> None:
        """Lets a paused machine run on. Waits for a pause() that another thread is in."""
        with self._resets.lock:
            # Also from the first phase a machine can come to run, but by start() alone.
            self._life.require("resume", Phase.PAUSED)
            self._life.move(Phase.RUNNING, "resume")
            self._vm.resume()
            self._resets.resumed()
            self._pc.resumed()
            if self._platform.vmware is not None:
                self._platform.vmware.tools.catch_up()
            self._events.tell("resume")

    def press_power_button(self) -> None:
        """Asks the guest to switch itself off; what comes of it is the guest's."""
        self._life.require("press_power_button", Phase.RUNNING, Phase.PAUSED)
        self._pc.acpi.press_power_button()
        self._events.tell("powerdown")

    def reset(self) -> None:
        """Resets the machine, whatever ``on_reset`` says of its guest; returns at once.

        One that is paused is reset when it is resumed. Raises MachineStateError for one that was
        restored: it has no kernel to load again.
        """
        self._life.require("reset", Phase.RUNNING, Phase.PAUSED)
        self._resets.request()

    def request_stop(self, detail: str = "") -> None:
        """Asks the machine to end; returns at once. From any thread or signal handler.

        ``detail`` is what the status says of it.
        """
        self._conclusion.post(ExitStatus(StopReason.STOPPED, detail))

    def stop(self, grace: float = STOP_GRACE_S) -> bool:
        """Presses the power button, again every 10 s, and ends the machine where its guest has not
        switched itself off after ``grace`` seconds. False: it was ended so. A machine that is
        paused is resumed.

        Raises what a device raised if that ended it.
        """
        self._life.require("stop", Phase.RUNNING, Phase.PAUSED, Phase.ENDED)
        if self.config.replay is not None:
            grace = 0.0  # its guest hears nothing
        deadline = time.monotonic() + grace
        while (left := deadline - time.monotonic()) > 0:
            with suppress(MachineStateError):  # it runs, or has ended
                self.resume()
            with suppress(MachineStateError):
                self.press_power_button()
            if self._conclusion.wait_done(min(left, PRESS_AGAIN_S)):
                break
        self.kill()
        return self.wait().reason is not StopReason.STOPPED

    def kill(self) -> None:
        """Ends the machine, as pulling its plug would. Without effect if it has ended."""
        if self.phase not in (Phase.RUNNING, Phase.PAUSED):
            return
        self.request_stop()
        # A device's own thread, or a console that is being closed, has to return first.
        inside = (self._threads, self._lines, self._attached, self._breakpoints)
        if not self._conclusion.keeping and not any(thread.current for thread in inside):
            self._conclusion.wait_done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        if self.phase is Phase.MADE:
            self._discard()

    def _load(self, what: str) -> None:
        self._life.require(what, Phase.MADE)
        if not self._loaded:
            self.config = resolve_guest(self.config)
            load = partial(
                load_guest,
                self._vm,
                self.config,
                self._backend,
                self._platform,
                self._pc,
            )
            load()
            self._resets.load = load
            self._loaded = True

    def _start(self, what: str) -> None:
        self._load(what)
        self._attached.require_all()
        self._pc.plugged.require_all()
        self._life.move(Phase.RUNNING, what)
        try:
            self._lines.start()
        except BaseException as error:
            self._conclusion.settle(error, self._descent.close)
            raise
        self._conclusion.keep(
            self.config.name, self._resets.survive, self._descent.stop, self._descent.close
        )
        try:
            if self._seal is not None:
                self._seal()
                self.confined = True
        except BaseException as error:
            self._conclusion.post(error)
        self._threads.start()
        if self._restored:
            self._vm.resume()
