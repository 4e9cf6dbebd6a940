"""A file system of type ext4 with the files of a tree, written by e2fsprogs.

mke2fs makes it empty and debugfs(8) writes each file into it, by name and in one order. So owners
and times are what the tree says without anybody being root, and the same tree gives the same bytes,
by the same version of e2fsprogs.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tetrarch._files import ScratchDirectory
from tetrarch.errors import ImageError
from tetrarch.images.tool import find_tool, run_tool
from tetrarch.images.tree import Node, Tree

__all__ = ["write_ext4"]

# Those of e2fsprogs 1.47, which the host's configuration may change: older kernels know them all.
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
_BLOCK = 4096
#: An entry of a directory with the longest name (ext4: linear directory entries).
_ENTRY_MAX = 264
_DEVICES = {tarfile.CHRTYPE: "c", tarfile.BLKTYPE: "b", tarfile.FIFOTYPE: "p"}


def write_ext4(
    tree: Tree,
    image: Path,
    offset: int,
    length: int,
    *,
    label: str,
    uuids: tuple[str, str],
    time: int,
) -> None:
    """Writes a file system of ``length`` bytes at ``offset`` of an image.

    ``uuids`` are its own and the seed of its directory hashes; ``time`` is when it was made, in
    seconds since 1970. Raises ImageError, where the tree has no room for one.
    """
    mke2fs, debugfs = find_tool("mke2fs", "e2fsprogs"), find_tool("debugfs", "e2fsprogs")
    uuid, seed = uuids
    # The first is that of e2fsprogs before 1.47.1.
    environment = {"E2FSPROGS_FAKE_TIME": str(time), "SOURCE_DATE_EPOCH": str(time)}
    what = f"cannot make the file system of {image}"
    command = [
        *(mke2fs, "-q", "-F", "-t", "ext4", "-O", _FEATURES, "-b", str(_BLOCK), "-I", "256"),
        *("-L", label, "-U", uuid, "-m", "1", "-E", f"offset={offset},hash_seed={seed}"),
        *(str(image), f"{length >> 10}k"),
    ]
    run_tool(command, what, environment=environment)
    with ScratchDirectory(prefix="tetrarch-", dir=image.parent) as folder:
        script = Path(folder) / "script"
        with script.open("wb") as file:
            for line in _script(tree, Path(folder), time):
                # debugfs reads lines of BUFSIZ bytes.
                if b"\n" in line or len(line) > 8000:
                    raise ImageError(
                        f"a name in the system is not fit for debugfs: {line[:200]!r}",
                        "take it out of the system",
                    )
                file.write(line + b"\n")
        # By its name alone: the path may have what debugfs takes for options.
        command = [debugfs, "-w", "-f", str(script), f"{image.name}?offset={offset}"]
        _debug(command, image.parent, what, environment)


def _debug(command: list[str], folder: Path, what: str, environment: Mapping[str, str]) -> None:
    """Runs debugfs, which goes on after an error, and ends well."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    # The first line is its version.
    wrong = [line for line in done.stderr.splitlines() if not line.startswith("debugfs ")]
    if done.returncode != 0 or wrong:
        cause = wrong[0].strip() if wrong else f"exit code {done.returncode}"
        raise ImageError(f"{what}: {cause}", _mend(wrong))


def _mend(said: list[str]) -> str:
    if any("Could not allocate" in line or "No free space" in line for line in said):
        return "ask for a larger disk: --size"
    if any("No space left on device" in line for line in said):
        return "free some space on the host's disk, or set XDG_DATA_HOME to another"
    return "look whether the host's disk is full, or take the file out of the system"


def _script(tree: Tree, folder: Path, time: int) -> Iterator[bytes]:
    """What debugfs is to do, one command a line."""
    children = tree.children()
    written: dict[int, str] = {}
    names: dict[int, int] = {}
    for node in tree.nodes.values():
        names[id(node)] = names.get(id(node), 0) + 1
    again: dict[str, list[tuple[str, str]]] = {}
    attributes = 0
    # A directory stands before what is in it.
    for directory in sorted(children):
        yield b"cd " + _quoted(f"/{directory}")
        for name in children[directory]:
            path = f"{directory}/{name}" if directory else name
            if path == "lost+found":  # mke2fs made it
                continue
            node = tree.nodes[path]
            if (first := written.get(id(node))) is not None:
                again.setdefault(directory, []).append((first, name))
                continue
            made = _made(node, name)
            if not made:
                continue
            written[id(node)] = path
            # All four times of what is made; 0 would be the host's.
            yield b"set_current_time @%d" % max(node.mtime, 1)
            yield made
            here = _quoted(f"./{name}")
            yield b"sif %s mode 0%o" % (here, _type(node) | node.mode)
            for what, number in (("uid", node.uid), ("gid", node.gid)):
                if number:
                    yield b"sif %s %s %d" % (here, what.encode(), number)
            if names[id(node)] > 1 and not node.is_directory:
                yield b"sif %s links_count %d" % (here, names[id(node)])
            for key, value in sorted(node.xattrs.items()):
                attributes += 1
                file = folder / f"attribute-{attributes}"
                file.write_bytes(value)
                yield b"ea_set -f %s %s %s" % (_quoted(str(file)), here, _quoted(key))
    for directory, links in again.items():
        yield b"cd " + _quoted(f"/{directory}")
        # debugfs makes a directory larger for a new file, but not for a link.
        for _ in range(-(-len(links) * _ENTRY_MAX // _BLOCK)):
            yield b"expand_dir ."
        for first, name in links:
            yield b"ln %s %s" % (_quoted(f"/{first}"), _quoted(f"./{name}"))
    yield b"set_current_time @%d" % time


def _made(node: Node, name: str) -> bytes:
    """The command that makes a file; empty for what no disk has, such as a socket."""
    if node.is_directory:
        return b"mkdir " + _quoted(name)
    if node.kind == tarfile.SYMTYPE:
        return b"symlink %s %s" % (_quoted(name), _quoted(node.target))
    if node.data is not None:
        return b"write %s %s" % (_quoted(str(node.data)), _quoted(name))
    if node.kind in _DEVICES:
        numbers = b"" if node.kind == tarfile.FIFOTYPE else b" %d %d" % node.device
        return b"mknod %s %s%s" % (_quoted(name), _DEVICES[node.kind].encode(), numbers)
    return b""


def _type(node: Node) -> int:
    """The file type in an inode's mode (inode(7))."""
    types = {
        tarfile.DIRTYPE: 0o040000,
        tarfile.SYMTYPE: 0o120000,
        tarfile.CHRTYPE: 0o020000,
        tarfile.BLKTYPE: 0o060000,
        tarfile.FIFOTYPE: 0o010000,
    }
    return types.get(node.kind, 0o100000)


def _quoted(text: str) -> bytes:
    """As one word: within quotes, a quote is written twice."""
    return b'"' + os.fsencode(text).replace(b'"', b'""') + b'"'
