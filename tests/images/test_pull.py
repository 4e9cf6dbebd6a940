"""From a name to a cached guest, with and without what it needs."""

import json
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
from tests.images.conftest import KERNEL, RELEASE, FakeArchive

from tetrarch.images import (
    ArchiveError,
    Cache,
    CacheError,
    NoSpaceError,
    Reporter,
    TerminalReporter,
    UnknownImageError,
    apt,
    build,
    disk,
    ensure,
    pull,
    rebuild,
    remove,
)


def test_pull_follows_the_meta_package_to_the_kernel(archive: FakeArchive) -> None:
    guest = pull(Cache(), "debian", Reporter())

    assert guest.manifest.package == KERNEL
    assert guest.manifest.release == RELEASE
    assert guest.kernel.read_bytes() == b"kernel"
    assert f"{KERNEL}=6.1.1-1" in archive.log()


def test_cached_guest_needs_no_apt(archive: FakeArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = pull(Cache(), "debian", Reporter())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert ensure(Cache(), "debian", Reporter()) == pulled


def test_second_pull_of_the_same_version_fetches_nothing(archive: FakeArchive) -> None:
    pull(Cache(), "debian", Reporter())
    before = archive.log()
    pull(Cache(), "debian", Reporter())
    assert archive.log() == before


def test_missing_lists_are_fetched_into_a_private_place(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_APT", "no-lists")
    cache = Cache()
    pull(cache, "debian", Reporter())
    assert f"Dir::State={cache.apt}" in archive.log()
    assert "update" in archive.log()


def test_no_network_is_one_clear_line(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_APT", "offline")
    with pytest.raises(ArchiveError, match="check the network") as raised:
        pull(Cache(), "debian", Reporter())
    assert "\n" not in str(raised.value)


def test_no_apt_is_one_clear_line(archive: FakeArchive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ArchiveError, match="no apt-get on this host"):
        pull(Cache(), "debian", Reporter())


def test_package_with_a_wrong_checksum_is_refused(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_APT", "damaged")
    cache = Cache()
    with pytest.raises(ArchiveError, match="checksum"):
        pull(cache, "debian", Reporter())
    assert list(cache.packages.glob("*")) == []


def test_unknown_package_is_named(archive: FakeArchive) -> None:
    with pytest.raises(ArchiveError, match="no package linux-image-none"):
        pull(Cache(), "linux-image-none", Reporter())


@pytest.mark.parametrize("name", ["nope", "../x", "", "linux-image-A;b", "-o"])
def test_name_that_is_no_image_is_refused_before_apt_sees_it(
    archive: FakeArchive, name: str
) -> None:
    with pytest.raises(UnknownImageError):
        pull(Cache(), name, Reporter())
    assert archive.log() == ""


def test_damaged_guest_is_built_anew(archive: FakeArchive) -> None:
    guest = pull(Cache(), "debian", Reporter())
    guest.kernel.write_bytes(b"short")
    assert ensure(Cache(), "debian", Reporter()).kernel.read_bytes() == b"kernel"


def test_build_is_reproducible_and_takes_an_overlay(archive: FakeArchive, tmp_path: Path) -> None:
    pulled = pull(Cache(), "debian", Reporter())
    overlay = tmp_path / "overlay"
    (overlay / "etc").mkdir(parents=True)
    (overlay / "etc/extra").write_text("extra")

    assert build(Cache(), "debian", None).initrd == pulled.initrd.read_bytes()
    assert build(Cache(), "debian", overlay).initrd != pulled.initrd.read_bytes()
    assert rebuild(Cache(), "debian").initrd == pulled.initrd


def test_build_without_packages_says_what_to_do(archive: FakeArchive) -> None:
    with pytest.raises(ArchiveError, match="tetrarch image pull debian"):
        build(Cache(), "debian", None)


def test_pulls_at_the_same_time_do_the_work_once(archive: FakeArchive) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure(Cache(), "debian", Reporter()).kernel))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == len(threads)
    assert archive.log().count(f"{KERNEL}=") == 1


def test_cache_that_cannot_be_written_is_one_clear_line(
    archive: FakeArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="XDG_CACHE_HOME"):
        ensure(Cache(), "debian", Reporter())


def test_list_shows_whole_guests_only(archive: FakeArchive) -> None:
    cache = Cache()
    assert cache.list() == []
    guest = pull(cache, "debian", Reporter())
    (cache.images / "broken.json").write_text("{")
    assert cache.list() == [guest]


def test_program_that_does_nothing_is_ended_with_its_helpers(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_APT", "hanging")
    monkeypatch.setattr(apt, "SILENCE_S", 0.5)
    with pytest.raises(ArchiveError, match=r"apt-get did nothing for 0\.5 s"):
        pull(Cache(), "debian", Reporter())
    helper = int((archive.index / "helper").read_text())
    while is_running(helper):  # a signal takes a moment
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Neither gone nor dead and waiting for init to take note of it (proc(5))."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_program_that_a_full_disk_stops_is_ended_at_once(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_APT", "hanging")
    monkeypatch.setattr(apt, "_PAUSE_S", 0.5)
    usage = namedtuple("usage", "total used free")
    begun = archive.index / "helper"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(1 << 30, 0, 0 if begun.exists() else 1 << 30)
    )
    with pytest.raises(NoSpaceError, match="no room for what apt-get writes"):
        pull(Cache(), "debian", Reporter())
    assert not is_running(int(begun.read_text()))


def test_program_that_says_much_does_not_wait_for_a_reader(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_APT", "noisy")
    monkeypatch.setattr(apt, "SILENCE_S", 20.0)
    assert pull(Cache(), "debian", Reporter()).kernel.read_bytes() == b"kernel"


def test_disk_that_fills_up_is_one_clear_line_at_once(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_APT", "full")
    with pytest.raises(NoSpaceError, match="XDG_CACHE_HOME") as raised:
        pull(Cache(), "debian", Reporter())
    assert "\n" not in str(raised.value)
    # Newer package lists help no full disk.
    assert "update" not in archive.log()


def test_disk_that_is_too_small_is_told_before_anything_is_fetched(
    archive: FakeArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    with pytest.raises(NoSpaceError, match=r"has no room for .* and 0 MB are free"):
        pull(Cache(), "debian", Reporter())
    assert archive.log() == ""


def test_directories_on_one_disk_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
    disk.require_space({tmp_path: 60}, "it")
    with pytest.raises(NoSpaceError):
        disk.require_space({tmp_path: 60, tmp_path / "not" / "yet": 60}, "it")


def test_removed_guest_takes_the_packages_with_it_that_no_other_needs(
    archive: FakeArchive,
) -> None:
    cache = Cache()
    guest = pull(cache, "debian", Reporter())
    other = pull(cache, KERNEL, Reporter())
    packages = set(cache.packages.iterdir())
    assert len(packages) == 2

    remove(cache, "debian")

    assert not guest.kernel.exists()
    assert cache.list() == [other]
    assert set(cache.packages.iterdir()) == packages

    remove(cache, KERNEL)

    assert cache.list() == []
    assert list(cache.packages.iterdir()) == []
    with pytest.raises(CacheError, match="no guest debian is cached"):
        remove(cache, "debian")


def test_packages_of_an_older_build_go_when_a_newer_one_is_stored(archive: FakeArchive) -> None:
    cache = Cache()
    pull(cache, "debian", Reporter())
    for name in ("old.deb", ".fetch-1"):
        path = cache.packages / name
        path.mkdir() if name.startswith(".") else path.touch()
    remove(cache, "debian")
    pull(cache, "debian", Reporter())
    assert {path.suffix for path in cache.packages.iterdir()} == {".deb"}
    assert len(list(cache.packages.iterdir())) == 2


def test_manifest_of_another_version_keeps_everything(archive: FakeArchive) -> None:
    cache = Cache()
    pull(cache, "debian", Reporter())
    (cache.images / "later.json").write_text('{"form": "of a later version"}')
    (cache.packages / "later.deb").touch()
    remove(cache, "debian")
    assert (cache.packages / "later.deb").exists()


@pytest.mark.parametrize(
    "change", [{"sizes": None}, {"directory": 5}, {"directory": "../.."}, {"packages": ["x"]}, None]
)
def test_manifest_that_is_damaged_is_no_guest(
    archive: FakeArchive, change: dict[str, object] | None
) -> None:
    cache = Cache()
    pull(cache, "debian", Reporter())
    path = cache.images / "debian.json"
    text = "[" * 100_000 if change is None else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    assert (cache.find("debian"), cache.list()) == (None, [])
    # It is built anew.
    assert ensure(cache, "debian", Reporter()).kernel.read_bytes() == b"kernel"


def test_each_step_is_said_and_only_what_is_fetched_is_called_fetched(
    archive: FakeArchive, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache()
    pull(cache, "debian", TerminalReporter())
    first = capsys.readouterr().err.splitlines()
    assert first[0] == "Looking up linux-image-cloud-amd64"
    assert [line.split()[1] for line in first if line.startswith("Fetching")] == [
        KERNEL,
        "busybox-static",
    ]
    shutil.rmtree(cache.images)
    pull(cache, "debian", TerminalReporter())
    assert "Fetching" not in capsys.readouterr().err
