"""iPXE's kernel image, which needs a BIOS: it starts under SeaBIOS to its prompt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tetrarch import Machine

IMAGE = Path("/usr/lib/ipxe/ipxe.lkrn")
LIMIT_S = 240

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2 * LIMIT_S),
    pytest.mark.skipif(
        not IMAGE.exists() or not os.path.exists("/usr/share/seabios/bios-256k.bin"),
        reason="apt-get install ipxe seabios",
    ),
]


def test_ipxe_comes_to_its_prompt() -> None:
    with Machine(engine="bt", firmware="seabios", kernel=IMAGE, append="", memory="256M") as vm:
        vm.start()
        # It gathers randomness by the clock's interrupts first.
        vm.console.expect("Ctrl-B", LIMIT_S)
        vm.console.send("\x02")
        vm.console.expect("iPXE> ", LIMIT_S)
        vm.console.send("show version\r")
        vm.console.expect("builtin/version:string = 1.", LIMIT_S)
