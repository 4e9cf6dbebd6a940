"""Runs a program that sees a directory as it is to be served: ``confined.py DIR ro|rw -- PROGRAM``.

Without root the program gets a user namespace in which the user is root, and may make the
namespaces of its own sandbox. With ``ro`` the directory, with all that is mounted in it, is
read-only in a mount namespace of its own: the kernel refuses what a guest has written there,
whatever it asks of the program. Runs as a script, with nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import struct
import sys
from pathlib import Path

__all__ = ["main"]

# clone(2), mount(2), mount_setattr(2), as in linux/sched.h, linux/mount.h and linux/fcntl.h.
CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY = 1
MOUNT_SETATTR = 442  # on every architecture

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        sys.exit(f"cannot {what}: {os.strerror(ctypes.get_errno())}")


def _become_root() -> None:
    """In a user namespace."""
    user, group = os.geteuid(), os.getegid()
    lent = _lent_groups(user) if set(os.getgroups()) - {group} else None
    if lent is None:
        _check(_libc.unshare(CLONE_NEWUSER), "make a user namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    else:
        # QEMU's virtiofsd gives up what further groups there are, which only a namespace with
        # groups of newgidmap(1) lets it do.
        _unshare_with_groups(["0", str(group), "1", "1", *lent])
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")


def _lent_groups(user: int) -> list[str] | None:
    """The first and the number of those that the host lends to the user (subgid(5))."""
    if shutil.which("newgidmap") is None:
        return None
    try:
        names = {str(user), pwd.getpwuid(user).pw_name}
        lines = Path("/etc/subgid").read_text().splitlines()
    except (KeyError, OSError):
        return None
    entries = (line.split(":") for line in lines)
    return next((entry[1:] for entry in entries if len(entry) == 3 and entry[0] in names), None)


def _unshare_with_groups(groups: list[str]) -> None:
    unshared, tell = os.pipe()
    command = ["newgidmap", str(os.getpid()), *groups]
    child = os.fork()
    if child == 0:
        os.close(tell)
        os.read(unshared, 1)
        os.execvp(command[0], command)
    _check(_libc.unshare(CLONE_NEWUSER), "make a user namespace")
    os.close(tell)
    os.close(unshared)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("cannot use the groups of /etc/subgid: newgidmap refuses them")
    os.setgroups([])


def _make_readonly(directory: bytes) -> None:
    _check(_libc.unshare(CLONE_NEWNS), "make a mount namespace")
    none = b"none"
    _check(_libc.mount(none, b"/", none, MS_REC | MS_PRIVATE, None), "keep mounts apart")
    _check(_libc.mount(directory, directory, none, MS_BIND | MS_REC, None), "bind the directory")
    # struct mount_attr: to set, to clear, propagation, user namespace.
    attributes = struct.pack("<4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    result = _libc.syscall(
        MOUNT_SETATTR, AT_FDCWD, directory, AT_RECURSIVE, attributes, len(attributes)
    )
    _check(result, "make the directory read-only (Linux 5.12 or later can)")


def main(arguments: list[str]) -> None:
    directory, mode, _, *program = arguments
    if os.geteuid() != 0:
        _become_root()
    if mode == "ro":
        _make_readonly(os.fsencode(directory))
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
