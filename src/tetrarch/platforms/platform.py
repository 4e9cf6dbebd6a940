"""A platform as a value: what a guest finds on the CPU beside the CPU.

Handlers are called on the thread of the vCPU, with a ``GuestCall``: the vCPU as it was before
the instruction. ``call["rax"]`` reads a register and sets it; RIP left alone moves behind the
instruction. A handler may raise ``GuestFault`` for an exception in the guest; any other
exception stops the machine and comes out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from uuid import UUID

    from tetrarch._native import GuestCall, GuestTrap, RegisterPortAccess, XenDomain
    from tetrarch.machine.engine_vm import EngineVm
    from tetrarch.platforms.vmware import Vmware
    from tetrarch.platforms.xen import Xen

__all__ = [
    "Hypercalls",
    "Msr",
    "Platform",
    "PlatformDevice",
    "RegisterPort",
    "SystemIdentity",
    "TrapHook",
]

Registers = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""
Leaf = Registers | Callable[[int], Registers]
# A Mapping is invariant in its keys: each kind that a dict display may have is named.
Leaves = Mapping[int, Leaf] | Mapping[tuple[int, int], Leaf] | Mapping[int | tuple[int, int], Leaf]
Handled = TypeVar("Handled")
Numbered = Mapping[int, Handled] | Mapping[range, Handled] | Mapping[int | range, Handled]


@dataclass(frozen=True)
class Hypercalls:
    """VMCALL and VMMCALL, on CPUs of either vendor."""

    handler: Callable[[GuestCall], int | None]
    """What it returns goes to RAX; None: RAX stays as the handler left it."""
    user_mode: bool = False
    """From user mode too; else that is #UD."""
    native: XenDomain | None = None
    """What answers the most frequent ones before ``handler`` is asked."""


@dataclass(frozen=True)
class Msr:
    """Model-specific registers. Without a handler the access is #GP(0)."""

    read: Callable[[GuestCall, int], int] | None = None
    write: Callable[[GuestCall, int, int], None] | None = None


@dataclass(frozen=True)
class RegisterPort:
    """I/O ports whose handler sees the registers."""

    handler: Callable[[GuestCall, RegisterPortAccess], int | None]
    """What it returns for an input goes to AL, AX or EAX."""
    any_privilege: bool = False
    """User programs reach it whatever IOPL and the I/O permission map say."""


@dataclass(frozen=True)
class TrapHook:
    """Events of a guest kernel that runs deprivileged, in ring 3.

    The handler sets the registers where the guest is to go on, system registers too. To have an
    exception delivered through the guest's IDT after all, it raises it.
    """

    handler: Callable[[GuestCall, GuestTrap], int | None]
    exceptions: frozenset[int] = frozenset()
    """Vectors, 0-31."""
    syscall: bool = False


@dataclass(frozen=True)
class SystemIdentity:
    """What SMBIOS says of the machine (DSP0134, 7.2)."""

    vendor: str = "Tetrarch"
    product: str = "Tetrarch PC"
    version: str = ""
    serial: str = ""
    uuid: UUID | None = None


class PlatformDevice(Protocol):
    """A part of the platform that has a state; saved, loaded and reset as a device's."""

    def reset(self) -> None: ...
    def save(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What a guest interface adds to the bare CPU; the default adds nothing.

    A key of ``cpuid`` is a leaf or (leaf, subleaf); a value is four registers, or a function
    that gives them for a vCPU's number. Keys of ``msrs`` and ``ports`` are numbers or ranges.
    """

    name: str
    kvm: bool = False
    """KVM's own interface from leaf 0x40000000 on: clock, hypercalls and the rest. The engine
    has it: ``kvm`` from the kernel, ``bt`` the same in Rust."""
    cpuid: Leaves = field(default_factory=dict)
    msrs: Numbered[Msr] = field(default_factory=dict)
    hypercalls: Hypercalls | None = None
    """A platform with hypercalls of its own takes all of them, KVM's too."""
    ports: Numbered[RegisterPort] = field(default_factory=dict)
    trap_hook: TrapHook | None = None
    start: Callable[[EngineVm, dict[str, int]], dict[str, int]] | None = None
    """Changes what vCPU 0 starts with: takes its registers as the boot protocol has set them, and
    returns those to be set. What it writes to memory lies over what was loaded."""
    identity: Callable[[], SystemIdentity] = SystemIdentity
    devices: Mapping[str, PlatformDevice] = field(default_factory=dict)
    """Parts with a state, by the name that it is saved under. They belong to one machine, and so
    does such a platform."""
    vmware: Vmware | None = None
    """What a machine on VMware's platform offers to the host."""
    xen: Xen | None = None
    """What a machine on Xen's platform is to be connected with."""
