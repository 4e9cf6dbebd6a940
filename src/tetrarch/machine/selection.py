"""The engines there are, and which one a machine gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tetrarch import _native
from tetrarch.errors import HostError
from tetrarch.machine.kvm import KvmProbe, Unusable, engine_unusable, probe_kvm

if TYPE_CHECKING:
    from tetrarch.machine.config import MachineConfig

__all__ = ["ENGINES", "EngineInfo", "Lack", "choose", "chosen", "engines"]

ENGINES = {
    "kvm": "the host CPU's virtualization, through /dev/kvm",
    "bt": "binary translation in user space; needs nothing of the host",
}
"""Name and description, the best first."""

_VCPUS_MAX = {"bt": _native.BT_MAX_VCPUS}


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
    mend: str = ""
    """What to do about it."""
    note: str | None = None
    """What to know of it where it can run."""
    slow: bool = False
    """It runs, but far below the CPU's speed, so that another engine is the better one."""
    lacks: tuple[Lack, ...] = field(default=())

    @property
    def available(self) -> bool:
        return self.reason is None


def engines() -> list[EngineInfo]:
    """All engines, the best first."""
    return [_info(name, description) for name, description in ENGINES.items()]


def _info(name: str, description: str) -> EngineInfo:
    unusable, probe = _look_at(name)
    if unusable is not None:
        return EngineInfo(name, description, unusable.cause, unusable.mend)
    if probe is None:
        return EngineInfo(name, description, None)
    lacks = tuple(Lack(cap, lost) for cap, there, lost in _native.kvm_capabilities() if not there)
    note = "hardware-backed" if probe.hardware else _crawls(probe)
    return EngineInfo(name, description, None, "", note, not probe.hardware, lacks)


def _look_at(name: str) -> tuple[Unusable | None, KvmProbe | None]:
    """Why the engine cannot run, and for kvm what the probe saw."""
    unusable = engine_unusable(name)
    if name != "kvm" or unusable is not None:
        return unusable, None
    probe = probe_kvm()
    return probe.reason, probe


def _crawls(probe: KvmProbe) -> str:
    return f"no hardware is behind it: {probe.slowness}"


def choose(name: str, cpus: int = 1) -> tuple[str, str]:
    """The engine to use for ``name``, which may be "auto", and why it is that one."""
    if name == "auto":
        return _best(cpus)
    unusable, probe = _look_at(name)
    if unusable is not None:
        raise HostError(
            f"engine {name} cannot be used: {unusable.cause}", _or_another(name, unusable)
        )
    limit = _VCPUS_MAX.get(name)
    if limit is not None and cpus > limit:
        raise HostError(
            f"engine {name} runs {limit} CPUs at most, not {cpus}",
            f"ask for {limit}, or for engine kvm",
        )
    if probe is not None and not probe.hardware:
        return name, f"as asked, but {_crawls(probe)}; engine bt is faster"
    return name, "as asked"


def chosen(config: MachineConfig) -> tuple[str, str]:
    """The same for a machine."""
    cpus = config.cpus.max
    if config.engine == "auto" and (config.record or config.replay):
        name, _ = choose("bt", cpus)
        return name, "it records and replays"
    if config.engine == "auto" and config.chaos is not None:
        name, _ = choose("bt", cpus)
        return name, "it has chaos"
    if config.engine == "auto" and config.platform == "xen":
        name, _ = choose("bt", cpus)
        return name, "its platform is xen"
    return choose(config.engine, cpus)


def _or_another(name: str, unusable: Unusable) -> str:
    for other in ENGINES:
        if other != name and engine_unusable(other) is None:
            return f"{unusable.mend}; or use engine {other}"
    return unusable.mend


def _best(cpus: int) -> tuple[str, str]:
    probe, no_bt = probe_kvm(), engine_unusable("bt")
    no_kvm, too_many = probe.reason, cpus > _VCPUS_MAX["bt"]
    if no_kvm is None:
        if probe.hardware:
            return "kvm", "the best of this host"
        if too_many:
            return "kvm", f"bt runs {_VCPUS_MAX['bt']} CPUs at most; {_crawls(probe)}"
        if no_bt is not None:
            return "kvm", f"not bt: {no_bt.cause}"
        return "bt", f"not kvm: slower than bt here, {_crawls(probe)}"
    if no_bt is not None:
        raise HostError(
            f"no engine can run on this host (kvm: {no_kvm.cause}; bt: {no_bt.cause})",
            f"for kvm: {no_kvm.mend}; for bt: {no_bt.mend}",
        )
    if too_many:
        raise HostError(
            f"{cpus} CPUs need engine kvm, which cannot be used: {no_kvm.cause}",
            f"{no_kvm.mend}; or ask for {_VCPUS_MAX['bt']} at most",
        )
    return "bt", f"not kvm: {no_kvm.cause}; see tetrarch doctor"
