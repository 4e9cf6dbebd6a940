"""What tests of whole guests share."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tetrarch import images

# How long an example takes is the host's affair and not a device's: a loaded
# machine must not fail a test.
settings.register_profile("tetrarch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tetrarch")


@pytest.fixture(scope="session", autouse=True)
def plain_environment() -> Iterator[None]:
    """What a user has set to see more of the program does not change what tests see of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TETRARCH_DEBUG", "FORCE_COLOR", "COLUMNS"):
            patch.delenv(name, raising=False)
        # A shell without job control ignores it in what runs in the background, nohup that of
        # a terminal which goes: the programs that tests start would inherit it.
        signals: dict[signal.Signals, Any] = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGHUP: signal.SIG_DFL,
        }
        found = {number: signal.signal(number, handler) for number, handler in signals.items()}
        yield
        for number, handler in found.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def debian_guest() -> images.CachedGuest:
    """The default guest, in the user's cache. Only the first use ever needs network."""
    return images.ensure(images.Cache(), images.DEFAULT_IMAGE, images.TerminalReporter())


@pytest.fixture(scope="session")
def standard_guest() -> images.CachedGuest:
    """Debian's kernel for machines: that for clouds has no driver of AHCI, say. Only long tests use
    it, since it is fetched for them alone."""
    return images.ensure(images.Cache(), "debian-amd64", images.TerminalReporter())
