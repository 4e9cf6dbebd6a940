"""Programs on a terminal of their own."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pexpect


def kill(child: pexpect.spawn[str]) -> None:
    """Ends it, whatever it does. pexpect's own way gives up after a tenth of a second."""
    if child.isalive():
        child.kill(signal.SIGKILL)
        child.wait()
    child.close()
