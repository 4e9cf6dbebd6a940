"""Disks with a system on them: the file system and partition table, the store, bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tetrarch.errors import ImageError
from tetrarch.images.debian_disk import (
    DebianRecipe,
    build_debian_disk,
    first_boot_files,
    take_boot_files,
)
from tetrarch.images.partition import make_disk, partition_uuid
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DISK, INITRD, KERNEL, DiskManifest, DiskStore
from tetrarch.images.tool import find_tool
from tetrarch.images.tree import Tree

MIB = 1 << 20
TIME = 1_700_000_000
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO/669A/XmITP94PWUgO2E9EobfsryxatoqRrE65XIxs me"


def tools(*programs: str) -> None:
    for program in programs:
        try:
            find_tool(program, program)
        except ImageError:
            pytest.skip(f"needs {program} (Debian: e2fsprogs, fdisk)")


CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep


def entry(name: str, kind: bytes = tarfile.REGTYPE, **values: Any) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.mode, found.mtime = kind, 0o755, TIME
    for key, value in values.items():
        setattr(found, key, value)
    return found


def tar(*entries: tuple[tarfile.TarInfo, bytes] | tarfile.TarInfo) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for one in entries:
            info, data = one if isinstance(one, tuple) else (one, b"")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


def system(scratch: Path) -> Tree:
    """One of every kind of file."""
    scratch.mkdir()
    tree = Tree(scratch)
    caps = {"SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape")}
    links = [
        entry(f"./links/{n:03}{'x' * 200}", tarfile.LNKTYPE, linkname="./etc/hostname")
        for n in range(40)
    ]
    tree.add_tar(
        tar(
            entry("./"),
            entry("./etc", tarfile.DIRTYPE),
            (entry("./etc/hostname", mode=0o640, uid=7, gid=100_000), b"web\n"),
            entry("./etc/link", tarfile.SYMTYPE, linkname="host name"),
            (entry('./etc/a "name" of <2>'), bytes(100_000) + b"end"),
            (entry("./ping", pax_headers=caps), b"x"),
            entry("./null", tarfile.CHRTYPE, devmajor=1, devminor=3),
            entry("./pipe", tarfile.FIFOTYPE),
            entry("./links", tarfile.DIRTYPE, mode=0o1777),
            *links,
        )
    )
    return tree


class Inside:
    """The file system on a disk, as e2fsprogs sees it."""

    def __init__(self, disk: Path) -> None:
        self._image = f"{disk}?offset={MIB}"

    def say(self, command: str) -> bytes:
        debugfs = find_tool("debugfs", "e2fsprogs")
        return subprocess.run(
            [debugfs, "-R", command, self._image], capture_output=True, check=True
        ).stdout

    def check(self) -> None:
        check = [find_tool("e2fsck", "e2fsprogs"), "-f", "-n", self._image]
        done = subprocess.run(check, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_disk_has_a_root_partition_that_is_sound(tmp_path: Path) -> None:
    tools("mke2fs", "sfdisk", "e2fsck", "debugfs")
    folder = tmp_path / "a?b c"
    folder.mkdir()
    disk = folder / "disk.raw"
    part = make_disk(system(tmp_path / "files"), disk, 64 * MIB, "web", TIME)
    assert part == partition_uuid("web", "partition")
    assert disk.stat().st_size == 64 * MIB
    assert disk.stat().st_blocks * 512 < 32 * MIB, "sparse"
    sfdisk = find_tool("sfdisk", "fdisk")
    said = subprocess.run([sfdisk, "--json", disk], capture_output=True, text=True, check=True)
    table = json.loads(said.stdout)["partitiontable"]
    (row,) = table["partitions"]
    assert (table["label"], row["uuid"].lower(), row["start"]) == ("gpt", part, 2048)
    assert list(folder.iterdir()) == [disk], "nothing is left"


def test_files_are_those_of_the_archive(tmp_path: Path) -> None:
    tools("mke2fs", "sfdisk", "e2fsck", "debugfs")
    disk = tmp_path / "disk"
    make_disk(system(tmp_path / "files"), disk, 64 * MIB, "web", TIME)
    inside = Inside(disk)
    inside.check()
    assert inside.say("cat /etc/hostname") == b"web\n"
    assert inside.say('cat "/etc/a ""name"" of <2>"') == bytes(100_000) + b"end"
    said = inside.say("stat /etc/hostname")
    assert re.search(rb"Mode: +0640 .*User: +7 +Group: +100000 .*Links: 41", said, re.DOTALL)
    for what in (b"ctime", b"atime", b"mtime", b"crtime"):
        assert re.search(what + rb": 0x%08x:00000000" % TIME, said)
    assert b'Fast link dest: "host name"' in inside.say("stat /etc/link")
    assert b"Device major/minor number: 01:03" in inside.say("stat /null")
    assert b"Type: FIFO" in inside.say("stat /pipe")
    assert b"Mode:  01777" in inside.say("stat /links")
    target = tmp_path / "capability"
    inside.say(f"ea_get -f {target} /ping security.capability")
    assert target.read_bytes() == CAPABILITY


def test_same_files_give_the_same_disk(tmp_path: Path) -> None:
    tools("mke2fs", "sfdisk", "debugfs")
    for name in ("first", "second"):
        make_disk(system(tmp_path / f"{name}-files"), tmp_path / name, 64 * MIB, "web", TIME)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_disk_that_is_too_small_is_told_in_a_line(tmp_path: Path) -> None:
    tools("mke2fs", "sfdisk", "debugfs")
    (tmp_path / "files").mkdir()
    tree = Tree(tmp_path / "files")
    tree.add_file("large", os.urandom(40 * MIB))
    with pytest.raises(ImageError, match=r"cannot make the file system .* ask for a larger disk"):
        make_disk(tree, tmp_path / "disk", 32 * MIB, "web", TIME)


def test_newest_kernel_that_has_an_initial_ram_disk_is_taken(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    tree = Tree(tmp_path / "files")
    for release, parts in (
        ("6.1.0-9-amd64", ("vmlinuz", "initrd.img")),
        ("6.1.0-40-amd64", ("vmlinuz", "initrd.img")),
        ("6.1.0-41-amd64", ("vmlinuz",)),
    ):
        for part in parts:
            tree.add_file(f"boot/{part}-{release}", f"{part} {release}".encode())
    assert take_boot_files(tree, tmp_path) == "6.1.0-40-amd64"
    assert (tmp_path / KERNEL).read_text() == "vmlinuz 6.1.0-40-amd64"
    assert (tmp_path / INITRD).read_text() == "initrd.img 6.1.0-40-amd64"


def test_kernel_that_is_named_is_in_the_place_of_the_usual_one() -> None:
    assert "linux-image-cloud-amd64" in DebianRecipe(packages=["tcc"]).wanted
    wanted = DebianRecipe(packages=["linux-image-amd64"]).wanted
    assert [package for package in wanted if package.startswith("linux-")] == ["linux-image-amd64"]


def test_disk_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "disks")

    def fail() -> None:
        with store.making("web") as directory:
            (directory / DISK).write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (store.find("web"), store.list(), list(store.root.iterdir())) == (None, [], [])
    with store.making("web") as directory:
        for name in (DISK, KERNEL, INITRD):
            (directory / name).write_bytes(b"x")
        manifest = DiskManifest("web", "root=x", "6.1", "bookworm", {"bash": "5"})
        store.write_manifest(directory, manifest)
    found = store.find("web")
    assert found is not None
    assert (found.manifest, [disk.manifest for disk in store.list()]) == (manifest, [manifest])
    with pytest.raises(ImageError, match="there is a disk web already"), store.making("web"):
        pass
    store.remove("web")
    assert list(store.root.iterdir()) == []
    with pytest.raises(ImageError, match="there is no disk web"):
        store.remove("web")


def make(store: DiskStore, name: str, data: bytes = b"x") -> None:
    with store.making(name) as directory:
        for file in (DISK, KERNEL, INITRD):
            (directory / file).write_bytes(data)
        store.write_manifest(directory, DiskManifest(name, "root=x", "6.1", "bookworm"))


def test_disk_that_is_being_made_is_not_made_twice(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with store.making("web") as directory:
        with pytest.raises(ImageError, match="a disk web is being made already"):
            make(DiskStore(tmp_path), "web", b"second")
        make(store, "other")
        for file in (DISK, KERNEL, INITRD):
            (directory / file).write_bytes(b"first")
        store.write_manifest(directory, DiskManifest("web", "root=x", "6.1", "bookworm"))
    with pytest.raises(ImageError, match="there is a disk web already"):
        make(store, "web", b"second")
    assert (tmp_path / "web" / DISK).read_bytes() == b"first"


def test_what_a_killed_build_left_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / ".build-web" / "tetrarch-x"
    folder.mkdir(parents=True)
    (folder.parent / DISK).write_bytes(b"half")
    store = DiskStore(tmp_path)
    with store.making("web") as directory:
        assert list(directory.iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "web"]


def test_what_killed_programs_left_goes_with_the_next_disk(tmp_path: Path) -> None:
    def leave() -> None:
        for name in (".build-old", ".removed-x"):
            (tmp_path / name).mkdir()
            (tmp_path / name / DISK).write_bytes(b"large")

    store = DiskStore(tmp_path)
    leave()
    with store.making("one"):
        # One that is being made stays.
        make(store, "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    leave()
    store.remove("two")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_disk_of_a_later_version_is_read_and_one_that_cannot_be_read_stays(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    make(store, "web")
    manifest = tmp_path / "web" / "disk.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"new": 1}))
    assert store.find("web") is not None
    manifest.unlink()
    with pytest.raises(ImageError, match="is there, and no disk that can be read"):
        make(store, "web")
    assert (tmp_path / "web" / DISK).read_bytes() == b"x"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "web"}', "\0"])
def test_manifest_that_is_damaged_is_no_disk(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    for name in (DISK, KERNEL, INITRD):
        (folder / name).write_bytes(b"x")
    (folder / "disk.json").write_text(text)
    assert DiskStore(tmp_path).find("web") is None


@pytest.mark.parametrize(
    ("recipe", "cause"),
    [
        (DebianRecipe(name="../x"), "no name of a disk"),
        (DebianRecipe(hostname="a b"), "no host name"),
        (DebianRecipe(hostname="a..b"), "no host name"),
        (DebianRecipe(hostname="a-"), "no host name"),
        (DebianRecipe(hostname="a" * 64), "no host name"),
        (DebianRecipe(user="root;rm"), "no user name"),
        (DebianRecipe(user="me\n"), "no user name"),
        (DebianRecipe(user="sudo"), "sudo is a user or group of Debian's own"),
        (DebianRecipe(versions={"a b": "1"}), "no name of a package"),
        (DebianRecipe(versions={"bash": "5\nPin: x"}), "no version of a package"),
        (DebianRecipe(size=1 << 50), "too much for one file system"),
        (DebianRecipe(packages=["--option"]), "no name of a package"),
        (DebianRecipe(size=1 << 20), "too little for a Debian"),
        (DebianRecipe(ssh_keys=["-----BEGIN OPENSSH PRIVATE KEY-----"]), "no public SSH key"),
    ],
)
def test_what_no_debian_takes_is_refused_at_once(
    tmp_path: Path, recipe: DebianRecipe, cause: str
) -> None:
    with pytest.raises(ImageError, match=cause):
        build_debian_disk(recipe, DiskStore(tmp_path), Reporter())
    assert list(tmp_path.iterdir()) == []


def test_missing_mmdebstrap_is_told_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program, path: None)
    with pytest.raises(ImageError, match="apt-get install mmdebstrap"):
        build_debian_disk(DebianRecipe(), DiskStore(tmp_path), Reporter())


def test_keys_are_for_their_owner_alone() -> None:
    files = first_boot_files(DebianRecipe(ssh_keys=[KEY], user="me"))
    assert files["root/.ssh/authorized_keys"] == (0o600, f"{KEY}\n")
    assert files["etc/sudoers.d/tetrarch"][0] == 0o440
    assert "root/.ssh/authorized_keys" not in first_boot_files(DebianRecipe())
