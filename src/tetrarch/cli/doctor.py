"""``tetrarch doctor``: what this host has for virtual machines, and what to mend."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tetrarch import _native
from tetrarch.machine import permission
from tetrarch.machine.kvm import DEVICE, engine_unusable, probe_kvm
from tetrarch.platforms.named import kvm_has_backdoor

__all__ = ["Finding", "examine", "show_doctor"]


State = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    """A note is on something that works, or is not needed, but good to know."""
    detail: str
    mend: str = ""


def show_doctor(as_json: bool) -> int:
    """Prints all findings. The exit code is 0 where some engine can run."""
    findings = list(examine())
    usable = any(finding.name == "engine" and finding.state == "good" for finding in findings)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        marks = {"good": "+", "note": "~", "bad": "-"}
        for finding in findings:
            print(f"{marks[finding.state]} {finding.name:<{width}}  {finding.detail}")
            if finding.mend:
                print(f"  {'':<{width}}  -> {finding.mend}")
    return 0 if usable else 1


def examine() -> Iterator[Finding]:
    """Looks at the host, part by part."""
    yield from _device()
    yield from _kvm()
    yield from _engine()
    yield _huge_pages()
    yield _user_namespaces()
    yield from _jail()
    yield _program("apt", "apt-get", "guests cannot be fetched with tetrarch image pull")
    yield _program("passt", "passt", "there is no rootless network", "apt-get install passt")
    yield _tap()


def _device() -> Iterator[Finding]:
    try:
        node = os.stat(DEVICE)
    except OSError:
        yield Finding(
            DEVICE,
            "note",
            "not there: no hardware virtualization, or no kvm module loaded",
            "turn VT-x or AMD-V on in the firmware, then: modprobe kvm_intel (or kvm_amd)",
        )
        return
    mode, group = stat.filemode(node.st_mode), _name(grp.getgrgid, node.st_gid)
    owner = _name(pwd.getpwuid, node.st_uid)
    if not stat.S_ISCHR(node.st_mode):
        yield Finding(DEVICE, "bad", f"there, but no device ({mode})", f"remove {DEVICE}")
        return
    seen = permission.Node.of(DEVICE)
    listed = ", with an access list" if seen.acl else ""
    yield Finding(DEVICE, "good", f"there: {mode} {owner} {group}{listed}")
    if permission.may_open(DEVICE):
        yield Finding("permission", "good", "it can be opened for reading and writing")
    else:
        user = permission.this_user()
        yield Finding(
            "permission", "bad", f"{user.name} may not open it", permission.mend(seen, user)
        )


def _kvm() -> Iterator[Finding]:
    probe = probe_kvm(fresh=True)
    took = f"{probe.seconds * 1e3:.0f} ms"
    if probe.reason is not None:
        # What stands above already says the mend.
        known = not os.path.exists(DEVICE) or not permission.may_open(DEVICE)
        state: State = "note" if not os.path.exists(DEVICE) else "bad"
        yield Finding("kvm", state, probe.reason.cause, "" if known else probe.reason.mend)
        return
    yield Finding("kvm", "good", f"a small guest ran to its end ({took} with the measurement)")
    if probe.hardware:
        rate = f"{probe.guest_rate / 1e6:,.0f} million instructions a second in a loop"
        yield Finding("hardware", "good", f"hardware-backed: {rate}")
    else:
        yield Finding(
            "hardware",
            "note",
            f"emulated: KVM interprets the guest, {probe.slowness}",
            "engine bt is faster here, and what --engine auto takes",
        )
    where = "this host is a guest itself" if probe.nested else "this host is no guest"
    yield Finding("nested", "note" if probe.nested else "good", f"{where}; {_guests_of_guests()}")
    yield Finding("vcpus", "good", f"up to {probe.max_vcpus} in one machine")
    for name, there, lost in _native.kvm_capabilities():
        if not there:
            yield Finding(name, "note", f"missing: {lost}", "a newer kernel may have it")
    yield _backdoor()


def _backdoor() -> Finding:
    """User mode has no access to ports; VMware's guests expect it to theirs."""
    what = "VMware's port by programs in its guests, such as open-vm-tools"
    if kvm_has_backdoor():
        return Finding("backdoor", "good", f"engine kvm takes calls to {what}")
    return Finding(
        "backdoor",
        "note",
        f"engine kvm takes no calls to {what}; by their kernels it does",
        "echo options kvm enable_vmware_backdoor=y | sudo tee /etc/modprobe.d/vmware.conf,"
        " and load the kvm modules anew",
    )


