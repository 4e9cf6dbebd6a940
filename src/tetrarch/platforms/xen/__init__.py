"""Xen's interface, as its PVH guests use it. See docs/xen.md.

One file each: the leaves by which it is found, the page of hypercalls, and each hypercall. What a
guest calls per event or per tick is Rust's, crates/xen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from tetrarch._native import EngineError, XenDomain
from tetrarch.errors import StateError
from tetrarch.platforms.platform import Hypercalls, Msr, Platform
from tetrarch.platforms.xen.arguments import HypercallError
from tetrarch.platforms.xen.cpuid import HYPERCALL_PAGE_MSR, leaves
from tetrarch.platforms.xen.errno import EINVAL, ENOSYS, EPERM
from tetrarch.platforms.xen.event_channels import EventChannels
from tetrarch.platforms.xen.hypercall_page import write_hypercall_page
from tetrarch.platforms.xen.memory import Memory
from tetrarch.platforms.xen.parameters import PARAMS, HvmParameters
from tetrarch.platforms.xen.scheduling import Scheduling
from tetrarch.platforms.xen.vcpus import Vcpus
from tetrarch.platforms.xen.version import Version

if TYPE_CHECKING:
    from tetrarch._native import GuestCall, Vm

__all__ = ["Xen"]

#: The only guest is no Dom0.
DOMID: Final = 1
#: The MSR.
_TSC: Final = 0x10
#: The L bit of a code segment.
_LONG: Final = 1 << 13
#: VMASST_TYPE_runstate_update_flag: the guest is told while its runstate is written.
_RUNSTATE_UPDATE_FLAG: Final = 5


class Xen:
    """What one machine on this platform has beside its devices."""

    def __init__(self) -> None:
        self.domain = XenDomain()
        self._vm: Vm | None = None
        self._uuid = uuid4()
        self._parameters = HvmParameters(DOMID, self.domain)
        self._memory = Memory(DOMID, self.domain)
        self._scheduling = Scheduling()
        self._calls: dict[int, Callable[[GuestCall], int]] = {
            12: self._memory,
            17: self._version,
            21: _vm_assist,
            24: Vcpus(self.domain),
            29: self._scheduling,
            32: EventChannels(DOMID, self.domain),
            34: self._parameters,
        }

    def platform(self) -> Platform:
        return Platform(
            name="xen",
            cpuid=leaves(DOMID),
            msrs={HYPERCALL_PAGE_MSR: Msr(write=write_hypercall_page)},
            hypercalls=Hypercalls(self._hypercall, user_mode=True, native=self.domain),
            devices={"xen": self},
            xen=self,
        )

    def connect(
        self, vm: Vm, topology: tuple[int, int, int], ends: Mapping[int, Callable[[], None]]
    ) -> None:
        """``topology``: sockets, cores of each, threads of each. ``ends``: what a shutdown does,
        by its reason."""
        self._vm = vm
        self.domain.connect(vm, DOMID, topology)
        self._scheduling.ends = ends

    def reset(self) -> None:
        self.domain.reset()
        self._parameters.values = [0] * PARAMS
        self._memory.given_up.clear()

    def save(self) -> dict[str, Any]:
        return {
            "domain": self.domain.save(),
            "parameters": list(self._parameters.values),
            "given-up": sorted(self._memory.given_up),
            "uuid": self._uuid.hex,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises StateError."""
        try:
            self._load(state)
        except (AttributeError, EngineError, LookupError, TypeError, ValueError) as error:
            raise StateError("saved state of 'xen' is none", mend="save it again") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        uuid = UUID(state["uuid"])
        parameters, given_up = list(state["parameters"]), set(state["given-up"])
        if len(parameters) != PARAMS or not all(_is_number(value) for value in parameters):
            raise ValueError(parameters)
        pages = 0 if self._vm is None else max(at + size for at, size in self._vm.ram) >> 12
        if not all(_is_number(frame) and frame < pages for frame in given_up):
            raise ValueError(given_up)
        tsc = 0 if self._vm is None else self._vm.vcpu(0).msr(_TSC) or 0
        self.domain.load(dict(state["domain"]), tsc)
        self._parameters.values = parameters
        self._memory.given_up = given_up
        self._uuid = uuid

    def _version(self, call: GuestCall) -> int:
        return Version(self._uuid)(call)

    def _hypercall(self, call: GuestCall) -> int:
        if call.cpl != 0:
            return EPERM
        if not call["cs_attr"] & _LONG:
            return ENOSYS
        handler = self._calls.get(call["rax"] & 0xFFFF_FFFF)
        if handler is None:
            return ENOSYS
        try:
            return handler(call)
        except HypercallError as error:
            return error.error


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _vm_assist(call: GuestCall) -> int:
    """HYPERVISOR_vm_assist (public/xen.h)."""
    return 0 if call["rsi"] == _RUNSTATE_UPDATE_FLAG else EINVAL
