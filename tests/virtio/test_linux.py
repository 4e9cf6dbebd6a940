"""Linux drives what is there: the default guest, by its own drivers."""

from __future__ import annotations

import pytest

from tetrarch import Machine
from tetrarch.images import CachedGuest
from tetrarch.machine.config import VirtioTransport

PROMPT = "root@tetrarch:~# "


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_random_numbers_come_from_the_host(
    debian_guest: CachedGuest, virtio: VirtioTransport
) -> None:
    with Machine(
        engine="bt", kernel=debian_guest.kernel, initrd=debian_guest.initrd, virtio=virtio
    ) as vm:
        vm.start()
        vm.console.expect(PROMPT, 90)

        def ask(command: str) -> str:
            vm.console.send(command + "\n")
            return vm.console.expect(PROMPT, 60)

        assert "virtio_rng.0" in ask("cat /sys/class/misc/hw_random/rng_current")
        counted = ask("head -c 100000 /dev/hwrng | wc -c")
        assert "100000" in counted
