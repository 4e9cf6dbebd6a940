"""Disks with a system on them: the file system and partition table, the store, bad input."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tetrarch.errors import ImageError
from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk, first_boot_files
from tetrarch.images.partition import find_tool, make_disk, partition_uuid
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DISK, INITRD, KERNEL, DiskManifest, DiskStore

MIB = 1 << 20


def tools(*programs: str) -> None:
    for program in programs:
        try:
            find_tool(program, program)
        except ImageError:
            pytest.skip(f"needs {program} (Debian: e2fsprogs, fdisk)")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "root.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind, data in (
            ("./etc", tarfile.DIRTYPE, b""),
            ("./etc/hostname", tarfile.REGTYPE, b"web\n"),
            ("./dev", tarfile.DIRTYPE, b""),
            ("./dev/null", tarfile.CHRTYPE, b""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.mode = kind, len(data), 0o755
            entry.uid = entry.gid = 0
            tar.addfile(entry, io.BytesIO(data))
    return path


def test_disk_has_a_root_partition_that_is_sound_and_holds_the_files(
    tmp_path: Path, archive: Path
) -> None:
    tools("mke2fs", "sfdisk", "e2fsck", "debugfs")
    disk = tmp_path / "disk.raw"
    part = make_disk(archive, disk, 64 * MIB, "web")
    assert part == partition_uuid("web", "partition")
    assert disk.stat().st_size == 64 * MIB
    assert disk.stat().st_blocks * 512 < 32 * MIB, "sparse"
    sfdisk = find_tool("sfdisk", "fdisk")
    said = subprocess.run([sfdisk, "--json", disk], capture_output=True, text=True, check=True)
    table = json.loads(said.stdout)["partitiontable"]
    (row,) = table["partitions"]
    assert (table["label"], row["uuid"].lower(), row["start"]) == ("gpt", part, 2048)
    inside = f"{disk}?offset={MIB}"
    check = [find_tool("e2fsck", "e2fsprogs"), "-f", "-n", inside]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    debugfs = find_tool("debugfs", "e2fsprogs")
    cat = subprocess.run(
        [debugfs, "-R", "cat /etc/hostname", inside], capture_output=True, check=True
    )
    assert cat.stdout == b"web\n"
    ls = subprocess.run([debugfs, "-R", "ls /dev", inside], capture_output=True, check=True)
    assert b"null" not in ls.stdout
    assert not list(tmp_path.glob("tetrarch-*")), "nothing is left"


def test_archive_that_is_none_is_told_in_a_line(tmp_path: Path) -> None:
    tools("mke2fs", "sfdisk")
    (tmp_path / "bad.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ImageError, match="cannot make the file system"):
        make_disk(tmp_path / "bad.tar", tmp_path / "disk", 64 * MIB, "web")


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
        (DebianRecipe(user="root;rm"), "no user name"),
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
    files = first_boot_files(DebianRecipe(ssh_keys=["ssh-ed25519 AAAA me"], user="me"))
    assert files["root/.ssh/authorized_keys"] == (0o600, "ssh-ed25519 AAAA me\n")
    assert files["etc/sudoers.d/tetrarch"][0] == 0o440
    assert "root/.ssh/authorized_keys" not in first_boot_files(DebianRecipe())
