"""A guest at rest gives back the memory of its translations, and goes on."""

from __future__ import annotations

import time

import pytest

from tetrarch import Machine
from tetrarch.images import CachedGuest

# A window of five seconds in which the guest rests, after one in which it booted.
PATIENCE = 120.0


@pytest.mark.long
def test_translations_go_while_the_guest_rests(debian_guest: CachedGuest) -> None:
    with Machine(
        engine="bt", memory="256M", kernel=debian_guest.kernel, initrd=debian_guest.initrd
    ) as vm:
        vm.start()
        vm.console.expect("# ", timeout=PATIENCE)

        def code_bytes() -> int:
            return vm.stats()["bt"]["code_bytes"]

        booted = code_bytes()
        assert booted > 16 << 20, "a boot translates more than is kept at rest"
        end = time.monotonic() + PATIENCE
        while code_bytes() > booted // 4 and time.monotonic() < end:
            time.sleep(2)
        assert code_bytes() <= booted // 4
        vm.console.send("echo $((6 * 7))\n")
        vm.console.expect("42", timeout=PATIENCE)
