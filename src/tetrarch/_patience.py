"""How long a caller is ready to wait."""

from __future__ import annotations

import math
import threading

__all__ = ["patience"]


def patience(timeout: float | None) -> float | None:
    """Seconds as ``threading`` takes them: what is longer than the host's clock can count,
    infinity too, is None, which is for ever.

    Raises ValueError for what is no number: it is neither over nor to come.
    """
    if timeout is not None and math.isnan(timeout):
        raise ValueError(f"timeout: {timeout} is no number of seconds")
    return None if timeout is None or timeout > threading.TIMEOUT_MAX else timeout
