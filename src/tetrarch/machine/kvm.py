"""What this host's /dev/kvm is worth, remembered until the next boot.

Only a guest that ran tells whether hardware is behind a /dev/kvm (crates/engine-kvm,
probe.rs). That takes some milliseconds, so a result is kept with the boot and the device
it was seen on. A failure is never kept: its cause may be mended at any time.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tetrarch import _native
from tetrarch.machine import permission

__all__ = ["DEVICE", "KvmProbe", "Unusable", "engine_unusable", "probe_kvm"]

DEVICE = "/dev/kvm"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Counts up when a result means something else than before.
_FORMAT = 2


class Unusable(NamedTuple):
    """Why an engine cannot run here, and what mends it."""

    cause: str
    mend: str

    def __str__(self) -> str:
        return f"{self.cause}; {self.mend}"


def engine_unusable(name: str) -> Unusable | None:
    """None where the engine can be had; for kvm that is only that its device can be opened."""
    reason = _native.engine_available(name)
    return None if reason is None else _unusable(name, *reason)


def _unusable(name: str, cause: str, mend: str) -> Unusable:
    if name == "kvm" and os.path.exists(DEVICE) and not permission.may_open(DEVICE):
        mend = permission.mend(permission.Node.of(DEVICE), permission.this_user())
    return Unusable(cause, mend)


@dataclass(frozen=True)
class KvmProbe:
    """A small guest's run on KVM."""

    reason: Unusable | None
    """Why KVM cannot be used; None if it can."""
    hardware: bool
    """The host's CPU runs the guest's instructions; else KVM interprets them, slowly."""
    guest_rate: float
    """Instructions a second in the guest, and of the same loop on the host."""
    host_rate: float
    max_vcpus: int
    nested: bool
    """This host is a guest itself."""
    seconds: float
    """What the probe took."""

    @property
    def slowness(self) -> str:
        """How fast the guest was, in words."""
        share = max(1, round(self.host_rate / max(self.guest_rate, 1.0)))
        return f"{self.guest_rate / 1e6:,.1f} million instructions a second, 1/{share:,} of the CPU"


def probe_kvm(*, fresh: bool = False) -> KvmProbe:
    """The result of the probe: of this boot if one is known, unless it is to be ``fresh``."""
    key = _key()
    if not fresh and key is not None and engine_unusable("kvm") is None:
        known = _read(key)
        if known is not None:
            return known
    seen = _native.kvm_probe(DEVICE)
    probe = KvmProbe(
        reason=None if seen["reason"] is None else _unusable("kvm", *seen["reason"]),
        hardware=seen["hardware"],
        guest_rate=seen["guest_rate"],
        host_rate=seen["host_rate"],
        max_vcpus=seen["max_vcpus"],
        nested=seen["nested"],
        seconds=seen["seconds"],
    )
    if key is not None and probe.reason is None:
        _write(key, probe)
    return probe


def _key() -> str | None:
    """Names this boot and this device: the node is made anew with its module."""
    try:
        node = os.stat(DEVICE)
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        return None
    return f"{_FORMAT} {boot} {node.st_dev}:{node.st_ino} {node.st_rdev} {node.st_ctime_ns}"


def _path() -> Path:
    # What is gone with the boot belongs into the runtime directory, where there is one.
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "tetrarch" / "kvm-probe.json"
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "tetrarch" / "kvm-probe.json"


def _read(key: str) -> KvmProbe | None:
    try:
        kept = json.loads(_path().read_text())
        if kept["key"] != key:
            return None
        return KvmProbe(**kept["probe"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return None  # none yet, or not ours: it will be written anew


def _write(key: str, probe: KvmProbe) -> None:
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps({"key": key, "probe": asdict(probe)}))
        scratch.replace(path)
    except (OSError, RuntimeError):
        pass  # a host without a place to write to probes each time
