"""What an error of the engine says, in two parts."""

from __future__ import annotations

__all__ = ["engine_cause", "engine_mend"]


def engine_cause(error: BaseException) -> str:
    """What went wrong in the engine, without what mends it."""
    return str(getattr(error, "cause", "") or error)


def engine_mend(error: BaseException, otherwise: str) -> str:
    """What mends an error of the engine, or ``otherwise`` where it does not say."""
    return str(getattr(error, "mend", "") or otherwise)
