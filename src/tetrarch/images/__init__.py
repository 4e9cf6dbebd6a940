"""Guests to run: where they come from, how they are built, where they are kept."""

from tetrarch.images.archive import ArchiveError
from tetrarch.images.cache import Cache, CachedGuest, CacheError
from tetrarch.images.disk import NoSpaceError
from tetrarch.images.initramfs import Initramfs
from tetrarch.images.progress import Reporter, TerminalReporter
from tetrarch.images.pull import (
    DEFAULT_IMAGE,
    IMAGES,
    UnknownImageError,
    build,
    ensure,
    package_of,
    pull,
    rebuild,
    remove,
)

__all__ = [
    "DEFAULT_IMAGE",
    "IMAGES",
    "ArchiveError",
    "Cache",
    "CacheError",
    "CachedGuest",
    "Initramfs",
    "NoSpaceError",
    "Reporter",
    "TerminalReporter",
    "UnknownImageError",
    "build",
    "ensure",
    "package_of",
    "pull",
    "rebuild",
    "remove",
]
