"""The cpio writer, read back by cpio itself."""

import gzip
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tetrarch.images import Initramfs


def sample() -> Initramfs:
    tree = Initramfs()
    tree.file("bin/tool", b"#!/bin/sh\n", 0o755)
    tree.symlink("bin/sh", "tool")
    tree.directory("tmp", 0o1777)
    tree.character_device("dev/console", 5, 1)
    tree.file("empty", b"")
    return tree


def listing(archive: bytes) -> dict[str, str]:
    cpio = shutil.which("cpio")
    assert cpio is not None, "these tests need cpio"
    done = subprocess.run(
        [cpio, "--list", "--verbose", "--numeric-uid-gid", "--quiet"],
        input=archive,
        capture_output=True,
        check=True,
        env={"LC_ALL": "C", "TZ": "UTC"},
    )
    lines = done.stdout.decode().splitlines()
    return {line.split("1970 ")[1]: line for line in lines}


def test_cpio_lists_every_kind_of_file_with_its_mode() -> None:
    found = listing(sample().cpio())

    assert found["bin/tool"].startswith("-rwxr-xr-x")
    assert found["bin/sh -> tool"].startswith("lrwxrwxrwx")
    assert found["tmp"].startswith("drwxrwxrwt")
    assert found["dev/console"].startswith("crw-------")
    assert "5,   1" in found["dev/console"]


def test_missing_parents_are_made_before_their_children() -> None:
    tree = Initramfs()
    tree.file("a/b/c", b"x")
    assert tree.paths() == ["a", "a/b", "a/b/c"]


def test_extracted_files_have_their_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 33
    tree = Initramfs()
    tree.file("deep/file", data)
    subprocess.run(
        ["cpio", "--extract", "--make-directories", "--quiet"],
        input=tree.cpio(),
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / "deep/file").read_bytes() == data


def test_same_tree_gives_same_bytes() -> None:
    assert sample().gzip() == sample().gzip()
    assert gzip.decompress(sample().gzip()) == sample().cpio()


def test_later_file_replaces_earlier_one() -> None:
    tree = Initramfs()
    tree.file("etc/motd", b"old")
    tree.file("/etc/motd", b"new")
    assert b"new" in tree.cpio()
    assert b"old" not in tree.cpio()


@pytest.mark.parametrize("path", ["", "/", "..", "a/../../b"])
def test_path_outside_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="inside an initramfs"):
        Initramfs().file(path, b"")


def test_tree_takes_files_links_and_modes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/run").write_bytes(b"run")
    (tmp_path / "bin/run").chmod(0o750)
    (tmp_path / "bin/link").symlink_to("run")
    tree = Initramfs()
    tree.tree(tmp_path)

    found = listing(tree.cpio())

    assert found["bin/run"].startswith(stat.filemode(stat.S_IFREG | 0o750))
    assert "bin/link -> run" in found
