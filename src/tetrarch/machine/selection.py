"""The engines there are, and which one a machine gets."""

from __future__ import annotations

from dataclasses import dataclass

from tetrarch import _native
from tetrarch.errors import HostError

__all__ = ["ENGINES", "EngineInfo", "choose", "engines"]

ENGINES = {
    "kvm": "the host CPU's virtualization, through /dev/kvm",
    "bt": "binary translation in user space; needs nothing of the host",
}
"""Name and description, the best first."""

# What no version of this program offers yet, whatever the host has.
_NOT_BUILT = {"kvm": "this version of tetrarch does not have it yet"}


@dataclass(frozen=True)
class EngineInfo:
    name: str
    description: str
    reason: str | None
    """Why it cannot run here; None if it can."""

    @property
    def available(self) -> bool:
        return self.reason is None


def engines() -> list[EngineInfo]:
    """All engines, the best first."""
    return [
        EngineInfo(name, description, _NOT_BUILT.get(name) or _native.engine_available(name))
        for name, description in ENGINES.items()
    ]


def choose(name: str) -> tuple[str, str]:
    """The engine to use for ``name``, which may be "auto", and why it is that one."""
    known = {info.name: info for info in engines()}
    if name != "auto":
        info = known[name]
        if info.reason is not None:
            usable = [other.name for other in known.values() if other.available]
            mend = f"use --engine {usable[0]}" if usable else "use another host"
            raise HostError(f"engine {name} cannot be used: {info.reason}; {mend}")
        return name, "as asked"
    passed_over: list[str] = []
    for info in known.values():
        if info.available:
            return info.name, "; ".join(passed_over) or "the best of this host"
        passed_over.append(f"not {info.name}: {info.reason}")
    raise HostError(f"no engine can run on this host ({'; '.join(passed_over)}); use another host")
