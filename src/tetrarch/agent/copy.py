"""Files and directories to a guest and back: tar(1) there, and its archive over the agent.

The guest is not trusted: nothing of what it sends is written but below what was asked for, and
links that lead out of that are left out.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Final

from tetrarch._tar import TAR_ERRORS, Member
from tetrarch.agent.capture import run_captured, run_streamed
from tetrarch.agent.client import AgentStream
from tetrarch.errors import HostError, TetrarchError

__all__ = ["copy_in", "copy_out", "extract"]


class _NoArchiveError(HostError):
    """Mostly for a reason that tar tells."""


Open = Callable[[], AgentStream]
"""A new connection with the agent: each serves one command."""

_CHUNK: Final = 64 << 10
#: Of what tar complains about.
_ERROR_BYTES_MAX: Final = 4096


def copy_in(agent: Open, source: Path, target: str) -> None:
    """``source`` into the guest: into ``target`` where that is a directory, else as it.

    All of it is root's there. Raises HostError, and AgentError where the guest goes.
    """
    try:
        source = source.resolve(strict=True)
    except OSError as error:
        raise HostError(f"cannot copy {source}: {error.strerror}", mend="check the path") from error
    target = _checked(target)
    with agent() as stream:
        is_directory = run_captured(stream, ["test", "-d", target]).code == 0
    folder, name = (target, source.name) if is_directory else posixpath.split(target)
    if not name:
        raise HostError(f"the guest has no directory {target}", mend="make it there")

    def write(pipe: IO[bytes]) -> None:
        with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            archive.add(source, name, filter=_as_root)

    with agent() as stream, _reading_from(write) as chunks:
        _tar(stream, ["-x", "-f", "-", "-C", folder or "."], chunks)


def copy_out(agent: Open, source: str, target: Path) -> list[str]:
    """``source`` of the guest: into ``target`` where that is a directory, else as it.

    Gives the names of links that were left out, since they lead out of what was copied. Raises
    HostError, and AgentError where the guest goes.
    """
    source = posixpath.normpath(_checked(source))
    folder, name = posixpath.split(source)
    if name in ("", ".", ".."):
        raise HostError(
            f"{source!r} names no file of a directory", mend="name what is to be copied"
        )
    place = target / name if target.is_dir() else target
    if not place.parent.is_dir():
        raise HostError(f"there is no directory {place.parent}", mend="make it")
    left_out: list[str] = []

    def read(pipe: IO[bytes]) -> None:
        try:
            with tarfile.open(fileobj=pipe, mode="r|", tarinfo=Member) as archive:
                extract(archive, name, place, left_out)
        except TAR_ERRORS as error:
            raise _NoArchiveError(
                f"the guest sends no archive that can be read: {error}",
                mend="look at tar(1) in the guest",
            ) from error

    arguments = ["-c", "-f", "-", "-C", folder or ".", f"./{name}"]
    with agent() as stream, _writing_to(read) as output:
        _tar(stream, arguments, output=output)
    return left_out


def _checked(path: str) -> str:
    if not path or "\0" in path:
        raise HostError(f"{path!r} is no path in a guest", mend="name one")
    # What begins so is no option.
    return f"./{path}" if path.startswith("-") else path


def _tar(
    stream: AgentStream,
    arguments: Sequence[str],
    source: Iterable[bytes] = (),
    output: Callable[[bytes], object] = lambda data: None,
) -> None:
    said = bytearray()
    code = run_streamed(
        stream,
        ["tar", *arguments],
        source,
        output=output,
        error=lambda data: said.extend(data[: _ERROR_BYTES_MAX - len(said)]),
    )
    if code != 0:
        lines = said.decode("utf-8", "replace").split("\n")
        reason = next((line.strip() for line in lines if line.strip()), f"exit code {code}")
        raise HostError(f"the guest cannot copy: {reason}", mend="check the path in the guest")


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """None for what is no file, directory or link."""
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def extract(archive: tarfile.TarFile, name: str, place: Path, left_out: list[str]) -> None:
    """Writes the archive of ``name`` as ``place``. Links that lead out are added to ``left_out``;
    raises HostError for anything else that was not asked for."""
    # Where the user's own link leads; from here on all links may be the guest's.
    place = place.resolve()
    for member in archive:
        member.name = _renamed(member.name, name, place.name)
        path = _without_links(place, member.name)
        if member.islnk():
            member.linkname = _renamed(member.linkname, name, place.name)
            _without_links(place, member.linkname)
        if member.issym() and not _leads_into(place, path.parent / member.linkname):
            left_out.append(member.name)
            continue
        if path.is_symlink():  # tarfile would write what it leads to
            path.unlink()
        try:
            archive.extract(member, place.parent, filter="data")
        except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
            left_out.append(member.name)
        except tarfile.FilterError as error:
            raise HostError(f"the guest sends what was not asked for: {error}") from error


def _without_links(place: Path, name: str) -> Path:
    """The path of a member's name, which begins with that of ``place``. Raises HostError where a
    link is on the way: an archive that tar makes has none there, and it leads past ``place``."""
    path = place.parent
    for part in PurePosixPath(name).parts:
        if path.is_symlink():
            raise HostError(
                f"what the guest sends is behind the link {path}",
                mend="remove the link, if it is yours, or copy to another place",
            )
        path /= part
    return path


def _leads_into(place: Path, target: Path) -> bool:
    return Path(os.path.realpath(target)).is_relative_to(place)


def _renamed(path: str, name: str, to: str) -> str:
    """With the first part, which is what was asked for, as it is called here."""
    first, *rest = PurePosixPath(path).parts or ("",)
    if first != name or ".." in rest:
        raise HostError(f"the guest sends what was not asked for: {path!r}")
    return posixpath.join(to, *rest)


@contextmanager
def _reading_from(write: Callable[[IO[bytes]], None]) -> Iterator[Iterator[bytes]]:
    """What ``write`` writes, on a thread of its own, as chunks; what it raises comes out here."""
    reader, writer = os.pipe()
    with _thread(lambda: _with_pipe(writer, "wb", write)), open(reader, "rb") as pipe:
        yield iter(lambda: pipe.read1(_CHUNK), b"")


@contextmanager
def _writing_to(read: Callable[[IO[bytes]], None]) -> Iterator[Callable[[bytes], object]]:
    """What the block writes goes to ``read``, on a thread of its own; what that raises comes out
    here."""
    reader, writer = os.pipe()
    with _thread(lambda: _with_pipe(reader, "rb", read)), open(writer, "wb") as pipe:
        yield pipe.write


def _with_pipe(descriptor: int, mode: str, use: Callable[[IO[bytes]], None]) -> None:
    with open(descriptor, mode) as pipe:
        use(pipe)


@contextmanager
def _thread(run: Callable[[], None]) -> Iterator[None]:
    """Ends with it; its exception counts before the block's, which is mostly its echo."""
    failure: list[BaseException] = []

    def caught() -> None:
        try:
            run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=caught, name="copy", daemon=True)
    thread.start()
    known = False
    try:
        yield
    except TetrarchError:
        known = True
        raise
    finally:
        thread.join()
        errors = [error for error in failure if not isinstance(error, BrokenPipeError)]
        if errors and not (known and isinstance(errors[0], _NoArchiveError)):
            raise errors[0]
