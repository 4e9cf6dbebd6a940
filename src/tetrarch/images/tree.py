"""The files of a guest's system, from tar archives, with owners, modes and times that are the
archives' and not the host's: nobody has to be root to take them.

What a directory entry says is in memory, what regular files hold in a scratch directory. An archive
may be damaged or hostile: a name leads nowhere outside of the tree, and its links are followed in
the tree alone.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tetrarch._tar import TAR_ERRORS, Member
from tetrarch.errors import ImageError

__all__ = ["Node", "Tree"]

#: As many links as Linux follows on one path (path_resolution(7)).
_LINKS_MAX = 40
#: Of bytes, as linux/limits.h has them.
_NAME_MAX, _PATH_MAX = 255, 4095
#: How GNU tar and libarchive keep extended attributes in pax headers.
_XATTR = "SCHILY.xattr."
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


@dataclass
class Node:
    """What has an inode. ``kind`` is that of tar: REGTYPE, DIRTYPE, SYMTYPE, CHRTYPE, ..."""

    kind: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    target: str = ""
    """Of a symbolic link."""
    device: tuple[int, int] = (0, 0)
    data: Path | None = None
    """A regular file's bytes, on the host."""
    xattrs: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return self.kind == tarfile.DIRTYPE


class _Paths:
    """A set of paths, and of all that are above them: what is below one is found without a look
    at the others."""

    def __init__(self) -> None:
        self._inside: dict[str, list[str]] = {"": []}

    def __contains__(self, path: str) -> bool:
        return path in self._inside

    def add(self, path: str) -> None:
        missing = []
        while path not in self._inside:
            missing.append(path)
            path = path.rpartition("/")[0]
        for one in reversed(missing):
            self._inside[one] = []
            self._inside[path].append(one)
            path = one

    def take_below(self, path: str) -> list[str]:
        """What is below a path, which itself stays; what is above others comes before them."""
        if path not in self._inside:
            return []
        taken, self._inside[path] = self._inside[path], []
        for one in taken:  # grows meanwhile
            taken += self._inside.pop(one)
        return taken


