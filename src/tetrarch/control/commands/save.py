"""The machine in a file (docs/snapshots.md); QEMU has such commands for disks alone."""

from __future__ import annotations

from tetrarch.control.command import command
from tetrarch.control.monitor import Monitor
from tetrarch.control.protocol import QmpError
from tetrarch.machine.snapshot import Parent

__all__ = ["save"]


@command("x-save")
def save(
    monitor: Monitor,
    protocol: str,
    parent: str | None = None,
    parent_file: str | None = None,
    track: bool = False,
) -> None:
    """To ``file:PATH``, or into the empty file ``fd:NAME`` that ``getfd`` has named. ``parent`` is
    the identity of the file that it lies upon, ``parent-file`` its name."""
    if (parent is None) != (parent_file is None):
        raise QmpError("Parameters 'parent' and 'parent-file' go together")
    below = None if parent is None or parent_file is None else Parent(parent, parent_file)
    with monitor.descriptors.target(protocol) as target:
        monitor.machine.save(target, parent=below, track=track)
