"""From a name to a cached guest, with and without what it needs."""

import threading
from pathlib import Path

import pytest
from tests.images.conftest import KERNEL, RELEASE, FakeArchive

from tetrarch.images import (
    ArchiveError,
    Cache,
    CacheError,
    Reporter,
    UnknownImageError,
    build,
    ensure,
    pull,
    rebuild,
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
