"""Debian's installer comes to its first question."""

from __future__ import annotations

import pytest
from tests.debs import debian_package

from tetrarch import Machine

LIMIT_S = 600
WHERE = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_installer_asks_for_a_language() -> None:
    files = debian_package("debian-installer-12-netboot-amd64") / WHERE
    with Machine(
        engine="bt",
        memory="1G",
        kernel=files / "linux",
        initrd=files / "initrd.gz",
        append="--- console=ttyS0",
    ) as vm:
        vm.start()
        vm.console.expect("Select a language", LIMIT_S)
        vm.kill()
