"""The platforms that ``--platform`` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

from tetrarch.errors import ConfigError
from tetrarch.platforms.pc import PC
from tetrarch.platforms.platform import Platform

__all__ = ["PLATFORMS", "PlatformName", "kvm_has_backdoor", "named_platform"]

PlatformName = Literal["pc", "vmware", "xen"]

#: Whether the kvm module hands over what programs of the guest ask of VMware's port.
_KVM_BACKDOOR: Final = Path("/sys/module/kvm/parameters/enable_vmware_backdoor")


def named_platform(name: PlatformName, engine: str) -> Platform:
    """One for one machine, which ``engine`` can have."""
    return PLATFORMS[name](engine)


def kvm_has_backdoor() -> bool:
    """Whether programs of VMware's guests reach their port on engine ``kvm``."""
    try:
        return _KVM_BACKDOOR.read_text().strip() in ("Y", "1")
    except OSError:
        return False


def _vmware(engine: str) -> Platform:
    from tetrarch.platforms.vmware import Vmware

    # A kernel's KVM takes VMCALL and VMMCALL for its own calls.
    ours = engine != "kvm"
    return Vmware().platform(hypercalls=ours, any_privilege=ours or kvm_has_backdoor())


def _xen(engine: str) -> Platform:
    from tetrarch.platforms.xen import Xen

    if engine == "kvm":
        raise ConfigError(
            "engine kvm cannot have the platform xen", mend="use engine bt, or another platform"
        )
    return Xen().platform()


PLATFORMS: Final[Mapping[str, Callable[[str], Platform]]] = {
    "pc": lambda engine: PC,
    "vmware": _vmware,
    "xen": _xen,
}
