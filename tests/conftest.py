"""What tests of whole guests share."""

import pytest

from tetrarch import images


@pytest.fixture(scope="session")
def debian_guest() -> images.CachedGuest:
    """The default guest, in the user's cache. Only the first use ever needs network."""
    return images.ensure(images.Cache(), images.DEFAULT_IMAGE, images.TerminalReporter())