class Tree:
    """Path -> node, with paths as "usr/bin/env". Hard links are the same node.

    ``scratch`` is an empty directory; no more than ``limit`` bytes are put there.
    """

    def __init__(self, scratch: Path, limit: int | None = None) -> None:
        self.nodes: dict[str, Node] = {}
        # Where each node is: in one of them at least. Both may have paths that are no more.
        self._of_lower_layers, self._of_this_layer = _Paths(), _Paths()
        self._scratch = scratch
        self._files = 0
        self._room = limit

    def add_tar(self, archive: IO[bytes]) -> None:
        """Adds what an archive holds, over what there is. Raises ImageError where it is damaged."""
        self._add(archive, whiteouts=False)

    def add_layer(self, archive: IO[bytes]) -> None:
        """As ``add_tar``, of a layer: its whiteouts take away what layers before it have brought
        (OCI image specification, layer.md, "Whiteouts")."""
        for path in self._of_this_layer.take_below(""):
            self._of_lower_layers.add(path)
        self._add(archive, whiteouts=True)

    def _add(self, archive: IO[bytes], *, whiteouts: bool) -> None:
        try:
            with tarfile.open(fileobj=archive, mode="r|*", tarinfo=Member) as tar:
                for entry in tar:
                    if not (whiteouts and self._take_out(entry.name)):
                        self._add_entry(tar, entry)
        except TAR_ERRORS as error:
            raise ImageError(
                f"an archive cannot be read: {error}", "make or fetch it anew"
            ) from error

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        """One that is there stays as it is."""
        if self.find(path) is None:
            self._put(self._place(path.split("/")), Node(tarfile.DIRTYPE, mode))

    def add_link(self, path: str, target: str, mtime: int = 0) -> None:
        node = Node(tarfile.SYMTYPE, 0o777, mtime=mtime, target=target)
        self._put(self._place(path.split("/")), node)

    def add_file(self, path: str, data: bytes, mode: int = 0o644, mtime: int = 0) -> None:
        file = self._new_file()
        file.write_bytes(data)
        node = Node(tarfile.REGTYPE, mode, mtime=mtime, data=file)
        self._put(self._place(path.split("/")), node)

    def find(self, path: str) -> Node | None:
        """What is at a path, with links followed."""
        return self.nodes.get(self._place(path.split("/"), to_the_end=True))

    def read(self, path: str) -> bytes:
        """What a regular file holds; nothing where there is none."""
        node = self.find(path)
        return node.data.read_bytes() if node is not None and node.data is not None else b""

    def empty(self, directory: str) -> None:
        """Takes out what is in it."""
        for paths in (self._of_lower_layers, self._of_this_layer):
            for below in paths.take_below(directory):
                self.nodes.pop(below, None)

    def remove(self, path: str) -> None:
        """What is there, with what is in it."""
        self.nodes.pop(path, None)
        self.empty(path)

    def children(self) -> dict[str, list[str]]:
        """Directory -> names in it, both in the order of their names; "" is the root."""
        found: dict[str, list[str]] = {"": []}
        for path, node in sorted(self.nodes.items()):
            folder, _, name = path.rpartition("/")
            found.setdefault(folder, []).append(name)
            if node.is_directory:
                found.setdefault(path, [])
        return found

    def _take_out(self, name: str) -> bool:
        """If the name is a whiteout, what it stands for; but nothing of its own layer."""
        parts = _parts(name)
        if not parts or not parts[-1].startswith(_WHITEOUT):
            return False
        *folder, last = parts
        hidden = [] if last == _OPAQUE else [last.removeprefix(_WHITEOUT)]
        top = self._place([*folder, *hidden])
        # What is taken here is not looked at again: many whiteouts of one place cost no more.
        for path in [*([top] if hidden else []), *self._of_lower_layers.take_below(top)]:
            if path not in self._of_this_layer:
                self.nodes.pop(path, None)
        return True

    def _add_entry(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        parts = _parts(entry.name)
        if not parts:  # the root itself
            return
        path = self._place(parts)
        _check(entry, path)
        if entry.islnk():
            node = self.nodes.get(self._place(_parts(entry.linkname)))
            if node is None or node.is_directory:
                raise ImageError(
                    f"an archive cannot be read: {entry.name} is a link to {entry.linkname}, "
                    "which is no file before it",
                    "make or fetch it anew",
                )
            self._put(path, node)
            return
        node = Node(
            tarfile.REGTYPE if entry.isreg() else entry.type,
            entry.mode & 0o7777,
            entry.uid,
            entry.gid,
            int(entry.mtime),
            entry.linkname if entry.issym() else "",
            (entry.devmajor, entry.devminor),
            xattrs={
                name.removeprefix(_XATTR): value.encode("utf-8", "surrogateescape")
                for name, value in entry.pax_headers.items()
                if name.startswith(_XATTR)
            },
        )
        if entry.isreg() and (data := tar.extractfile(entry)) is not None:
            if self._room is not None:
                self._room -= entry.size
                if self._room < 0:
                    raise ImageError("the system is larger than the disk", "give a larger --size")
            node.data = self._new_file()
            with node.data.open("wb") as file:
                shutil.copyfileobj(data, file, 1 << 20)
        self._put(path, node)

    def _put(self, path: str, node: Node) -> None:
        folder = path
        while folder := folder.rpartition("/")[0]:
            above = self.nodes.get(folder)
            if above is None or not above.is_directory:
                self.nodes[folder] = Node(tarfile.DIRTYPE)
        there = self.nodes.get(path)
        if there is not None and there.is_directory and not node.is_directory:
            self.remove(path)
        self.nodes[path] = node
        self._of_this_layer.add(path)

    def _place(self, parts: list[str], *, to_the_end: bool = False) -> str:
        """The path of a name: links on the way to it are followed, of itself if so asked."""
        todo, place, links = list(reversed(parts)), list[str](), 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                place = place[:-1]
                continue
            node = self.nodes.get("/".join([*place, part]))
            if node is None or node.kind != tarfile.SYMTYPE or not (todo or to_the_end):
                place.append(part)
                continue
            links += 1
            if links > _LINKS_MAX:
                raise ImageError(
                    f"{'/'.join(parts)} is behind links that lead in a circle",
                    "make or fetch the archive anew",
                )
            if node.target.startswith("/"):
                place = []
            todo += reversed(node.target.split("/"))
        return "/".join(place)

    def _new_file(self) -> Path:
        self._files += 1
        return self._scratch / str(self._files)


def _check(entry: tarfile.TarInfo, path: str) -> None:
    """Raises ImageError for what Linux has not."""
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    major, minor = entry.devmajor, entry.devminor
    for wrong, what in (
        (longest > _NAME_MAX or len(os.fsencode(path)) > _PATH_MAX, "too long a name"),
        (len(os.fsencode(entry.linkname)) > _PATH_MAX, "too long a link"),
        (entry.isdev() and not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20), "no device number"),
    ):
        if wrong:
            name = path if len(path) <= 80 else f"{path[:80]}..."
            raise ImageError(
                f"an archive cannot be read: {name} has {what}", "make or fetch it anew"
            )


def _parts(name: str) -> list[str]:
    """Of a name in an archive. Raises ImageError for one that leads out of the tree."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise ImageError(f"an archive has a file named {name!r}", "do not trust it")
    return parts
