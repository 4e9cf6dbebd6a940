"""What the guest's CPU is: all that an engine offers, what all engines of this host offer, or a
model that other hosts have, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tetrarch import _native
from tetrarch.errors import HostError
from tetrarch.machine.config import MIB
from tetrarch.machine.cpu_spec import CpuSpec
from tetrarch.machine.kvm import engine_unusable, probe_kvm
from tetrarch.machine.selection import ENGINES
from tetrarch.platforms.platform import Platform

if TYPE_CHECKING:
    from tetrarch.machine.engine_vm import EngineVm

__all__ = ["GuestCpu", "Lacking", "cpu_for", "lacking", "maker"]


@dataclass(frozen=True)
class GuestCpu:
    """What a CPU says that it is."""

    vendor: str
    """As CPUID's leaf 0 has it."""
    signature: int
    """Family, model and stepping as EAX of leaf 1 has them."""
    words: Mapping[str, int]
    """Words of CPUID that a guest relies on."""

    @classmethod
    def of(cls, vm: EngineVm) -> Self:
        return cls(*vm.cpu_identity(), dict(vm.cpu_features()))


@dataclass(frozen=True)
class Lacking:
    """Why an engine cannot give a CPU here; features by their names."""

    host: tuple[str, ...]
    """What this host's CPU has not, nor the engine by itself."""
    engine: tuple[str, ...]
    """What the engine does not give, though the host's CPU has it."""
    other_vendor: str | None = None
    """Whose CPU it is, where the host's is another's."""

    def __bool__(self) -> bool:
        return bool(self.host or self.engine or self.other_vendor)


def maker(vendor: str) -> str:
    """Who makes CPUs that call their vendor so."""
    return {"GenuineIntel": "Intel", "AuthenticAMD": "AMD", "HygonGenuine": "Hygon"}.get(
        vendor, vendor
    )


def cpu_for(spec: CpuSpec, engine: str, platform: Platform) -> GuestCpu | None:
    """What a machine's CPU is to be; None is all that the engine offers.

    Raises HostError where the host or the engine lacks something.
    """
    offered = None if spec == CpuSpec() else _offered(spec, engine, platform)
    if offered is None:  # or the engine cannot be had, and says why when the machine is made
        return None
    if lacks := _lacking(spec, offered):
        raise _refusal(spec, engine, platform, lacks, offered.vendor)
    if spec == CpuSpec("portable"):
        return offered
    from tetrarch.machine.cpu_models import model_named, needing, optional_features, words_of

    removed = needing(spec.removed)
    if spec.name in ("host", "portable"):
        gone = words_of(removed, offered.vendor)
        words = {word: bits & ~gone.get(word, 0) for word, bits in offered.words.items()}
        return GuestCpu(offered.vendor, offered.signature, words)
    signature = model_named(spec.name).signature
    words = words_of(_required(spec) | (optional_features() - removed), offered.vendor)
    return GuestCpu(offered.vendor, offered.signature if signature is None else signature, words)


def lacking(spec: CpuSpec, engine: str, platform: Platform) -> Lacking:
    """What is missing for such a CPU; nothing where the engine cannot be had at all."""
    offered = _offered(spec, engine, platform)
    return Lacking((), ()) if offered is None else _lacking(spec, offered)


def _offered(spec: CpuSpec, engine: str, platform: Platform) -> GuestCpu | None:
    """What there is to choose from, if the engine can be had."""
    found: GuestCpu | None = None
    for name in ENGINES if spec.name == "portable" else (engine,):
        if engine_unusable(name) is not None:
            continue
        try:
            own = GuestCpu.of(_native.Vm(name, MIB, translate=False, platform=platform))
        except _native.EngineError:
            continue  # It cannot have the platform: no such machine goes there.
        if found is not None:
            common = {word: bits & found.words.get(word, bits) for word, bits in own.words.items()}
            own = GuestCpu(own.vendor, own.signature, common)
        found = own
    return found


def _required(spec: CpuSpec) -> frozenset[str]:
    """The features that it has to have."""
    from tetrarch.machine.cpu_models import model_named, needing, with_needs

    base = frozenset[str]()
    if spec.name not in ("host", "portable"):
        base = model_named(spec.name).features
    return with_needs(base.union(spec.added)) - needing(spec.removed)


def _lacking(spec: CpuSpec, offered: GuestCpu) -> Lacking:
    from tetrarch.machine.cpu_models import cpu_models, feature_names, words_of

    model = cpu_models().get(spec.name)
    if model is not None and model.vendor not in (None, offered.vendor):
        return Lacking((), (), model.vendor)
    wanted = words_of(_required(spec), offered.vendor)
    missing = {word: bits & ~offered.words.get(word, 0) for word, bits in wanted.items()}
    # What XCR0 may have follows from the features; it is told where nothing else is.
    if any(bits for word, bits in missing.items() if word != "D.EAX"):
        missing["D.EAX"] = 0
    host = dict(_native.host_cpu_features())
    of_host = {word: bits & ~host.get(word, 0) for word, bits in missing.items()}
    of_engine = {word: bits & host.get(word, 0) for word, bits in missing.items()}
    return Lacking(tuple(feature_names(of_host)), tuple(feature_names(of_engine)))


def _refusal(
    spec: CpuSpec, engine: str, platform: Platform, lacks: Lacking, vendor: str
) -> HostError:
    from tetrarch.machine.cpu_models import cpu_models, needing, roots

    if lacks.other_vendor is not None:
        own = next((one.name for one in cpu_models().values() if one.vendor == vendor), None)
        such = "" if own is None else f", or one of {maker(vendor)}'s, such as {own}"
        return HostError(
            f"cpu {spec}: it is a CPU of {maker(lacks.other_vendor)}'s, and this host's is "
            f"{maker(vendor)}'s",
            mend=f"give x86-64-v2 or x86-64-v3, which are of any{such}",
        )
    said = [f"this host's CPU has no {', '.join(lacks.host)}"] if lacks.host else []
    said += [f"engine {engine} has no {', '.join(lacks.engine)}"] if lacks.engine else []
    missing = roots(frozenset((*lacks.host, *lacks.engine)))
    gone = needing(missing)
    added = tuple(name for name in spec.added if name not in gone)
    own_features = _required(CpuSpec(spec.name))
    removed = (*spec.removed, *(name for name in missing if name in own_features))
    mends = [f"give {CpuSpec(spec.name, added, removed)}"]
    if engine == "bt" and spec.name != "portable" and probe_kvm().hardware:
        offered = _offered(spec, "kvm", platform)
        if offered is not None and not _lacking(spec, offered):
            mends.insert(0, "use engine kvm, which has them")
    return HostError(f"cpu {spec}: {', and '.join(said)}", mend=", or ".join(mends))
