"""What tests of disk controllers share."""

import pytest

from tetrarch import images
from tetrarch.images import CachedGuest


@pytest.fixture(scope="session")
def standard_guest() -> CachedGuest:
    """Debian's kernel for machines: that for clouds has no driver of AHCI. Only long tests use
    it, since it is fetched for them alone."""
    return images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
