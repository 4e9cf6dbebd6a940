"""A disk of a machine, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tetrarch._native import Disk, DiskError
from tetrarch.block.spec import DiskSpec
from tetrarch.errors import ImageError

__all__ = ["disk_errors", "open_disk"]


def open_disk(spec: DiskSpec, on_stop: Callable[[str], object] | None = None) -> Disk:
    """Raises ImageError where the image cannot be used.

    With ``werror=stop`` a write that the host fails waits, ``on_stop`` hears why, and
    ``Disk.retry`` tries it again.
    """
    with disk_errors():
        return Disk(
            spec.path,
            image_format=spec.format,
            readonly=spec.readonly,
            direct=spec.cache == "none",
            snapshot=spec.snapshot,
            iops=spec.iops,
            bps=spec.bps,
            on_stop=on_stop if spec.werror == "stop" else None,
        )


@contextmanager
def disk_errors() -> Iterator[None]:
    """What the core says of an image, as an error of ours."""
    try:
        yield
    except DiskError as error:
        raise ImageError(f"{error.path}: {error.cause}", error.mend) from error
