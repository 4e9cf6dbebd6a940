"""Drives at a controller that has several: disks, and CD-ROM drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tetrarch._native import Disk
from tetrarch.errors import StateError

if TYPE_CHECKING:
    from tetrarch._native import DriveForm

__all__ = ["AtaDrive", "Drive", "ScsiDrive", "drive_form", "refuse_stopped"]


@dataclass(frozen=True)
class Drive:
    """A drive: what messages call it, and what is in it."""

    name: str
    disk: Disk
    cd: bool = False
    """A CD-ROM drive with this disc."""
    serial: str | None = None
    """The guest's name for it, by default ours."""


class AtaDrive(Drive):
    """One at an ATA controller."""


class ScsiDrive(Drive):
    """One at a SCSI controller."""


def drive_form(drive: Drive) -> DriveForm:
    return {
        "name": drive.name,
        "disk": drive.disk,
        "serial": drive.serial or drive.name,
        "cd": drive.cd,
    }


def refuse_stopped(drives: Sequence[Drive], stopped: int) -> None:
    """Raises StateError where requests are held back: they are no part of a saved state."""
    if stopped:
        raise StateError(
            f"{', '.join(drive.name for drive in drives)}: writes wait for room on the host",
            mend="make room, let the machine go on, and save it then",
        )
