"""A machine's place in the registry, held by the machine's process.

    REGISTRY/lock               held for a moment by whoever adds or removes a machine
    REGISTRY/machines/NAME/     lock, machine.json, and the sockets control, console, vsock
    REGISTRY/log/NAME.log       stays when the machine has ended

The lock in a machine's directory says whether it lives: the kernel takes it from a process that
dies, at whatever point. A directory whose lock nobody holds is what a dead process left, and
whoever meets it removes it. Adding and removing exclude each other by the lock of the registry;
who only looks takes no lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from tetrarch._files import read_bounded
from tetrarch.errors import ConfigError, HostError
from tetrarch.registry.about import About
from tetrarch.registry.lock import is_locked, open_lock, take, try_take
from tetrarch.registry.place import registry_directory
from tetrarch.sockets import remove_dead_network, remove_dead_socket

__all__ = [
    "Claim",
    "check_name",
    "log_path",
    "machine_directory",
    "read_about",
    "remove_if_dead",
]

#: As MachineConfig has it: a name is a directory's, and no path.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Of the 107 bytes that the address of a socket holds (unix(7)), those before its name here.
_SOCKET_PLACE_MAX: Final = 90
#: A log that has grown to this is put aside at the next start.
_LOG_BYTES_MAX: Final = 1 << 20


class Claim:
    """A name that is this process's until ``close``, or its death."""

    def __init__(self, name: str, *, detached: bool = False) -> None:
        """Raises HostError where a machine of that name runs."""
        check_name(name)
        self.name = name
        self.directory = machine_directory(name)
        with _registry_lock():
            _remove_if_dead(name)
            if is_locked(self.directory / "lock"):
                raise _in_use(name)
            self.directory.mkdir(mode=0o700, parents=True)
            self._folders = [_held(self.directory)]
            self._lock = open_lock(self.directory / "lock")
            if not try_take(self._lock):
                raise _in_use(name)  # by something that is none of ours
            self._about = About(
                name=name,
                pid=os.getpid(),
                started=time.time(),
                detached=detached,
                log=log_path(name),
                socket_folder=_socket_folder(self.directory),
            )
            self._write()
        if self._about.socket_folder is not None:
            self._about.socket_folder.mkdir(mode=0o700)
            self._folders.append(_held(self._about.socket_folder))

    @property
    def about(self) -> About:
        return self._about

    def socket(self, name: str) -> Path:
        """Where a socket of the machine lies; its path fits an address."""
        return (self._about.socket_folder or self.directory) / name

    def describe(self, **fields: Any) -> None:
        """Writes down what the machine is."""
        self._about = self._about.model_copy(update=fields)
        self._write()

    def open_log(self) -> int:
        """A descriptor that appends to the machine's log. Raises HostError."""
        path = log_path(self.name)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if path.is_file() and path.stat().st_size > _LOG_BYTES_MAX:
                path.replace(path.with_suffix(".log.old"))
            # A FIFO that is there in its place would be waited for.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            return os.open(path, flags | os.O_CREAT, 0o600)
        except OSError as error:
            raise HostError(
                f"cannot write the machine's log {path}: {error.strerror}",
                mend="remove what is there, or give the machine another --name",
            ) from error

    def close(self) -> None:
        """Gives the name back. May be called twice."""
        if self._lock < 0:
            return
        with _registry_lock():
            _remove(self.directory, self._about)
            os.close(self._lock)
            self._lock = -1
            for descriptor in self._folders:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self) -> None:
        # Whoever reads meets the one or the other, and never half of it.
        new = self.directory / "machine.json.new"
        # ASCII: a path need not be text.
        new.write_text(json.dumps(self._about.model_dump(), indent=2, default=os.fspath) + "\n")
        new.replace(self.directory / "machine.json")


def check_name(name: str) -> None:
    """Raises ConfigError for what can be no machine's name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name of a machine",
            mend="use up to 64 letters, digits, '.', '_' and '-'",
        )


def machine_directory(name: str) -> Path:
    return registry_directory() / "machines" / name


def log_path(name: str) -> Path:
    return registry_directory() / "log" / f"{name}.log"


def read_about(name: str) -> About | None:
    """None where there is no such machine."""
    try:
        text = read_bounded(machine_directory(name) / "machine.json")
        return About.model_validate(json.loads(text))
    except (OSError, ValueError, RecursionError):
        return None


def remove_if_dead(name: str) -> None:
    """Removes what a process that died has left."""
    if not is_locked(machine_directory(name) / "lock"):
        with _registry_lock():
            _remove_if_dead(name)


def _remove_if_dead(name: str) -> None:
    directory = machine_directory(name)
    if directory.is_dir() and not is_locked(directory / "lock"):
        _remove(directory, read_about(name))


def _remove(directory: Path, about: About | None) -> None:
    if about is not None:
        for path in about.sockets:
            remove_dead_socket(path)
        for path in about.networks:
            remove_dead_network(path)
        if about.socket_folder is not None:
            shutil.rmtree(about.socket_folder, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)


def _held(directory: Path) -> int:
    """A descriptor that has it locked (flock(2)): what clears /tmp of old files passes over it
    then (tmpfiles.d(5), "Age")."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _socket_folder(directory: Path) -> Path | None:
    if len(os.fsencode(directory)) <= _SOCKET_PLACE_MAX:
        return None
    return Path(f"/tmp/tetrarch-{os.geteuid()}-{secrets.token_hex(8)}")


def _in_use(name: str) -> HostError:
    about = read_about(name)
    process = f" (process {about.pid})" if about is not None else ""
    return HostError(
        f"a machine named {name} runs already{process}",
        mend=f"give another --name, or end it: tetrarch stop {name}",
    )


@contextmanager
def _registry_lock() -> Iterator[None]:
    descriptor = open_lock(registry_directory() / "lock")
    try:
        take(descriptor)
        yield
    finally:
        os.close(descriptor)
