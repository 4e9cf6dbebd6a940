"""Which machines of this user run: a directory for each, with a lock that its process holds."""

from tetrarch.registry.about import About
from tetrarch.registry.claim import Claim
from tetrarch.registry.listing import find, machines

__all__ = ["About", "Claim", "find", "machines"]
