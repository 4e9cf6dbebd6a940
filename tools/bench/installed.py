"""The Debian disks that guests of the benchmarks boot from: made once, and kept in build/."""

from __future__ import annotations

from tools.bench.report import ROOT, BenchError

from tetrarch.errors import TetrarchError
from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk
from tetrarch.images.progress import TerminalReporter
from tetrarch.images.store import DiskStore, InstalledDisk

__all__ = ["debian_disk"]


def debian_disk(name: str, packages: tuple[str, ...]) -> InstalledDisk:
    """Of 2 GiB, with these packages."""
    store = DiskStore(ROOT / "build" / "bench" / "disks")
    if (disk := store.find(name)) is not None:
        return disk
    try:
        return build_debian_disk(
            DebianRecipe(name, 2 << 30, name, packages=packages), store, TerminalReporter()
        )
    except TetrarchError as error:
        raise BenchError(str(error)) from error
