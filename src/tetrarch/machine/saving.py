"""A machine that is saved, and one that takes up where that was."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tetrarch.errors import MachineStateError
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.lifecycle import Phase
from tetrarch.machine.new_file import host_errors, new_file
from tetrarch.machine.running import RunMethods

if TYPE_CHECKING:
    from tetrarch.machine.snapshot import Parent, Saved

__all__ = ["SaveMethods"]


class SaveMethods(RunMethods):
    def save(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        parent: str | os.PathLike[str] | Parent | None = None,
        track: bool = False,
    ) -> None:
        """Writes all of the machine to a file, from which ``restore`` makes one that goes on.

        It is paused meanwhile, and runs on if it ran. Devices of yours need ``save`` and ``load``.
        Raises HostError where the file cannot be written: then there is none. One that is open
        already has to be empty.

        With ``track`` the machine notes what is written from then on, and the next file may have
        this one as its ``parent``: it has no more of memory than that, and lies beside it.
        """
        from tetrarch.machine.snapshot import Parent, parent_of, save_machine

        self._life.require("save", Phase.RUNNING, Phase.PAUSED)
        if parent is not None and not isinstance(parent, Parent):
            child = Path(path) if isinstance(path, (str, os.PathLike)) else None
            parent = parent_of(Path(parent), child)
        if parent is not None and parent.identity != self._tracked:
            raise MachineStateError(
                f"what was written since {parent.file} has not been noted",
                mend="give the file that was saved last as parent, if that was with track",
            )
        with ExitStack() as stack:
            if isinstance(path, (str, os.PathLike)):
                path = stack.enter_context(new_file(Path(path), "save the machine"))
            else:
                stack.enter_context(host_errors("save the machine"))
            if self.phase is not Phase.PAUSED:
                stack.enter_context(self.paused())
            if self._conclusion.decided:
                # The event is no state of the machine: one that goes on from the file never had it.
                raise MachineStateError(
                    "the machine cannot be saved: its guest is switching it off or resetting it",
                    mend="resume it; after a reset save it again",
                )
            if self._pc.hotplug is not None:
                stack.enter_context(self._pc.hotplug.steady())
            identity = save_machine(self._parts(), path, parent)
            if track:
                self._vm.log_writes()
                self._tracked = identity

    def _take_up(self, saved: Saved, config: MachineConfig, fresh_identity: bool) -> None:
        """In a new machine: it goes on as the saved one, with what ``config`` names of the host."""
        from tetrarch.machine.snapshot import restore_machine

        try:
            saved.about.outside.plug_later(self._pc, config)
            # Its clock stands until start().
            self._vm.hold()
            if fresh_identity:
                from tetrarch.machine.identity import renew_cards

                renew_cards(self._pc)
            restore_machine(self._parts(), saved)
            if self._pc.firmware is not None:
                self._pc.firmware.tell(self.config, "", self._pc.dsdt, self._pc.vcpus.there)
            elif fresh_identity:
                from tetrarch.boot.generation import change_generation

                change_generation(self._vm, self._pc.acpi)
        except BaseException:
            self._discard()
            raise
        self._life.take_up(saved.about.uptime)
        self._loaded = self._restored = True
