"""A CPU of another monitor's as ``--cpu`` writes it: QEMU and libvirt share names of models."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tetrarch.errors import ValueProblem
from tetrarch.foreign.carried import Carried
from tetrarch.machine.cpu_models import cpu_models, feature_named

__all__ = ["carry_cpu"]

#: All that the host has, or what says so little that all of it is no less.
_HOST = {"host", "max", "qemu64", "kvm64", "host-passthrough", "host-model", "maximum"}
#: Revisions of a model: its features less transactions, or with what microcode brought.
_REVISION = re.compile(r"(-noTSX|-IBRS|-IBPB|-v[0-9]{1,2})+$")
#: What says nothing of the guest's CPU.
_SATISFIED = {"migratable", "check", "enforce", "kvm", "hypervisor", "x2apic"}
#: What no engine gives a guest.
_NEVER = {"vmx", "svm", "smx", "monitor", "perfctr_core", "perfctr_nb", "pdcm"}


def carry_cpu(
    carried: Carried, name: str, changes: Iterable[tuple[str, bool]], source: str
) -> None:
    """``changes`` are features, on or off. What cannot be is lost by its name."""
    known = _REVISION.sub("", name)
    if name in _HOST:
        spec = "host"
    elif known in cpu_models():
        spec = known
        if known != name:
            carried.lose(f"{source} {name}", f"it is {known}, as docs/cpu.md says")
    else:
        carried.lose(f"{source} {name}", "the guest sees the host's CPU")
        spec = "host"
    wanted: dict[str, str] = {}
    for feature, on in changes:
        try:
            ours = feature_named(feature)
        except ValueProblem:
            ours = ""
        if (feature in _SATISFIED and on) or (ours in _NEVER and not on):
            continue
        if not ours or ours in _NEVER:
            carried.lose(f"{source} {feature}", "no engine shows it" if ours else "")
        else:
            wanted[ours] = "+" if on else "-"
    spec += "".join(f",{sign}{feature}" for feature, sign in wanted.items())
    if spec != "host":
        carried.set("cpu", spec, f"{source} {name}")
