"""The machine that is held for a disk whose image the host fails, with ``werror=stop``."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tetrarch.block.disk import OnStop
from tetrarch.errors import HostError, MachineStateError
from tetrarch.machine.log import MachineLog

if TYPE_CHECKING:
    from tetrarch.machine.assembly import AssembledMachine

__all__ = ["holder"]

#: Between attempts to hold it.
_HOLD_AGAIN_S: Final = 5.0


def holder(machine: AssembledMachine) -> OnStop:
    """Holds the machine for a disk; it may be gone, held or ended by then."""
    known = weakref.ref(machine)
    # Several disks may fail at once.
    turn = threading.Lock()

    def hold(cause: str, waits: Callable[[], bool]) -> None:
        with turn:
            # Where the machine was held and resumed meanwhile, the write was tried again.
            while waits() and not _hold_for(known(), cause):
                time.sleep(_HOLD_AGAIN_S)

    return hold


def _hold_for(machine: AssembledMachine | None, cause: str) -> bool:
    """False: to be tried again."""
    if machine is None:
        return True
    log = MachineLog(machine.config.name)
    try:
        machine.pause()
    except MachineStateError:  # it has ended, or who holds it will resume it, as here
        return True
    except HostError as error:
        log.warning("%s; %s", cause, error)
        return False
    # Now and not before: who reads it may resume the machine at once.
    log.warning(
        "%s; the machine is paused: mend it on the host and resume() it, or kill -CONT %d",
        cause,
        os.getpid(),
    )
    return True
