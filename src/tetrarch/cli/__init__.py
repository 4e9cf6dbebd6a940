"""The program ``tetrarch``."""

from tetrarch.cli.entry import main

__all__ = ["main"]
