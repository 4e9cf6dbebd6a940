"""Platforms: which hypervisor's interface a guest finds. See docs/platforms.md."""

from tetrarch._native import GuestCall, GuestFault, GuestTrap, RegisterPortAccess
from tetrarch.platforms.pc import PC
from tetrarch.platforms.platform import (
    Hypercalls,
    Msr,
    Platform,
    PlatformDevice,
    RegisterPort,
    SystemIdentity,
    TrapHook,
)

__all__ = [
    "PC",
    "GuestCall",
    "GuestFault",
    "GuestTrap",
    "Hypercalls",
    "Msr",
    "Platform",
    "PlatformDevice",
    "RegisterPort",
    "RegisterPortAccess",
    "SystemIdentity",
    "TrapHook",
]
