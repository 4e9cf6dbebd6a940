"""Appliances as they are handed on: an archive, or a descriptor beside its files (DSP0243, 6).

Whoever made one is not trusted. The archive is a tar of plain files, each with a plain name, and
nothing of it is written under a name that it chose.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, Self

from tetrarch._files import open_regular
from tetrarch._tar import TAR_ERRORS, Member
from tetrarch.errors import ConfigError

__all__ = ["Package", "Progress"]

Progress = Callable[[int, int], None]

_MEMBERS_MAX: Final = 1000
_TEXT_MAX: Final = 4 << 20
_STEP: Final = 1 << 20
#: ``SHA256(disk.vmdk)= 0123…``
_LINE: Final = re.compile(r"\s*(SHA-?1|SHA-?256|SHA-?512)\s*\((.+)\)\s*=\s*([0-9A-Fa-f]+)\s*")
_AGAIN: Final = "get the file again"


class Package:
    """The files of an appliance, by their names."""

    def __init__(self, file: BinaryIO | None, directory: Path) -> None:
        self._archive, self._directory = file, directory
        self._places: dict[str, tuple[int, int]] = {}
        self.descriptor = ""
        self._digests: dict[str, tuple[str, str]] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises ConfigError for what is no appliance."""
        if path.suffix.lower() == ".ovf":
            package = cls(None, path.parent)
            package.descriptor = path.name
        else:
            try:
                file = os.fdopen(open_regular(path), "rb")
            except OSError as error:
                raise ConfigError(error.strerror or "it cannot be read", mend=_NAME) from error
            package = cls(file, path.parent)
        try:
            if package._archive is not None:
                package._list(package._archive)
            package._read_manifest()
        except BaseException:
            package.close()
            raise
        return package

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    @property
    def is_signed(self) -> bool:
        name = f"{Path(self.descriptor).stem}.cert"
        return name in self._places or (
            self._archive is None and (self._directory / name).is_file()
        )

    def text(self) -> str:
        """The descriptor's, as the manifest has it."""
        data = self._small(self.descriptor)
        self._compare(self.descriptor, lambda name: hashlib.new(name, data))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.descriptor} is no text: {error}", mend=_AGAIN) from error

    def check_names(self, names: dict[str, int | None]) -> None:
        """Refuses an appliance that lacks files, or has others than it says."""
        for name, size in names.items():
            with self._open(name) as (_, there):
                if size is not None and size != there:
                    raise ConfigError(f"{_shown(name)} has {there} of {size} bytes", mend=_AGAIN)
        for name in self._digests:
            with self._open(name):
                pass

    def begin(self, name: str) -> bytes:
        """The first bytes of a file."""
        with self._open(name) as (file, size):
            return file.read(min(size, 512))

    def size(self, name: str) -> int:
        with self._open(name) as (_, size):
            return size

    def extract(self, name: str, target: BinaryIO, progress: Progress) -> None:
        """Copies a file, and compares it with the manifest."""
        kind = self._digests.get(name, ("", ""))[0]
        digest = hashlib.new(kind) if kind else None
        with self._open(name) as (file, size):
            done = 0
            while done < size:
                data = file.read(min(_STEP, size - done))
                if not data:
                    raise ConfigError(f"{_shown(name)} ends after {done} bytes", mend=_AGAIN)
                target.write(data)
                if digest is not None:
                    digest.update(data)
                done += len(data)
                progress(done, size)
        if digest is not None:
            self._compare(name, lambda _: digest)

    def _compare(self, name: str, made: Callable[[str], hashlib._Hash]) -> None:
        kind, expected = self._digests.get(name, ("", ""))
        if kind and made(kind).hexdigest() != expected:
            raise ConfigError(
                f"{_shown(name)} is not the file of the manifest: its {kind.upper()} differs",
                mend=_AGAIN,
            )

    def _small(self, name: str) -> bytes:
        with self._open(name) as (file, size):
            if size > _TEXT_MAX:
                raise ConfigError(
                    f"{_shown(name)} has more than {_TEXT_MAX >> 20} MiB", mend=_AGAIN
                )
            return file.read(size)

    def _open(self, name: str) -> _Opened:
        if self._archive is not None:
            place = self._places.get(name)
            if place is None:
                raise ConfigError(f"{_shown(name)} is not in the archive", mend=_AGAIN)
            self._archive.seek(place[0])
            return _Opened(self._archive, place[1], close=False)
        _check_name(name)
        path = self._directory / name
        try:
            if path.is_symlink():
                raise ConfigError(f"{_shown(name)} is a link", mend="put the file there")
            file = os.fdopen(open_regular(path), "rb")
        except OSError as error:
            raise ConfigError(
                f"{_shown(name)}: {error.strerror}", mend="put it beside the descriptor"
            ) from error
        return _Opened(file, os.fstat(file.fileno()).st_size, close=True)

    def _list(self, file: BinaryIO) -> None:
        end = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as archive:
                for member in archive:
                    self._add(member, end)
        except TAR_ERRORS as error:
            raise ConfigError(f"this is no archive: {error}", mend=_NAME) from error
        named = [name for name in self._places if name.lower().endswith(".ovf")]
        if len(named) != 1:
            raise ConfigError(f"the archive has {len(named)} descriptors", mend=_NAME)
        self.descriptor = named[0]

    def _add(self, member: tarfile.TarInfo, end: int) -> None:
        name = member.name.removeprefix("./")
        shown = _shown(member.name)
        if not member.isreg() or member.issparse():
            raise ConfigError(f"{shown} is no plain file", mend=_STRANGE)
        _check_name(name)
        if name in self._places:
            raise ConfigError(f"{shown} is there twice", mend=_STRANGE)
        if member.size < 0 or member.offset_data + member.size > end:
            raise ConfigError(f"the archive ends within {shown}", mend=_AGAIN)
        if len(self._places) == _MEMBERS_MAX:
            raise ConfigError(f"it has more than {_MEMBERS_MAX} files", mend=_STRANGE)
        self._places[name] = (member.offset_data, member.size)

    def _read_manifest(self) -> None:
        name = f"{Path(self.descriptor).stem}.mf"
        there = name in self._places
        if self._archive is None:
            there = (self._directory / name).is_file()
        if not there:
            return
        for number, line in enumerate(self._small(name).decode("latin-1").splitlines(), 1):
            found = _LINE.fullmatch(line)
            if found is None:
                if line.strip():
                    raise ConfigError(f"{name}:{number}: it is no checksum", mend=_AGAIN)
                continue
            kind = found[1].replace("-", "").lower()
            self._digests[found[2]] = (kind, found[3].lower())


_NAME: Final = "name an .ova file, or an .ovf file beside its disks"
_STRANGE: Final = "do not trust who made it"


class _Opened:
    """A file at its begin, and how long it is."""

    def __init__(self, file: BinaryIO, size: int, *, close: bool) -> None:
        self._file, self._size, self._close = file, size, close

    def __enter__(self) -> tuple[BinaryIO, int]:
        return self._file, self._size

    def __exit__(self, *what: object) -> None:
        if self._close:
            self._file.close()


def _check_name(name: str) -> None:
    plain = name not in ("", ".", "..") and "/" not in name and "\\" not in name
    if not plain or not name.isprintable() or len(name.encode(errors="replace")) > 255:
        raise ConfigError(f"{_shown(name)} is no plain file name", mend=_STRANGE)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:99]}…")
