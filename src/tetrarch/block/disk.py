"""A disk of a machine, opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tetrarch._native import Disk, DiskError
from tetrarch.block.spec import DiskSpec
from tetrarch.errors import ImageError

__all__ = ["OnError", "OnStop", "disk_errors", "open_disk"]


OnStop = Callable[[str, Callable[[], bool]], object]
"""Called with why a write waits, and what says whether it still does."""
OnError = Callable[[str, bool, str], object]
"""Called with what the host failed: the operation, whether the host is full, and why."""


def open_disk(
    spec: DiskSpec,
    on_stop: OnStop | None = None,
    on_error: OnError | None = None,
    files: Sequence[int] | None = None,
) -> Disk:
    """Raises ImageError where the image cannot be used.

    ``files`` are descriptors of the image and of its backing files, from the top down, where the
    path is not to be opened.
    With ``werror=stop`` a write that the host fails waits, ``on_stop`` hears of it on a thread
    of its own, and ``Disk.retry`` tries it again.
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
            on_error=on_error,
            files=None if files is None else list(files),
        )


@contextmanager
def disk_errors() -> Iterator[None]:
    """What the core says of an image, as an error of ours."""
    try:
        yield
    except DiskError as error:
        raise ImageError(f"{error.path}: {error.cause}", error.mend) from error
