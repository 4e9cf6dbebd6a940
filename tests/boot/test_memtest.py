"""memtest86+ finds nothing wrong with the memory of a guest, in 64-bit code and in 32-bit code."""

from __future__ import annotations

import re
import time

import pytest
from tests.debs import debian_package

from tetrarch import Machine

LIMIT_S = 800
PASS = re.compile(r"Pass: +1 +Errors: 0\b")
WRONG = re.compile(r"Errors: +[1-9]")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("width", ["x64", "ia32"])
def test_one_pass_of_memtest(width: str) -> None:
    kernel = debian_package("memtest86+") / "boot" / f"memtest86+{width}.bin"
    with Machine(engine="bt", memory="64M", kernel=kernel, append="nosmp", vga=True) as vm:
        vm.start()
        deadline = time.monotonic() + LIMIT_S
        while PASS.search(shown := vm.screen().text) is None:
            assert WRONG.search(shown) is None, shown
            assert time.monotonic() < deadline, shown
            time.sleep(1)
