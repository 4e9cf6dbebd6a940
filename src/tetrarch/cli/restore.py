"""``tetrarch run --restore FILE``: a machine that goes on as it was saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tetrarch.errors import ConfigError
from tetrarch.machine.machine import Machine
from tetrarch.machine.snapshot import about_of
from tetrarch.sockets import SocketDirectory

if TYPE_CHECKING:
    from tetrarch.cli.options import CommandOptions
    from tetrarch.console import ConsoleBackend
    from tetrarch.machine.config import MachineConfig

__all__ = ["check_restore", "restored", "with_own_vsock"]

#: What is the host's, and so is given anew; all else is the saved machine's.
_HOSTS: Final = (
    "engine",
    "name",
    "disk",
    "cdrom",
    "floppy",
    "net",
    "vsock",
    "virtio_console",
    "firmware",
    "control",
    "gdb",
    "gdb_wait",
    "display",
)
_OF_BOOTING: Final = ("snapshot", "user", "ssh_key", "hostname", "run")


def check_restore(config: MachineConfig, options: CommandOptions) -> None:
    """Raises ConfigError for options that only a machine which boots can have."""
    of_machine = sorted(config.model_fields_set.difference(_HOSTS, ("console",)))
    of_command = [name for name in _OF_BOOTING if getattr(options, name)]
    for name in (*of_machine, *of_command):
        raise ConfigError(
            f"--{name.replace('_', '-')} and --restore do not go together:"
            " the saved machine is what it was",
            mend="leave one of them out",
        )
    if options.command:
        raise ConfigError(
            "--restore and a command do not go together",
            mend="give the machine a --name, then run the command in it with tetrarch exec",
        )


@contextmanager
def with_own_vsock(path: Path, config: MachineConfig) -> Iterator[MachineConfig]:
    """``config`` with a socket for the vsock that the saved machine had, where nobody has named
    one: its guest's agent goes on, and nobody calls it."""
    had = about_of(path).outside.options["vsock"]
    if not had or config.vsock is not None:
        yield config
        return
    with SocketDirectory() as folder:
        yield config.model_copy(update={"vsock": folder / "vsock"})


def restored(
    path: Path, config: MachineConfig, options: CommandOptions, console: ConsoleBackend
) -> Machine:
    """The machine that was saved, with what ``config`` gives it of this host."""
    given = {name: getattr(config, name) for name in _HOSTS if name in config.model_fields_set}
    return Machine.restore(
        path,
        console=console,
        fresh_identity=options.fresh_identity,
        changed_disks=options.allow_changed_disks,
        **given,
    )
