"""What balloons of any driver have in common."""

from __future__ import annotations

from typing import Final

from tetrarch.errors import ConfigError

__all__ = ["PAGE", "target_pages"]

#: The unit of sizes, whatever the guest's pages are.
PAGE: Final = 4096


def target_pages(size: int, memory: int) -> int:
    """A target in bytes as whole pages. Raises ConfigError for more than the machine has."""
    if not 0 <= size <= memory:
        raise ConfigError(
            f"a balloon of {size} bytes in a machine that has {memory}", mend=f"give 0 to {memory}"
        )
    return size // PAGE
