"""Directories of the host that a guest mounts: as they are written down, and who serves them."""

from tetrarch.share.spec import ShareSpec, share_tags

__all__ = ["ShareSpec", "share_tags"]
