"""Why a user may not open a device, and what grants it with the least rights.

The kernel asks in this order (acl(5), "Access check algorithm"): the owner's bits if the user owns
the file; an entry of the access list that names the user; the group's bits and the entries of
groups if the user is in one of them; the bits of all others. The first that applies decides.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shlex
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Node", "User", "may_open", "mend", "this_user"]

_READ_WRITE = 6
# linux/posix_acl_xattr.h: a version, then tag, permissions and id of each entry.
_ACL = "system.posix_acl_access"
_ACL_HEADER = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK = 0x02, 0x04, 0x08, 0x10

# The group that udev gives /dev/kvm to, made for nothing else. No other group is safe to join: what
# else its members may do is not ours to say, least of all root's.
GROUP = "kvm"


@dataclass(frozen=True)
class Node:
    """A device as the file system has it."""

    path: str
    uid: int
    gid: int
    mode: int
    acl: tuple[tuple[int, int, int], ...] = ()
    """Tag, permissions and id of each entry; empty without an access list."""

    @classmethod
    def of(cls, path: str) -> Node:
        seen = os.stat(path)
        return cls(path, seen.st_uid, seen.st_gid, seen.st_mode, tuple(_read_acl(path)))

    @property
    def group_bits(self) -> int:
        """What the owning group gets. Under an access list the mode shows the mask instead."""
        for tag, bits, _ in self.acl:
            if tag == _ACL_GROUP_OBJ:
                return bits & self._mask
        return self.mode >> 3 & 7

    @property
    def _mask(self) -> int:
        return next((bits for tag, bits, _ in self.acl if tag == _ACL_MASK), 7)

    def entry_of(self, uid: int) -> int | None:
        """What the access list gives this user by name."""
        for tag, bits, who in self.acl:
            if tag == _ACL_USER and who == uid:
                return bits & self._mask
        return None


@dataclass(frozen=True)
class User:
    """Who asks, and the groups of this process."""

    uid: int
    name: str
    groups: frozenset[int]
    listed: frozenset[int] = field(default=frozenset())
    """The groups that the user data base has: those of the next login."""


def this_user() -> User:
    uid = os.geteuid()
    groups = frozenset({os.getegid(), *os.getgroups()})
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return User(uid, str(uid), groups)
    listed = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return User(uid, entry.pw_name, groups, listed)


def may_open(path: str) -> bool:
    """Whether the kernel grants reading and writing; also where a container's rules refuse it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EPERM)
    return True


def mend(node: Node, user: User) -> str:
    """What to type so that ``user``, who is refused, may read and write ``node``."""
    if user.uid == 0:
        # File permissions do not bind root: the device rules of a container or a nodev mount do.
        return f"allow the device where this container was started: --device {node.path}"
    path, name = shlex.quote(node.path), shlex.quote(user.name)
    if node.uid == user.uid:
        return f"chmod u+rw {path}"
    entry = f"sudo setfacl -m u:{name}:rw {path}"
    if shutil.which("setfacl") is None:
        entry += " (of the package acl)"
    try:
        gid = grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return entry
    if node.entry_of(user.uid) is not None:
        return entry  # it comes before what a group grants
    steps = []
    if node.gid != gid:
        steps.append(f"sudo chgrp {GROUP} {path}")
    if node.gid != gid or not _allows(node.group_bits):
        steps.append(f"sudo chmod 660 {path}")
    if gid not in user.groups | user.listed:
        steps.append(f"sudo usermod -aG {GROUP} {name}")
    by_group = " && ".join(steps)
    if gid not in user.groups:
        by_group += f"{', then ' if steps else ''}log in anew, for the group {GROUP}"
    # Where the device is the group's as udev makes it, that is the whole answer.
    if node.gid == gid and _allows(node.group_bits):
        return by_group
    return f"{entry}; or for the group {GROUP}: {by_group}"


def _allows(bits: int) -> bool:
    return bits & _READ_WRITE == _READ_WRITE


def _read_acl(path: str) -> Iterator[tuple[int, int, int]]:
    try:
        data = os.getxattr(path, _ACL)
    except OSError:  # none, or a file system without
        return
    yield from _ACL_ENTRY.iter_unpack(data[_ACL_HEADER.size :])
