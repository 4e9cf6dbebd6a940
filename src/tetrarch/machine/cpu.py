"""What the guest's CPU has: all that an engine offers, or what all engines of this host offer."""

from __future__ import annotations

from tetrarch import _native
from tetrarch.machine.config import MIB
from tetrarch.machine.kvm import engine_unusable
from tetrarch.machine.selection import ENGINES
from tetrarch.platforms.platform import Platform

__all__ = ["portable_features"]


def portable_features(platform: Platform) -> dict[str, int]:
    """Words of CPUID, as a saved machine has them, with what it finds on each engine that this
    host has."""
    common: dict[str, int] = {}
    for engine in ENGINES:
        if engine_unusable(engine) is not None:
            continue
        try:
            vm = _native.Vm(engine, MIB, translate=False, platform=platform)
        except _native.EngineError:
            continue  # It cannot have the platform: no such machine goes there.
        for word, bits in vm.cpu_features():
            common[word] = common.get(word, bits) & bits
    return common
