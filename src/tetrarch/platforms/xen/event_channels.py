"""HYPERVISOR_event_channel_op (xen/include/public/event_channel.h), but for send and unmask, which
are crates/xen's. Ports have the 2-level form: a guest that asks for FIFO queues falls back to it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tetrarch.platforms.xen.arguments import domid_is_own, own_domid, read, write
from tetrarch.platforms.xen.errno import EINVAL, ENOSYS, ESRCH

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, XenDomain

__all__ = ["EventChannels"]

_TWO_DOMIDS: Final = struct.Struct("<HHI")
_DOMID_PORT: Final = struct.Struct("<HxxI")
_TWO_NUMBERS: Final = struct.Struct("<II")
_NUMBER: Final = struct.Struct("<I")
_DOMID: Final = struct.Struct("<H")
_UNBOUND: Final = 1
_INTERDOMAIN: Final = 2


class EventChannels:
    def __init__(self, domid: int, domain: XenDomain) -> None:
        self._domid = domid
        self._domain = domain
        self._operations = {
            0: self._bind_interdomain,
            1: self._bind_virq,
            3: self._close,
            5: self._status,
            6: self._allocate_unbound,
            7: self._bind_ipi,
            8: self._bind_vcpu,
            10: self._reset,
        }

    def __call__(self, call: GuestCall) -> int:
        operation = self._operations.get(call["rdi"])
        return ENOSYS if operation is None else operation(call, call["rsi"])

    def _allocate_unbound(self, call: GuestCall, argument: int) -> int:
        domid, remote, _ = read(call, argument, _TWO_DOMIDS)
        if not domid_is_own(domid, self._domid):
            return ESRCH
        port = self._domain.allocate_unbound(own_domid(remote, self._domid))
        return _gives(call, argument + 4, port)

    def _bind_interdomain(self, call: GuestCall, argument: int) -> int:
        domid, remote_port = read(call, argument, _DOMID_PORT)
        if not domid_is_own(domid, self._domid):
            return ESRCH  # there is no other domain
        return _gives(call, argument + 8, self._domain.bind_own(self._domid, remote_port))

    def _bind_virq(self, call: GuestCall, argument: int) -> int:
        virq, vcpu = read(call, argument, _TWO_NUMBERS)
        return _gives(call, argument + 8, self._domain.bind_virq(virq, vcpu))

    def _bind_ipi(self, call: GuestCall, argument: int) -> int:
        (vcpu,) = read(call, argument, _NUMBER)
        return _gives(call, argument + 4, self._domain.bind_ipi(vcpu))

    def _bind_vcpu(self, call: GuestCall, argument: int) -> int:
        port, vcpu = read(call, argument, _TWO_NUMBERS)
        return self._domain.bind_vcpu(port, vcpu)

    def _close(self, call: GuestCall, argument: int) -> int:
        (port,) = read(call, argument, _NUMBER)
        return self._domain.close(port)

    def _status(self, call: GuestCall, argument: int) -> int:
        domid, port = read(call, argument, _DOMID_PORT)
        if not domid_is_own(domid, self._domid):
            return ESRCH
        if not 0 <= port < self._domain.PORTS:
            return EINVAL
        kind, vcpu, detail = self._domain.status(port)
        if kind == _UNBOUND:
            words = struct.pack("<HxxI", detail, 0)
        elif kind == _INTERDOMAIN:
            words = struct.pack("<HxxI", self._domid, detail)
        else:
            words = struct.pack("<II", detail, 0)
        write(call, argument + 8, struct.pack("<II", kind, vcpu) + words)
        return 0

    def _reset(self, call: GuestCall, argument: int) -> int:
        (domid,) = read(call, argument, _DOMID)
        if not domid_is_own(domid, self._domid):
            return ESRCH
        for port in self._domain.open_ports():
            self._domain.close(port)
        return 0


def _gives(call: GuestCall, at: int, port: int) -> int:
    """Tells the guest its new port; an error is the call's result."""
    if port < 0:
        return port
    write(call, at, struct.pack("<I", port))
    return 0
