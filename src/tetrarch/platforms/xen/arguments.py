"""Structures that a hypercall's arguments point to, in the calling guest's linear memory."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from tetrarch._native import GuestFault
from tetrarch.platforms.xen.errno import EFAULT

if TYPE_CHECKING:
    from tetrarch._native import GuestCall

__all__ = [
    "HypercallError",
    "domid_is_own",
    "own_domid",
    "physical",
    "read",
    "read_bytes",
    "write",
]

#: The calling domain (public/xen.h).
_DOMID_SELF: Final = 0x7FF0
_LINEAR_MASK: Final = (1 << 64) - 1
_PAGE: Final = 4096


class HypercallError(Exception):
    """Ends a hypercall with an error number of ``errno``."""

    def __init__(self, error: int) -> None:
        super().__init__(error)
        self.error = error


def read_bytes(call: GuestCall, linear: int, length: int) -> bytes:
    """Raises HypercallError, EFAULT, where not all of it is mapped."""
    data = call.read(linear & _LINEAR_MASK, length)
    if len(data) != length:
        raise HypercallError(EFAULT)
    return data


def read(call: GuestCall, linear: int, form: struct.Struct) -> tuple[Any, ...]:
    return form.unpack(read_bytes(call, linear, form.size))


def physical(call: GuestCall, linear: int) -> int:
    """Where what the guest itself could write lies. Raises HypercallError, EFAULT."""
    try:
        return call.access(linear & _LINEAR_MASK, True)
    except GuestFault as fault:
        raise HypercallError(EFAULT) from fault


def write(call: GuestCall, linear: int, data: bytes) -> None:
    """Raises HypercallError, EFAULT, where the guest itself could not write."""
    at = 0
    while at < len(data):
        length = min(len(data) - at, _PAGE - (linear + at) % _PAGE)
        call.vm.write_memory(physical(call, linear + at), data[at : at + length])
        at += length


def own_domid(domid: int, own: int) -> int:
    """``domid``, where it may be a word for the caller."""
    return own if domid == _DOMID_SELF else domid


def domid_is_own(domid: int, own: int) -> bool:
    return own_domid(domid, own) == own
