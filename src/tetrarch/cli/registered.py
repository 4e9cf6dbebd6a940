"""Machines of ``tetrarch run`` that others find by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tetrarch.console.backend import ConsoleBackend
from tetrarch.console.shared import SharedConsole
from tetrarch.console.spec import ConsoleSpec
from tetrarch.errors import HostError
from tetrarch.machine.config import MachineConfig
from tetrarch.machine.machine import Machine
from tetrarch.registry import Claim

if TYPE_CHECKING:
    from tetrarch.vnc.server import VncServer

__all__ = ["describe", "registered"]

#: Names that are tried for a machine that was given none.
_NAMES_MAX = 1000


@contextmanager
def registered(
    config: MachineConfig, detached: bool, restored: Path | None = None
) -> Iterator[tuple[MachineConfig, Claim | None]]:
    """Claims the name of a machine that has one, or runs in the background; ``config`` with it,
    and with its control socket and the vsock socket by which commands get into the guest.

    Raises HostError where a machine of that name runs.
    """
    if "name" in config.model_fields_set:
        claim = Claim(config.name, detached=detached)
    elif detached:
        claim = _claim_any(config.name)
    else:
        yield config, None
        return
    with claim:
        # Before any is there: a process that is killed has no time to remove them.
        started = restored or config.replay or config.kernel or config.firmware
        guest = config.image or str(started or _default_image())
        networks = (Path(net.target) for net in config.net if net.kind == "socket")
        claim.describe(
            guest=guest,
            sockets=_sockets(config),
            networks=tuple(path.absolute() for path in networks),
        )
        changes = {"name": claim.name, "control": config.control or claim.socket("control")}
        if config.record is None and config.replay is None:
            # Of a recording it cannot be a part.
            changes["vsock"] = config.vsock or claim.socket("vsock")
        yield config.model_copy(update=changes), claim


def describe(claim: Claim, machine: Machine, console: ConsoleBackend) -> None:
    """Tells others that the machine runs, and how to get to it."""
    config = machine.config
    shared = isinstance(console, SharedConsole)
    claim.describe(
        ready=True,
        engine=machine.engine,
        cpus=config.cpus.count,
        memory=config.memory,
        control=_absolute(config.control),
        vsock=_absolute(config.vsock),
        console=claim.socket("console") if shared else None,
        console_goes=str(config.console or "none"),
        display=f"vnc={_shown_at(machine.display)}" if machine.display is not None else "",
    )


def _sockets(config: MachineConfig) -> tuple[Path, ...]:
    """Those that the machine makes where its user says."""
    ends = (config.console, *(port.console for port in config.virtio_console))
    consoles = (end.path for end in ends if isinstance(end, ConsoleSpec) and end.kind == "socket")
    gdb = None if config.gdb is None else config.gdb.path
    display = None if config.display is None else config.display.place.path
    paths = (*consoles, config.control, config.vsock, gdb, display)
    return tuple(path.absolute() for path in paths if path is not None)


def _shown_at(display: VncServer) -> str:
    path = display.spec.place.path
    return display.address if path is None else str(path.absolute())


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _default_image() -> str:
    from tetrarch.images import DEFAULT_IMAGE

    return DEFAULT_IMAGE


def _claim_any(name: str) -> Claim:
    for number in range(1, _NAMES_MAX):
        try:
            return Claim(name if number == 1 else f"{name}-{number}", detached=True)
        except HostError:
            continue
    raise HostError("too many machines run without a name", mend="give this one a --name")
