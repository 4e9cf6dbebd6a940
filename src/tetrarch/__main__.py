"""``python -m tetrarch`` is ``tetrarch``."""

from tetrarch.cli import main

main()
