"""``tetrarch image`` and the disks that were built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.machine import guests

from tetrarch.block.disk import open_disk
from tetrarch.block.spec import DiskSpec
from tetrarch.images import Cache
from tetrarch.images.default_guest import BuiltGuest
from tetrarch.images.store import DISK, INITRD, KERNEL, DiskManifest, DiskStore
from tetrarch.testing import pvh_kernel

from .conftest import Cli


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    """The disk web, where the program looks for it."""
    store = DiskStore(tmp_path / "data/tetrarch/disks")
    with store.making("web") as directory:
        for file in (DISK, KERNEL, INITRD):
            (directory / file).write_bytes(bytes(4096))
        manifest = DiskManifest("web", "root=x", "6.1", "bookworm", {"bash": "5.2"})
        store.write_manifest(directory, manifest)
    return store


def test_disk_is_listed_where_no_guest_is_cached(cli: Cli, store: DiskStore) -> None:
    done = cli("image", "ls")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("web  disk of ")


def test_disk_is_shown_with_its_packages(cli: Cli, store: DiskStore) -> None:
    row = json.loads(cli("image", "info", "web", "--json").stdout)
    assert (row["disk"], row["packages"]) == (str(store.root / "web" / DISK), {"bash": "5.2"})
    lines = cli("image", "info", "web").stdout.splitlines()
    assert {"name: web", "packages:", "  bash 5.2"} <= set(lines)
    done = cli("image", "info", "other")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "no disk and no cached guest other" in done.stderr


def test_disk_in_use_is_not_removed(cli: Cli, store: DiskStore) -> None:
    found = store.find("web")
    assert found is not None
    disk = open_disk(DiskSpec(found.disk, format="raw"))
    try:
        done = cli("image", "rm", "web")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "in use" in done.stderr
        assert found.disk.exists()
    finally:
        disk.close()
    assert cli("image", "rm", "web").stdout == "removed the disk web\n"
    assert list(store.root.iterdir()) == []


def test_installed_system_starts_again_when_it_reboots(cli: Cli, store: DiskStore) -> None:
    found = store.find("web")
    assert found is not None
    code = guests.reset_until(3, guests.CF9_RESET, guests.say(b"up\n"))
    found.kernel.write_bytes(pvh_kernel(code))
    command = ["run", "web", "--engine", "bt"]
    done = cli(*command)
    assert (done.returncode, done.stdout) == (0, "up\n" * 3)
    assert done.stderr == "tetrarch: engine bt (as asked)\n"
    done = cli(*command, "--on-reset", "end")
    assert (done.returncode, done.stdout) == (0, "up\n")
    assert done.stderr == "tetrarch: engine bt (as asked)\n"


def test_which_of_a_disk_and_a_cached_guest_of_one_name_runs_is_said(
    cli: Cli, store: DiskStore, tmp_path: Path
) -> None:
    disk = store.find("web")
    assert disk is not None
    disk.kernel.write_bytes(pvh_kernel(guests.say(b"disk\n") + guests.POWER_OFF))
    manifest = json.loads((disk.directory / "disk.json").read_text())
    (disk.directory / "disk.json").write_text(json.dumps(manifest | {"name": "debian"}))
    disk.directory.rename(store.root / "debian")
    cached = pvh_kernel(guests.say(b"cached\n") + guests.POWER_OFF)
    cache = Cache(tmp_path / "cache/tetrarch")
    with cache.lock():
        cache.store("debian", BuiltGuest(cached, b"initrd", "6.1"), "linux-image", "6.1", {})
    started = "tetrarch: engine bt (as asked)\n"
    done = cli("run", "debian", "--engine", "bt")
    path = store.root / "debian" / DISK
    which = f"tetrarch: debian is the disk {path} here, and not the cached guest of that name\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "disk\n", which + started)
    done = cli("image", "rm", "debian")
    assert done.stdout == "removed the disk debian; the cached guest of that name stays\n"
    done = cli("run", "debian", "--engine", "bt")
    which = "tetrarch: debian is a cached guest (busybox in memory); no disk has that name\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "cached\n", which + started)
    # Nobody has named one.
    done = cli("run", "--engine", "bt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cached\n", started)
