"""HYPERVISOR_hvm_op (xen/include/public/hvm/hvm_op.h and params.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from tetrarch.platforms.xen.arguments import domid_is_own, read, write
from tetrarch.platforms.xen.errno import EINVAL, ENOSYS, ESRCH

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, XenDomain

__all__ = ["PARAMS", "HvmParameters"]

PARAMS: Final = 40
#: How events reach the guest; with a vector of each vCPU it is not asked any more.
_CALLBACK_IRQ: Final = 0
# domid_t, uint32_t index, uint64_t value.
_PARAM: Final = struct.Struct("<HxxIQ")
_VALUE_AT: Final = 8
_VECTOR: Final = struct.Struct("<IB3x")


class HvmParameters:
    """Numbers by which a guest and its hypervisor agree on pages and ports."""

    def __init__(self, domid: int, domain: XenDomain) -> None:
        self._domid = domid
        self._domain = domain
        self.values = [0] * PARAMS

    def __call__(self, call: GuestCall) -> int:
        command, argument = call["rdi"], call["rsi"]
        match command:
            case 0 | 1:  # HVMOP_set_param, HVMOP_get_param
                domid, index, value = read(call, argument, _PARAM)
                if not domid_is_own(domid, self._domid):
                    return ESRCH
                if index >= PARAMS:
                    return EINVAL
                if command == 1:
                    write(call, argument + _VALUE_AT, struct.pack("<Q", self.values[index]))
                elif index == _CALLBACK_IRQ:
                    self.values[index] = value
                else:
                    return EINVAL  # those of pages and ports are set by who builds the domain
                return 0
            case 23:  # HVMOP_set_evtchn_upcall_vector
                vcpu, vector = read(call, argument, _VECTOR)
                return self._domain.set_upcall_vector(vcpu, vector)
        return ENOSYS
