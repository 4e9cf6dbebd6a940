"""The engines there are, and which one a machine gets."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetrarch import _native
from tetrarch.errors import HostError
from tetrarch.machine.kvm import KvmProbe, probe_kvm

__all__ = ["ENGINES", "EngineInfo", "Lack", "choose", "engines"]

ENGINES = {
    "kvm": "the host CPU's virtualization, through /dev/kvm",
    "bt": "binary translation in user space; needs nothing of the host",
}
"""Name and description, the best first."""

# Engine bt translates for one vCPU.
_VCPUS_MAX = {"bt": 1}


@dataclass(frozen=True)
class Lack:
    """An optional part of an engine that this host does not have."""

    name: str
    lost: str


@dataclass(frozen=True)
class EngineInfo:
    name: str
    description: str
    reason: str | None
    """Why it cannot run here; None if it can."""
    note: str | None = None
    """What to know of it where it can run."""
    lacks: tuple[Lack, ...] = field(default=())

    @property
    def available(self) -> bool:
        return self.reason is None


def engines() -> list[EngineInfo]:
    """All engines, the best first."""
    return [_info(name, description) for name, description in ENGINES.items()]


def _info(name: str, description: str) -> EngineInfo:
    reason = _native.engine_available(name)
    if name != "kvm" or reason is not None:
        return EngineInfo(name, description, reason)
    probe = probe_kvm()
    lacks = tuple(Lack(cap, lost) for cap, there, lost in _native.kvm_capabilities() if not there)
    return EngineInfo(name, description, probe.reason, _note(probe), lacks)


def _note(probe: KvmProbe) -> str | None:
    if probe.reason is not None:
        return None
    if probe.hardware:
        return "hardware-backed"
    return f"no hardware is behind it: {probe.slowness}"


def choose(name: str, cpus: int = 1) -> tuple[str, str]:
    """The engine to use for ``name``, which may be "auto", and why it is that one."""
    if name == "auto":
        return _best(cpus)
    reason = _native.engine_available(name)
    if reason is not None:
        raise HostError(f"engine {name} cannot be used: {reason}{_other(name, reason)}")
    limit = _VCPUS_MAX.get(name)
    if limit is not None and cpus > limit:
        raise HostError(
            f"engine {name} runs {limit} CPU, not {cpus}; give --cpus {limit}, or --engine kvm"
        )
    return name, "as asked"


def _other(name: str, reason: str) -> str:
    for other in ENGINES:
        if other != name and _native.engine_available(other) is None:
            return f"; or use --engine {other}" if ";" in reason else f"; use --engine {other}"
    return "" if ";" in reason else "; use another host"


def _best(cpus: int) -> tuple[str, str]:
    probe = probe_kvm()
    if probe.reason is None and probe.hardware:
        return "kvm", "the best of this host"
    why_not = probe.reason or f"slower than bt here, {_note(probe)}"
    if cpus > _VCPUS_MAX["bt"] and probe.reason is None:
        return "kvm", f"bt runs 1 CPU; {_note(probe)}"
    unusable = _native.engine_available("bt")
    if unusable is not None:
        if probe.reason is None:
            return "kvm", f"not bt: {unusable}"
        raise HostError(
            f"no engine can run on this host (kvm: {why_not}; bt: {unusable}); use another host"
        )
    if cpus > _VCPUS_MAX["bt"]:
        raise HostError(
            f"{cpus} CPUs need engine kvm, which cannot be used: {why_not}; or give --cpus 1"
        )
    return "bt", f"not kvm: {why_not}"
