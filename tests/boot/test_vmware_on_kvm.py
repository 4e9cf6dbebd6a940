"""VMware's platform on the engine kvm, on a KVM that works: in QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, nested_host
from tests.programs import initrd_with

from tetrarch import images

# About two minutes on two idle CPUs.
BOOT_LIMIT_S = 1800

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + BOOT_LIMIT_S)]


def test_guest_of_vmware_works_on_kvm(tmp_path: Path) -> None:
    guest = images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
    programs = {
        "vmlinuz": guest.kernel,
        "initrd": initrd_with(guest, ["fio"], tmp_path),
        "vmware_on_kvm.py": Path(__file__).with_name("vmware_on_kvm.py"),
    }
    commands = (
        "python3 -m tetrarch doctor | busybox grep -A 1 backdoor\n"
        f"timeout {BOOT_LIMIT_S - 600} python3 /suite/vmware_on_kvm.py"
    )
    host = nested_host(tmp_path)
    console = host.boot(commands, BOOT_LIMIT_S, programs, drivers=["tun"])
    for line in (
        "Linux has found VMware",
        "fio has found what it wrote to PVSCSI",
        "VMXNET3 has carried both ways",
        "VMCI's doorbell has woken the balloon",
        "the guest has powered off",
    ):
        assert f"outer: {line}\n" in console, console
    # What programs in the guest would need, and how to have it.
    assert "engine kvm takes no calls to VMware's port by programs" in console, console
    assert "enable_vmware_backdoor=y" in console, console
