"""Two machines from one file: what they have in common, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch import Machine, images
from tetrarch.boot.layout import GENERATION_ID
from tetrarch.devices.acpi_pm import GENERATION_EVENT, GPE0
from tetrarch.images import CachedGuest
from tetrarch.testing import pvh_kernel
from tetrarch.virtio.net import NetKind

LIMIT_S = 120


def marks(vm: Machine) -> tuple[bytes, bytes]:
    (net,) = vm.pc.nets
    assert isinstance(net, NetKind)
    return vm.read_memory(GENERATION_ID, 16), bytes(net.data_path.state()["permanent"])


def generation_told(vm: Machine) -> bool:
    status = vm.pc.acpi.read(GPE0, 2)
    return bool(status >> GENERATION_EVENT & 1)


def test_copies_are_the_same_unless_they_are_to_be_others(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(pvh_kernel(guests.ENDLESS_LOOP))
    net = f"socket={tmp_path / 'switch'}"
    with Machine(kernel=kernel, memory="16M", engine="bt", net=net) as vm:
        vm.start()
        first = marks(vm)
        assert first[0] != bytes(16)
        vm.save(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved", net=net) as vm:
        assert marks(vm) == first
        assert not generation_told(vm)
    seen = {first}
    for _ in range(2):
        with Machine.restore(tmp_path / "saved", net=net, fresh_identity=True) as vm:
            vm.start()
            assert generation_told(vm)
            seen.add(marks(vm))
    assert [len(set(kind)) for kind in zip(*seen, strict=True)] == [3, 3]


@pytest.fixture
def standard_guest() -> CachedGuest:
    """Debian's standard kernel, which knows the generation ID."""
    return images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())


@pytest.mark.long
def test_linux_makes_its_random_numbers_anew(standard_guest: CachedGuest, tmp_path: Path) -> None:
    saved, prompt = tmp_path / "saved", "root@tetrarch:~# "
    with Machine(
        engine="bt", kernel=standard_guest.kernel, initrd=standard_guest.initrd, memory="512M"
    ) as vm:
        vm.start()
        vm.console.expect(prompt, LIMIT_S)
        vm.save(saved)
    for fresh in (False, True):
        with Machine.restore(saved, fresh_identity=fresh) as vm:
            vm.start()
            vm.console.send("sleep 1; dmesg | grep -c 'virtual machine fork'\n")
            assert vm.console.expect(prompt, LIMIT_S).split()[0] == str(int(fresh))
