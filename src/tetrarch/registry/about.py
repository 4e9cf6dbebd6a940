"""What the registry says of a machine: the file ``machine.json`` in its directory."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

__all__ = ["About"]


class About(BaseModel):
    """Written when the machine's process starts and when its machine runs; not kept up to date
    beyond that: what changes, the machine is asked for.

    Fields that a newer version wrote are passed over.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    pid: int
    """Of the machine's process."""
    started: float = 0.0
    """When the process claimed its name, in seconds since 1970 (UTC)."""
    ready: bool = False
    """The machine has come to run."""
    detached: bool = False
    engine: str = ""
    cpus: int = 0
    memory: int = 0
    """In bytes."""
    guest: str = ""
    """What it booted: the kernel's path, or what its user named."""
    control: Path | None = None
    """The control socket."""
    console: Path | None = None
    """The socket of the console; None where the console goes elsewhere."""
    console_goes: str = ""
    """Where it goes then, as ``--console`` is written."""
    display: str = ""
    """Where viewers find its screen, as ``--display`` is written; empty where they do not."""
    vsock: Path | None = None
    log: Path | None = None
    sockets: tuple[Path, ...] = ()
    """Sockets at paths that the user gave, which a process that was killed leaves behind."""
    networks: tuple[Path, ...] = ()
    """Networks at such paths, which other machines may have joined."""
    socket_folder: Path | None = None
    """A directory of sockets that had to lie elsewhere, whose path would be too long here."""
