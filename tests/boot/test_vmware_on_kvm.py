"""VMware's platform on the engine kvm, on a KVM that works: in QEMU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.boot.nested import BUILD_LIMIT_S, nested_host
from tests.programs import compiled, initrd_with
from tools.bench.screen import with_driver

from tetrarch import images

TESTS = Path(__file__).parents[1]
# About two minutes on two idle CPUs.
BOOT_LIMIT_S = 1800

pytestmark = [pytest.mark.long, pytest.mark.timeout(BUILD_LIMIT_S + BOOT_LIMIT_S)]


def test_guest_of_vmware_works_on_kvm(tmp_path: Path) -> None:
    cache = images.Cache()
    guest = images.ensure(cache, "debian-amd64", images.TerminalReporter())
    (tmp_path / "guest").mkdir()
    guest = replace(guest, initrd=with_driver(cache, guest, tmp_path / "guest"))
    picture = compiled(TESTS / "platforms/kms_picture.c", tmp_path / "guest")
    programs = {
        "vmlinuz": guest.kernel,
        "initrd": initrd_with(guest, ["fio"], tmp_path / "guest", static=[picture]),
        "tests/vnc/viewer.py": TESTS / "vnc/viewer.py",
        "vmware_on_kvm.py": Path(__file__).with_name("vmware_on_kvm.py"),
    }
    commands = (
        "python3 -m tetrarch doctor | busybox grep -A 1 backdoor\n"
        f"timeout {BOOT_LIMIT_S - 600} python3 /suite/vmware_on_kvm.py"
    )
    (tmp_path / "host").mkdir()
    host = nested_host(tmp_path / "host")
    console = host.boot(commands, BOOT_LIMIT_S, programs, drivers=["tun"])
    for line in (
        "Linux has found VMware",
        "fio has found what it wrote to PVSCSI",
        "vmxnet3 has carried both ways",
        "e1000 has carried both ways",
        "vmwgfx draws, and a viewer sees it",
        "VMCI's doorbell has woken the balloon",
        "the guest has powered off",
    ):
        assert f"outer: {line}\n" in console, console
    # What programs in the guest would need, and how to have it.
    assert "engine kvm takes no calls to VMware's port by programs" in console, console
    assert "enable_vmware_backdoor=y" in console, console
