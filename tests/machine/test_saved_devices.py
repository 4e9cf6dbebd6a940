"""A guest goes on in another machine with each of its devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot.saved_devices import goes_from_engine_to_engine

from tetrarch import images

LIMIT_S = 120


@pytest.mark.long
def test_every_device_goes_on(tmp_path: Path) -> None:
    # Debian's kernel for machines has drivers of all of them.
    guest = images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
    goes_from_engine_to_engine(["bt", "bt", "bt"], guest.kernel, guest.initrd, tmp_path, LIMIT_S)