def _guests_of_guests() -> str:
    for module in ("kvm_intel", "kvm_amd"):
        parameter = Path(f"/sys/module/{module}/parameters/nested")
        try:
            on = parameter.read_text().strip() in ("1", "Y")
        except OSError:
            continue
        return f"{module} {'offers' if on else 'does not offer'} virtualization to guests"
    return "its KVM module does not say whether guests get virtualization"


def _engine() -> Iterator[Finding]:
    from tetrarch.errors import HostError
    from tetrarch.machine.selection import choose

    unusable = engine_unusable("bt")
    if unusable is None:
        yield Finding("bt", "good", "binary translation works")
    else:
        yield Finding("bt", "bad", unusable.cause, unusable.mend)
    try:
        name, why = choose("auto")
    except HostError as error:
        yield Finding("engine", "bad", error.cause, error.mend)
    else:
        yield Finding("engine", "good", f"--engine auto takes {name} ({why})")


def _huge_pages() -> Finding:
    base = Path("/sys/kernel/mm/transparent_hugepage")
    policy = _selected(base / "enabled")
    shared = _selected(base / "shmem_enabled")
    reserved = _first_word(Path("/proc/sys/vm/nr_hugepages"))
    detail = f"transparent: {policy}, for shared memory: {shared}; reserved: {reserved}"
    # Guest memory is a memfd, which the policy for shared memory is about.
    if shared in ("advise", "always", "within_size", "force"):
        return Finding("huge pages", "good", detail)
    return Finding(
        "huge pages",
        "note",
        detail,
        f"guest memory is faster with: echo advise | sudo tee {base}/shmem_enabled",
    )


def _user_namespaces() -> Finding:
    if _first_word(Path("/proc/sys/kernel/unprivileged_userns_clone")) == "0":
        return Finding(
            "user namespaces",
            "note",
            "off for users; sandboxes need root",
            "sudo sysctl kernel.unprivileged_userns_clone=1",
        )
    if _first_word(Path("/proc/sys/user/max_user_namespaces")) in ("0", "unknown"):
        return Finding(
            "user namespaces",
            "note",
            "none allowed; sandboxes need root",
            "sudo sysctl user.max_user_namespaces=10000",
        )
    return Finding("user namespaces", "good", "allowed")


def _jail() -> Iterator[Finding]:
    """What ``--jail auto`` is made of, beside the namespaces."""
    if "errno" in _words(Path("/proc/sys/kernel/seccomp/actions_avail")):
        yield Finding("seccomp", "good", "system calls can be filtered")
    else:
        yield Finding(
            "seccomp",
            "note",
            "not there: machines are not jailed",
            "a kernel with CONFIG_SECCOMP_FILTER has it",
        )
    version = _native.landlock_version()
    if version == 0:
        yield Finding(
            "landlock",
            "note",
            "not there: a jailed machine's process may open its user's files",
            "Linux has it from 5.13 on, where landlock is among lsm= of its command line",
        )
    else:
        yield Finding("landlock", "good", f"version {version}: files are granted by name")


def _program(name: str, program: str, lost: str, mend: str = "") -> Finding:
    path = shutil.which(program)
    if path is None:
        return Finding(name, "note", f"not found: {lost}", mend)
    return Finding(name, "good", path)


def _tap() -> Finding:
    device = "/dev/net/tun"
    if not os.path.exists(device):
        return Finding("tap", "note", f"no {device}: no tap networks", "sudo modprobe tun")
    if not os.access(device, os.R_OK | os.W_OK):
        return Finding("tap", "note", f"{device} may not be opened", "ask for a tap of your own")
    if os.geteuid() != 0:
        return Finding("tap", "note", "usable for taps that root has made for you")
    return Finding("tap", "good", "usable, also to make taps")


def _selected(path: Path) -> str:
    """The word in brackets: how sysfs shows a choice."""
    try:
        text = path.read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"


def _first_word(path: Path) -> str:
    try:
        return (path.read_text().split() or ["unknown"])[0]
    except OSError:
        return "unknown"


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _name(lookup: Callable[[int], Sequence[object]], number: int) -> str:
    try:
        return str(lookup(number)[0])
    except KeyError:
        return str(number)
