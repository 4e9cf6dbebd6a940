"""What a machine's screen shows."""

from tetrarch.display.screen import Screen

__all__ = ["Screen"]
