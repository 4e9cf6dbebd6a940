"""What ``tetrarch run`` gives up before its guest runs (crates/confine): ``--jail auto``."""

from __future__ import annotations

import contextlib
import logging
import os
import site
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tetrarch import _native
from tetrarch.boot.initrd import initrd_files
from tetrarch.console.spec import ConsoleSpec
from tetrarch.display.font import VGA_BIOS
from tetrarch.errors import HostError
from tetrarch.registry.place import registry_directory

if TYPE_CHECKING:
    from tetrarch.cli.options import CommandOptions
    from tetrarch.machine.config import MachineConfig
    from tetrarch.machine.machine import Machine
    from tetrarch.registry import Claim

__all__ = ["prepare", "seal"]

_LOG = logging.getLogger(__name__)

Access = Literal["read", "write", "remove", "remove directories", "sockets"]
Grant = tuple[Path, Access]

#: What Python and the C library read when they are asked for something for the first time.
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo")
_FILES = ("/etc/localtime", "/etc/ld.so.cache", "/dev/urandom", "/sys/devices/system/cpu")


def prepare(config: MachineConfig, options: CommandOptions) -> bool:
    """To be called while the process has one thread, before the machine is made.

    False: there is nothing to ``seal`` with.
    """
    if options.jail == "off":
        return False
    with contextlib.suppress(OSError):  # the host forbids it: doctor says so
        _native.own_user_namespace()
    sockets = [Path(net.target) for net in config.net if net.kind == "socket"]
    try:
        _native.confine_prepare(
            config.vsock is not None or bool(sockets),
            sorted({path.absolute().parent for path in sockets}),
        )
    except OSError as error:
        _LOG.warning("this machine is not jailed: %s; tetrarch doctor says more", error)
        return False
    return True


def seal(machine: Machine, options: CommandOptions, claim: Claim | None) -> None:
    """Has the machine confined when it starts."""

    def close() -> None:
        _load_what_comes_late()
        try:
            _native.confine_control(_grants(machine, options, claim), list(_children()))
        except OSError as error:
            raise HostError(
                f"this process cannot be confined: {error}", mend="run it with --jail off"
            ) from error

    machine.seal_with(close)


def _load_what_comes_late() -> None:
    """Modules that are first needed on threads which open no files."""
    import traceback  # noqa: F401 - for an exception of a device


def _grants(machine: Machine, options: CommandOptions, claim: Claim | None) -> list[Grant]:
    config = machine.config
    read = [sys.prefix, sys.base_prefix, *sys.path, *site.getsitepackages()]
    read += [*_LIBRARIES, *_FILES, str(Path(__file__).parents[1]), f"/proc/{os.getpid()}/task"]
    grants: list[Grant] = [(Path(path or ".").absolute(), "read") for path in read]
    grants.append((Path("/dev/null"), "write"))
    # A reset loads them again.
    grants += [(file.path, "read") for file in initrd_files(config.initrd)]
    grants += [(config.kernel, "read")] if config.kernel is not None else []
    # Its font is read when somebody asks for the screen first.
    grants += [(VGA_BIOS, "read")] if config.vga else []
    grants += [(path.absolute().parent, "remove") for path in _sockets(machine)]
    grants += [(path.absolute(), "write") for path in options.allow]
    if claim is not None:
        # A machine in the registry writes down what it is, and takes its name back at the end.
        folders = filter(None, (claim.directory, claim.about.socket_folder))
        for folder in folders:
            grants += [(folder, "write"), (folder.parent, "remove directories")]
        grants.append((registry_directory() / "lock", "write"))
        if claim.about.log is not None and claim.about.detached:  # it is opened when the guest runs
            log = claim.about.log.parent
            log.mkdir(mode=0o700, exist_ok=True)
            grants.append((log, "write"))
    # Our own directories for a time: of sockets, and of a disk for cloud-init.
    temporary = Path(tempfile.gettempdir())
    grants.append((temporary, "remove directories"))
    for disk in config.disk:
        if disk.path.parent.parent == temporary and disk.path.parent.name.startswith("tetrarch-"):
            grants.append((disk.path.parent, "remove"))
    return grants


def _sockets(machine: Machine) -> Iterator[Path]:
    """Names that go with the machine."""
    config = machine.config
    display = None if machine.display is None else machine.display.spec.place.path
    yield from (path for path in (config.control, config.vsock, display) if path is not None)
    consoles = [config.console, *(port.console for port in config.virtio_console)]
    for console in consoles:
        if isinstance(console, ConsoleSpec) and console.kind == "socket" and console.path:
            yield console.path
    yield from (Path(net.target) for net in config.net if net.kind == "socket")


def _children() -> Iterator[int]:
    """Programs that serve the machine, which are ended with it."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())
