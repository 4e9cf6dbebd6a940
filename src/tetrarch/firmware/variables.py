"""The variables of UEFI firmware: a file of its own that a machine keeps, or none.

The file is what the flash chip holds: a firmware volume (UEFI Platform Initialization 1.7,
volume 3, 3.2.1) with the variables and what their writer needs beside them.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Final, Self

from tetrarch.boot.source import Source
from tetrarch.devices.pflash import BLOCK_BYTES
from tetrarch.errors import ConfigError, HostError
from tetrarch.firmware.image import SIZE_MAX, FirmwareImage, is_variables
from tetrarch.firmware.spec import FirmwareSpec
from tetrarch.machine.new_file import new_file

__all__ = ["Variables", "check_variables"]

#: Length of a firmware volume, in its header.
LENGTH_AT: Final = 32


def check_variables(spec: FirmwareSpec, image: FirmwareImage) -> None:
    """Raises BootError or ConfigError where a machine with this firmware has no variables that it
    could keep as it was told."""
    _content(spec, image)


def _content(spec: FirmwareSpec, image: FirmwareImage) -> bytes | None:
    """Of the file, or what it begins as where there is none yet. None: this firmware has none."""
    kept, template = spec.variables, spec.variables_template
    if kept is not None and not kept.exists():
        if template is None:
            raise ConfigError(
                f"firmware: nothing is beside {spec.file} that {kept} could begin as",
                mend="copy an image of empty variables there, such as OVMF_VARS_4M.fd",
            )
        kept = None
    path = kept or template
    if path is None:
        return None
    with Source.open(path, "firmware variables") as source:
        length = source.size
        data = source.read(0, length) if length <= SIZE_MAX else b""
        if not is_variables(data):
            raise source.error(
                "is no image of firmware variables", mend="name another, or remove it"
            )
        (said,) = struct.unpack_from("<Q", data, LENGTH_AT)
        if said != length or length % BLOCK_BYTES or length + len(image.data) > SIZE_MAX:
            raise source.error(
                f"has {length} bytes, and says to have {said}",
                mend="get it again, or remove it",
            )
        if kept is not None and template is not None and template.stat().st_size != length:
            raise source.error(
                f"has {length} bytes, and variables of this firmware have"
                f" {template.stat().st_size}",
                mend="take the firmware that it was made with, such as OVMF_CODE_4M.fd",
            )
    return data


class Variables:
    """What the chip holds at first, and the file that it is kept in.

    Changes are written by a thread of their own: a confined vCPU has no calls for that.
    """

    def __init__(
        self,
        spec: FirmwareSpec,
        image: FirmwareImage,
        content: bytes,
        end: Callable[[BaseException], None],
    ) -> None:
        self.content = content
        self.base = image.base - len(content)
        """Where firmware has the chip: just below its image."""
        self._path = spec.variables
        self._end = end
        self._changes: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._writer: Thread | None = None
        if self._path is not None:
            if not self._path.exists():
                with new_file(self._path, "write firmware variables") as file:
                    file.write(content)
            self._file = _open(self._path)
            self._writer = Thread(target=self._write, name="variables", daemon=True)
            self._writer.start()

    @classmethod
    def open(
        cls, spec: FirmwareSpec, image: FirmwareImage, end: Callable[[BaseException], None]
    ) -> Self | None:
        """None for firmware without. ``end`` is called where the host does not take a change.

        Raises BootError, ConfigError or HostError: there are none, or they cannot be written, or
        another machine has them.
        """
        content = _content(spec, image)
        return None if content is None else cls(spec, image, content, end)

    def keep(self, offset: int, data: bytes) -> None:
        """From any thread."""
        if self._writer is not None:
            self._changes.put((offset, data))

    def _write(self) -> None:
        while (change := self._changes.get()) is not None:
            offset, data = change
            try:
                os.pwrite(self._file, data, offset)
            except OSError as error:
                cause = f"cannot write firmware variables to {self._path}: {error.strerror}"
                self._end(HostError(cause, mend="see to its file system"))

    def close(self) -> None:
        """When all is written, and lets another machine have the file."""
        if self._writer is not None:
            self._changes.put(None)
            self._writer.join()
            self._writer = None
            os.close(self._file)


def _open(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"cannot write firmware variables to {path}: {error.strerror}", mend="name another file"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise HostError(
            f"firmware variables {path}: another machine keeps its own there",
            mend="give each machine a file",
        ) from error
    return file
